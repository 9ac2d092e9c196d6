"""All benchmarks on this machine, one after another: what `make bench` runs.

    python benchmarks/run_all.py [--device cpu] [--seconds 12] [--only decode]

The CPU is measured always, a GPU if there is one (--device picks one of them). Each benchmark is a process of its own
and writes its own results/bench_*.json. 16,384 tokens are read at preset small only.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).parent
SECONDS = 12.0  # a case
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # waiting threads would be counted as work
TRAIN, PREFILL, DECODE = "train_step", "prefill", "decode"

# benchmark, preset, lengths, other options, minutes on one core of a machine that multiplies 100 GFLOP/s
CPU: list[tuple[str, str, tuple[int, ...], tuple[str, ...], float]] = [
    (TRAIN, "trial", (256, 1024, 4096), (), 2.0),
    (TRAIN, "small", (256, 1024, 4096), (), 2.5),
    (TRAIN, "base-12gb", (256,), (), 2.5),
    (PREFILL, "trial", (256, 1024, 4096), (), 1.0),
    (PREFILL, "small", (256, 1024, 4096, 16_384), (), 2.0),
    (PREFILL, "base-12gb", (256, 1024, 4096), (), 2.5),
    (DECODE, "trial", (256, 1024, 4096), ("--compile",), 2.0),
    (DECODE, "small", (256, 1024, 4096), ("--compile",), 2.0),
    (DECODE, "base-12gb", (256, 1024), (), 1.5),
]
_BOTH = ("--dtype", "float32", "bfloat16")
CUDA: list[tuple[str, str, tuple[int, ...], tuple[str, ...], float]] = [
    (TRAIN, "small", (256, 1024, 4096), (), 1.0),
    (TRAIN, "base-12gb", (256, 1024, 4096), (), 1.5),
    (PREFILL, "small", (256, 1024, 4096, 16_384), _BOTH, 1.0),
    (PREFILL, "base-12gb", (256, 1024, 4096, 16_384), _BOTH, 1.0),
    (DECODE, "small", (256, 1024, 4096), _BOTH, 1.5),
    (DECODE, "base-12gb", (256, 1024, 4096), _BOTH, 1.5),
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only this one")
    parser.add_argument("--only", nargs="+", choices=(TRAIN, PREFILL, DECODE), default=[TRAIN, PREFILL, DECODE])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="a case (default: %(default)g)")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    args = parser.parse_args(argv)
    devices = [args.device] if args.device else ["cpu"] + ["cuda"] * torch.cuda.is_available()
    plan = [(device, *row) for device in devices for row in (CPU if device == "cpu" else CUDA) if row[0] in args.only]
    minutes = sum(row[-1] for row in plan)
    print(f"{len(plan)} benchmarks on {' and '.join(devices)}: about {minutes:.0f} minutes, "
          "in which nothing else should run", flush=True)
    start, failed = time.perf_counter(), []
    for device, name, preset, lengths, more, _ in plan:
        command = [
            f"{HERE / name}.py", "--preset", preset, "--lengths", *map(str, lengths), "--device", device,
            "--seconds", str(args.seconds), *more,
        ]  # fmt: skip
        print(f"\n[{(time.perf_counter() - start) / 60:.0f} min] {name}.py {' '.join(command[1:])}", flush=True)
        if not args.list and subprocess.run([sys.executable, *command], env=os.environ | THREADS).returncode:
            failed.append(f"{name} {preset} {device}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
