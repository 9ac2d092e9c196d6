"""The parts of tools/gpu.py, each in a process of its own: python tools/gpu_parts.py PART --out FILE ...

A part writes what it knows after every measurement, so being stopped costs the rest and nothing more.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import xml.etree.ElementTree as ElementTree

from common import ROOT
from gpu_book import chapter, chapters, training
from gpu_card import card, machine
from gpu_shared import Report, Trouble, call, complain, hold_to, one_line, read_json
from gpu_sweeps import sweep, sweeps


def tests(report: Report) -> None:
    """pytest on the files that have tests for CUDA, and only on these: others may need what is not installed."""
    try:
        import pytest
    except ImportError:
        raise Trouble("pytest is not installed here, so its tests were not run") from None
    files = sorted(p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text(encoding="utf-8"))
    results = report.args.out.with_suffix(".xml")
    # settings of pyproject.toml that an older pytest, or one without nbformat, refuses
    code = pytest.main([
        "-m", "gpu and not download", "-q", "-rs", "-o", "minversion=0", "-o", "filterwarnings=", "-p", "no:cacheprovider",
        "--continue-on-collection-errors", f"--junitxml={results}", *map(str, files),
    ])  # fmt: skip
    if not results.exists():
        raise Trouble(f"pytest ended with exit code {int(code)} before the first test")
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for case in ElementTree.parse(results).iter("testcase"):
        bad = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        skipped = case.find("skipped")
        outcome = "failed" if bad is not None else "skipped" if skipped is not None else "passed"
        counts[outcome] += 1
        why = bad if bad is not None else skipped
        message = {} if why is None else {"message": " ".join((why.get("message") or "").split())[:400]}
        report.add("tests", {"test": f"{case.get('classname')}.{case.get('name')}", "outcome": outcome,
                             "seconds": float(case.get("time") or 0)} | message)  # fmt: skip
    report.put(counts=counts)
    if code:
        raise Trouble(f"{counts['failed']} of {sum(counts.values())} tests failed" if counts["failed"] else f"pytest: code {int(code)}")


def base(report: Report) -> None:
    from gpu_steps import base

    base(report)


def fallbacks(report: Report) -> None:
    from gpu_steps import fallbacks

    fallbacks(report)


def benchmarks(report: Report) -> None:
    """The benchmarks as `make bench` runs them on a card, each with its result file."""
    plan = benchmark_plan(report.args.quick)
    for number, (name, options) in enumerate(plan):
        share = report.left() / (len(plan) - number)
        folder = report.args.out.parent / f"benchmark-{number}"
        # a benchmark has about a dozen cases, and takes as long again to load programs and choose among their forms
        seconds = 0.0 if report.args.quick else max(0.5, share / 30)
        words = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--device", report.args.device, "--out", str(folder),
                 "--seconds", f"{seconds:.1f}", *options]  # fmt: skip
        trouble, took = call(words, share)
        found = [read_json(path).get("numbers") for path in sorted(folder.glob("*.json"))]
        report.add("benchmarks", {
            "benchmark": " ".join([name, *options]), "ok": not trouble, "trouble": trouble, "seconds": took,
            "numbers": found[0] if found else None,
        })  # fmt: skip
    complain(report, "benchmarks", "benchmark")


def benchmark_plan(quick: bool) -> list[tuple[str, list[str]]]:
    """Names of scripts in benchmarks/, and their options, the shipped model's first."""
    sys.path.append(str(ROOT / "benchmarks"))
    from run_all import CUDA

    if quick:
        toy = ["--preset", "tiny", "--lengths", "32", "--dtype", "float32"]
        return [(name, toy) for name in dict.fromkeys(row[0] for row in CUDA)]
    rows = sorted(CUDA, key=lambda row: row[1] != "small")
    return [(name, ["--preset", preset, "--lengths", *map(str, lengths), *more]) for name, preset, lengths, more, _ in rows]


STEPS = {
    f.__name__: f for f in (machine, card, tests, base, fallbacks, benchmarks, sweeps, sweep, chapters, chapter, training)
}  # fmt: skip


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("part", choices=STEPS)
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--device", default="cpu")
    p.add_argument("--seconds", type=float, default=600.0)
    p.add_argument("--cap", type=float, default=11e9)
    p.add_argument("--quick", action="store_true")
    p.add_argument("--chapters", nargs="+", default=[])
    p.add_argument("--sweeps", nargs="+", default=[])
    p.add_argument("--run", type=pathlib.Path)
    p.add_argument("--train", default="")
    report = Report(p.parse_args())
    try:
        if report.args.part != "machine":  # which says what is wrong with the device
            hold_to(report.args.cap, report.args.device)
        STEPS[report.args.part](report)
    except Exception as error:
        import traceback

        report.put(trouble=one_line(error))
        if not isinstance(error, Trouble) or error.__cause__:
            traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
