"""A training step beside transformers: loss, gradients and AdamW on the same weights and tokens.

    python benchmarks/train_step.py [--preset small] [--lengths 256 1024 4096] [--device cpu] [--dtype float32 bfloat16]

Weights are float32; "bfloat16" is a step under autocast, on both sides. A step has 1,024 tokens (a GPU: 16,384) in
sequences of each length, and at least one sequence. llama.cpp does not train. --compile measures minimoe under
torch.compile too, which takes about a minute a dtype. Writes results/bench_train_step_PRESET_DEVICE.json.
"""
from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import memory
import peers
import torch
from arithmetic import training_flops

LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the loss


def main(argv: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__, (256, 1024, 4096), ("float32", "bfloat16"), list(peers.SHAPES))
    parser.add_argument("--tokens", type=int, help="a step (default: 1024, on a GPU 16384)")
    parser.add_argument("--compile", action="store_true", help="also minimoe under torch.compile, at the first length")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    args = measure.options(parser, argv)
    with measure.settings(), tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


def run(args: argparse.Namespace, folder: Path) -> None:
    start = time.perf_counter()
    config, device, clock = peers.shape(args.preset), args.device, measure.clock(args.device)
    budget = args.tokens or (1024 if device.type == "cpu" else 16_384)
    peers.write_weights(config, folder, torch.float32)
    ours, theirs, missing = peers.pair(folder, device, torch.float32, clock)
    numbers: dict[str, Any] = measure.about(args, config, [ours, theirs], missing)
    numbers |= {"cases": [], "exponent": {}, "memory": {}}
    card: dict[str, str] = {}
    for dtype in args.dtype:
        medians: dict[str, list[float]] = {}
        for length in args.lengths:
            batch, bfloat16 = max(1, budget // length), dtype == "bfloat16"
            ids = torch.randint(0, config.vocab_size, (batch, length), device=device)
            targets = ids.roll(-1, 1)
            works = {"minimoe": lambda: ours.train_step(ids, targets, bfloat16)}
            about: dict[str, Any] = {"dtype": dtype, "batch": batch, "length": length}
            if theirs and length == args.lengths[0]:
                work = lambda: theirs.train_step(ids, targets, bfloat16)  # noqa: E731
                theirs, about["choice"] = peers.choose(theirs, config, ids.numel(), work, missing)
            if theirs:
                about |= {"experts": theirs.experts, "loss_difference": same_loss(ours, theirs, ids, targets, dtype)}
                works["transformers"] = lambda: theirs.train_step(ids, targets, bfloat16)
            if args.compile and length == args.lengths[0]:
                compiled = peers.Minimoe(folder, device, torch.float32, clock, compiled=True)
                run_compiled = lambda: compiled.train_step(ids, targets, bfloat16)  # noqa: E731
                if seconds := peers.first_run(run_compiled, compiled.name, missing):
                    works[compiled.name], about["compile_s"] = run_compiled, seconds
            bound = measure.matmul_bound(training_flops(config, batch, length), device, dtype, clock)
            done = about | measure.case(works, args.seconds, ids.numel(), bound)
            if length == args.lengths[0]:
                done["where"] = {name: measure.where(work, device) for name, work in works.items()}
            measure.explain(done)
            numbers["cases"].append(done)
            label = f"training step, {dtype}, {batch} x {length}"
            card[label] = measure.short(done)
            measure.say(measure.line(label, done))
            for name, s in done["seconds"].items():
                medians.setdefault(name, []).append(s["median"] / ids.numel() * length)
        numbers["exponent"][dtype] = {
            name: measure.exponents(args.lengths, m) for name, m in medians.items() if len(m) == len(args.lengths)
        }
        if not args.no_memory:
            works = {"minimoe": {}} | ({"transformers": {"experts": theirs.chosen}} if theirs else {})
            added = memory.compare(works, work="train_step", folder=folder, batch=batch, length=length, dtype="float32",
                                   device=device, autocast=bfloat16)  # fmt: skip
            numbers["memory"][dtype] = {"batch": batch, "length": length, "added_bytes": added}
            measure.say(f"    memory beyond the loaded model at {batch} x {length}: {added}")
    measure.save("train_step", args, numbers, card, start)


def same_loss(ours: peers.Minimoe, theirs: peers.Transformers, ids: torch.Tensor, targets: torch.Tensor, dtype: str) -> float:
    """Relative difference of both losses. Stops the benchmark if it is more than rounding."""
    with torch.no_grad(), torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        a, b = float(ours.loss(ids, targets)), float(theirs.loss(ids, targets))
    if not abs(a - b) <= LOSS_TOLERANCE[dtype] * b:
        raise SystemExit(f"minimoe has loss {a}, transformers {b}: not the same model; a time would mean nothing")
    return abs(a - b) / b


if __name__ == "__main__":
    main()
