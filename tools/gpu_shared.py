"""What the parts of tools/gpu.py share: a report on disk, programs with a time limit, the cap on memory."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import time
from typing import Any

from common import ROOT


class Trouble(Exception):
    """One line: why a part cannot go on."""


class Report:
    """A part's options and its results so far, on disk after every change."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.found = args, {}
        self.end = time.monotonic() + args.seconds

    def left(self) -> float:
        """Seconds until this part should end."""
        return self.end - time.monotonic()

    def put(self, **values: Any) -> None:
        self.found |= values
        temporary = self.args.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.found, default=str), encoding="utf-8")
        os.replace(temporary, self.args.out)

    def add(self, key: str, value: dict[str, Any]) -> None:
        """One more entry of the list ``key``."""
        print(json.dumps({key: value}, default=str), flush=True)
        self.put(**{key: [*self.found.get(key, []), value]})


def call(words: list[str], limit: float) -> tuple[str | None, float]:
    """Run a program for at most ``limit`` seconds: one line of trouble or None, and its seconds. The last lines of a
    program in trouble are printed."""
    start = time.monotonic()
    if limit < 1:
        return "not begun: no time left", 0.0
    try:
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit)
        code, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, said = None, error.output or b""
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    if code is None:
        trouble = f"stopped after {limit:.0f} s"
    else:
        trouble = f"exit code {code}: {lines[-1][:300] if lines else 'no output'}" if code else None
    if trouble:
        print("\n".join(lines[-8:]), flush=True)
    return trouble, round(time.monotonic() - start, 1)


def complain(report: Report, key: str, name: str) -> None:
    """Trouble if an entry of the list ``key`` is not ok."""
    bad = [entry[name] for entry in report.found.get(key, []) if not entry["ok"]]
    if bad:
        raise Trouble(f"{len(bad)} of {len(report.found[key])} did not go well: {', '.join(bad)}")


def memory(device: str) -> dict[str, int]:
    """Bytes of the device's memory that torch has had at most, in tensors and in all."""
    if device == "cpu":
        return {}
    import torch

    return {"peak_allocated": torch.cuda.max_memory_allocated(device), "peak_reserved": torch.cuda.max_memory_reserved(device)}


def hold_to(cap: float, device: str) -> None:
    """Let torch take no more than ``cap`` bytes of the device's memory."""
    if device == "cpu":
        return
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    # by number: it refuses a plain "cuda"
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), torch.device(device).index)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def one_line(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed here"
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, Trouble) else f"{type(error).__name__}: {text}"
