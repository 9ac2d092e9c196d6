"""The most memory that a training step or a prompt takes, each program in a process of its own.

    python benchmarks/memory.py train_step minimoe FOLDER --length 1024      (the benchmarks call this)

Within one process allocators keep what earlier work has freed, so the second program would look smaller. Measured is
what is added to the loaded model: on Linux the peak of the resident set (VmHWM, reset once the weights have been
touched), with a GPU torch's own count; elsewhere nothing.
"""
from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure
import peers
import torch

PROGRAMS = {"minimoe": peers.Minimoe, "transformers": peers.Transformers}
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def added_bytes(
    work: str, program: str, folder: Path, batch: int, length: int, dtype: str, device: torch.device,
    experts: str | None = None, autocast: bool = False,
) -> int | str:
    """Bytes at the peak, above the loaded model; a child process finds out. Or one line that says why not."""
    command = [
        sys.executable, __file__, work, program, folder, "--batch", batch, "--length", length, "--dtype", dtype,
        "--device", device, *(["--experts", experts] if experts else []), *(["--autocast"] if autocast else []),
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1] if lines else f"its process ended with code {done.returncode}"
    return int(json.loads(last)["bytes"]) if done.returncode == 0 else last


def compare(works: dict[str, dict[str, Any]], **same: Any) -> dict[str, int | str]:
    """added_bytes of each program; ``works`` has what differs between them."""
    return {program: added_bytes(program=program, **same, **changes) for program, changes in works.items()}


def _resident(kind: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    found = re.search(rf"^{kind}:\s+(\d+) kB", _STATUS.read_text(), re.M)
    if found is None:
        raise SystemExit(f"{_STATUS} has no {kind}")
    return int(found[1]) << 10


def _settle() -> None:
    """Give freed memory back, as the loader's would hide as much of the work's."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass  # not glibc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", choices=("train_step", "prefill"))
    parser.add_argument("program", choices=list(PROGRAMS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", choices=list(measure.DTYPES), default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--experts", help="transformers' expert implementation")
    parser.add_argument("--autocast", action="store_true", help="train under autocast to bfloat16")
    args = parser.parse_args()
    cuda = args.device.type == "cuda"
    if not cuda and not _RESET.exists():
        raise SystemExit("peak memory is measured on Linux and on CUDA only")
    with measure.settings():
        program = PROGRAMS[args.program](args.folder, args.device, measure.DTYPES[args.dtype], measure.clock(args.device))
        if args.experts and isinstance(program, peers.Transformers):
            program.model.set_experts_implementation(args.experts)
        ids = torch.randint(0, 256, (args.batch, args.length), device=args.device)

        def run(part: torch.Tensor) -> None:
            program.train_step(part, part, args.autocast) if args.work == "train_step" else program.prefill(part)

        run(ids[:1, :16])  # touches the weights, and makes the optimizer's state
        program.optimizer.zero_grad(set_to_none=True)
        _settle()
        if cuda:
            torch.cuda.reset_peak_memory_stats(args.device)
            before = torch.cuda.memory_allocated(args.device)
        else:
            _RESET.write_text("5")  # VmHWM starts again from here
            before = _resident("VmRSS")
        run(ids)
        peak = torch.cuda.max_memory_allocated(args.device) if cuda else _resident("VmHWM")
    print(json.dumps({"bytes": peak - before}), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
