"""The sweeps behind chapters on a device, for tools/gpu_parts.py: scripts of experiments/, each for its share of the time."""

from __future__ import annotations

import pathlib
import runpy
import sys
from typing import Any

from common import ROOT
from gpu_shared import Report, Trouble, call, complain, memory, read_json

SWEEPS = {"16_roofline": 4.0, "17_serving": 3.0, "17_batch": 1.5}  # of experiments/, with their parts of the time


def sweeps(report: Report) -> None:
    """Each sweep that can run on this device, in a process of its own under the cap; its result file is in its entry."""
    wanted = [name for name in SWEEPS if not report.args.sweeps or name.startswith(tuple(report.args.sweeps))]
    if not wanted:
        raise Trouble(f"there is no such sweep; there are {', '.join(SWEEPS)}")
    todo = []
    for name in wanted:
        why = left_out(ROOT / "experiments" / f"{name}.py", report.args.quick)
        if why:
            report.add("sweeps", {"sweep": name, "ok": True, "left_out": why})
        else:
            todo.append(name)
    for number, name in enumerate(todo):
        limit = report.left() * SWEEPS[name] / sum(SWEEPS[later] for later in todo[number:])
        report.add("sweeps", one(report, name, limit))
    complain(report, "sweeps", "sweep")


def left_out(script: pathlib.Path, quick: bool) -> str | None:
    """Why a sweep is not run here, or None. Asked of its text: one that takes no options would begin when asked for help."""
    text = script.read_text(encoding="utf-8")
    if '"--device"' not in text:
        return "it takes no --device: it times one thread of a CPU"
    return "it takes no --quick" if quick and '"--quick"' not in text else None


def one(report: Report, name: str, limit: float) -> dict[str, Any]:
    args = report.args
    out = args.out.parent / f"sweep-{name}.json"
    words = [sys.executable, str(ROOT / "tools" / "gpu_parts.py"), "sweep", "--out", str(out), "--device", args.device,
             "--cap", f"{args.cap:.0f}", "--sweeps", str(ROOT / "experiments" / f"{name}.py"),
             *(["--quick"] if args.quick else [])]  # fmt: skip
    trouble, seconds = call(words, limit)
    found = read_json(out)
    trouble = found.pop("trouble", None) or trouble
    return {"sweep": name, "ok": not trouble, "trouble": trouble, "seconds": seconds} | found


def sweep(report: Report) -> None:
    """Run one script in this process. What it would write to results/ goes into this part's report instead."""
    from minimoe.bench import report as results

    script, write = pathlib.Path(report.args.sweeps[0]), results.write_result

    def elsewhere(path: Any, *numbers: Any, **more: Any) -> pathlib.Path:
        name = pathlib.Path(path).name
        written = write(report.args.out.with_suffix("") / name, *numbers, **more)
        report.put(file=f"results/{name}", result=read_json(written), **memory(report.args.device))
        return written

    results.write_result = elsewhere  # before the script imports it
    sys.argv = [str(script), "--device", report.args.device, *(["--quick"] if report.args.quick else [])]
    runpy.run_path(str(script), run_name="__main__")
