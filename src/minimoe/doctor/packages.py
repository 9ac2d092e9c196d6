"""Are the packages there that this one declares? Reads installed metadata, imports none of them."""
from __future__ import annotations

import importlib.metadata
import operator
import re

from .finding import PIP, Finding

_COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}


def declared_requirements() -> dict[str, list[str]] | None:
    """What the installed package declares, by extra ("" is the core); None if it is not installed."""
    try:
        lines = importlib.metadata.requires("minimoe") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    declared: dict[str, list[str]] = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
        declared.setdefault(extra.group(1) if extra else "", []).append(requirement.strip())
    return declared


def check_packages(declared: dict[str, list[str]] | None) -> list[Finding]:
    """The core and what chapters need must be there; the site's tools and bitsandbytes are optional."""
    if declared is None:
        text = "runs from a folder that is not installed, so notebooks will not find it"
        return [Finding("fix", "minimoe", text, f'{PIP} -e ".[run]"')]
    findings = []
    groups = {"packages": ("fix", "", "run"), "site": ("note", "book"), "bitsandbytes": ("note", "bnb")}
    for topic, (level, *extras) in groups.items():
        # torch has a check of its own, since PyPI's build may be the wrong one
        wanted = [item for extra in extras for item in declared.get(extra, ()) if _name(item) != "torch"]
        wrong = [item for item in wanted if not satisfied(item)]
        if wrong:
            command = " ".join([PIP, *(f'"{item}"' for item in wrong)])
            names = ", ".join(map(_name, wrong))
            findings.append(Finding(level, topic, f"missing or of another version: {names}", command))
        else:
            versions = ", ".join(f"{_name(item)} {installed(_name(item))}" for item in wanted)
            findings.append(Finding("ok", topic, versions))
    return findings


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group()  # type: ignore[union-attr]


def installed(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def satisfied(requirement: str) -> bool:
    """Whether ``name>=1.2,<3`` is installed so. Compares a version's numbers, enough for our bounds."""
    version = installed(_name(requirement))
    if version is None:
        return False
    have = _numbers(version)
    for sign, bound in re.findall(r"(>=|<=|==|<|>)\s*([\w.]+)", requirement):
        want = _numbers(bound)
        length = max(len(have), len(want))
        left, right = (part + (0,) * (length - len(part)) for part in (have, want))
        if not _COMPARE[sign](left, right):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0]))
