"""Reading a prompt beside transformers and llama.cpp: the same weights, logits of the last token.

    python benchmarks/prefill.py [--preset small] [--lengths 256 1024 4096] [--device cpu] [--dtype float32]

minimoe and transformers read the prompt in one call, llama.cpp in its batches of 512; "minimoe in parts" are the calls
that ``minimoe.generate`` makes for longer prompts. Writes results/bench_prefill_PRESET_DEVICE.json.
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
from arithmetic import forward_flops

from minimoe.generation import PREFILL_TOKENS

CHECKED = 64  # tokens whose logits are compared


def main(argv: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__, (256, 1024, 4096), ("float32",), list(peers.SHAPES))
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    args = measure.options(parser, argv)
    with measure.settings():
        run(args)


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    config, device, clock = peers.shape(args.preset), args.device, measure.clock(args.device)
    numbers: dict[str, Any] = {"cases": [], "exponent": {}, "memory": {}}
    card: dict[str, str] = {}
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory() as folder:
            peers.write_weights(config, Path(folder), measure.DTYPES[dtype])
            ours, theirs, missing = peers.pair(Path(folder), device, measure.DTYPES[dtype], clock)
            llama = peers.llama(Path(folder), device, measure.DTYPES[dtype], clock, max(args.lengths) + 1, missing)
            numbers |= measure.about(args, config, [ours, theirs, llama], numbers.get("missing", {}) | missing)
            row = torch.randint(0, config.vocab_size, (1, max(args.lengths)), device=device)
            numbers.setdefault("agreement", {})[dtype] = peers.compare(ours, [theirs, llama], row[:, :CHECKED], dtype)
            medians: dict[str, list[float]] = {}
            for length in args.lengths:
                ids, about = row[:, :length], {"dtype": dtype, "length": length}
                if theirs and length == args.lengths[0]:
                    theirs, about["choice"] = peers.choose(theirs, config, length, lambda: theirs.prefill(ids), missing)
                    numbers["missing"] |= missing
                if theirs:
                    about["experts"] = theirs.experts
                works = {p.name: lambda p=p: p.prefill(ids) for p in (ours, theirs, llama) if p}
                if length > PREFILL_TOKENS:
                    works["minimoe in parts"] = lambda: ours.prefill_in_parts(ids)
                bound = measure.matmul_bound(forward_flops(config, 1, length, heads=1), device, dtype, clock)
                done = about | measure.case(works, args.seconds, length, bound)
                if length == args.lengths[0]:
                    done["where"] = {p.name: measure.where(works[p.name], device) for p in (ours, theirs) if p}
                measure.explain(done)
                numbers["cases"].append(done)
                label = f"prompt, {dtype}, {length}"
                card[label] = measure.short(done)
                measure.say(measure.line(label, done))
                for name, s in done["seconds"].items():
                    medians.setdefault(name, []).append(s["median"])
            numbers["exponent"][dtype] = {
                name: measure.exponents(args.lengths, m) for name, m in medians.items() if len(m) == len(args.lengths)
            }
            measure.say(f"    exponents of time in length: {numbers['exponent'][dtype]}")
            if not args.no_memory:
                works = {"minimoe": {}} | ({"transformers": {"experts": theirs.chosen}} if theirs else {})
                added = memory.compare(works, work="prefill", folder=Path(folder), batch=1, length=length, dtype=dtype,
                                       device=device)  # fmt: skip
                numbers["memory"][dtype] = {"length": length, "added_bytes": added}
                measure.say(f"    memory beyond the loaded model at {length}: {added}")
    measure.save("prefill", args, numbers, card, start)


if __name__ == "__main__":
    main()
