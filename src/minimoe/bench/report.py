"""Measurements as files: numbers with the machine, the versions and the commit that made them."""
from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from ..files import write_text


def write_result(
    path: str | os.PathLike[str], numbers: dict[str, Any], wall_s: float, card: dict[str, str | float] | None = None
) -> Path:
    """Write ``numbers`` as JSON with where they come from; the file appears whole or not at all.

    wall_s is the wall time of the whole experiment in seconds. card is what a page shows in the place of a reader's
    own measurement, {label: text or number} (default: the plain figures of ``numbers``). Returns the path.
    """
    from .device import describe  # torch; to read a result takes none

    path = Path(path)
    record = {"experiment": path.stem, "machine": describe(), "commit": commit(), "wall_s": round(wall_s, 1)}
    record |= {"card": card} if card else {}
    text = json.dumps(record | {"numbers": numbers}, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A result file's content.

    Raises FileNotFoundError with the command that makes it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `python experiments/{path.stem}.py`, or check out the repository whole")
    return json.loads(path.read_text(encoding="utf-8"))


def commit() -> str:
    """The commit of the code, with "+changes" if the tree differs; "unknown" outside a git checkout."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # result files themselves do not count: they are what a run writes
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/experiments", ":/benchmarks")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
