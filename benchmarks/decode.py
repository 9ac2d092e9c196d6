"""Writing token after token beside transformers and llama.cpp, and reading several guesses at once.

    python benchmarks/decode.py [--preset small] [--lengths 256 1024 4096] [--device cpu] [--dtype float32]

decode    greedy tokens after a context of each length, by bare calls of the model; the context is not counted
generate  each program's own ``generate``, from a prompt of one token: what its users wait for
verify    minimoe's pass over 2, 4 and 8 guesses after the first length, which speculation needs, against one token

The bound is memory: a token reads each weight that is at work on it, and the state. A pass of PyTorch is also several
hundred calls of operators, which "where" counts; llama.cpp has none of them. --compile measures minimoe under
torch.compile too, at the first length. Writes results/bench_decode_PRESET_DEVICE.json.
"""
from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import peers
import torch
from arithmetic import decoding_bytes

CHECKED, GUESSES = 64, (1, 2, 4, 8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__, (256, 1024, 4096), ("float32",), list(peers.SHAPES))
    parser.add_argument("--tokens", type=int, default=32, help="to decode")
    parser.add_argument("--compile", action="store_true", help="also minimoe under torch.compile, at the first length")
    args = measure.options(parser, argv)
    with measure.settings():
        run(args)


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    config, device, clock = peers.shape(args.preset), args.device, measure.clock(args.device)
    numbers: dict[str, Any] = {"cases": [], "generate": [], "verify": []}
    card: dict[str, str] = {}

    def add(kind: str, label: str, done: dict[str, Any]) -> None:
        numbers[kind].append(done)
        card[label] = measure.short(done)
        measure.say(measure.line(label, done))

    for dtype in args.dtype:
        with tempfile.TemporaryDirectory() as folder:
            peers.write_weights(config, Path(folder), measure.DTYPES[dtype])
            ours, theirs, missing = peers.pair(Path(folder), device, measure.DTYPES[dtype], clock)
            room = max(max(args.lengths), CHECKED) + 2 * args.tokens + 1
            llama = peers.llama(Path(folder), device, measure.DTYPES[dtype], clock, room, missing)
            numbers |= measure.about(args, config, [ours, theirs, llama], numbers.get("missing", {}) | missing)
            row = torch.randint(0, config.vocab_size, (1, max(args.lengths)), device=device)
            numbers.setdefault("agreement", {})[dtype] = peers.compare(ours, [theirs, llama], row[:, :CHECKED], dtype)
            for length in args.lengths:
                ids, about = row[:, :length], {"dtype": dtype, "context": length}
                if theirs and length == args.lengths[0]:
                    work = theirs.decoder(ids, args.tokens)
                    theirs, about["choice"] = peers.choose(theirs, config, 1, work, missing)
                    numbers["missing"] |= missing
                if theirs:
                    about["experts"] = theirs.experts
                programs = [p for p in (ours, theirs, llama) if p]
                works = {p.name: p.decoder(ids, args.tokens) for p in programs}
                if args.compile and length == args.lengths[0]:
                    compiled = peers.Minimoe(Path(folder), device, measure.DTYPES[dtype], clock, compiled=True)
                    run_compiled = lambda: compiled.decoder(ids, args.tokens)()  # noqa: E731
                    if seconds := peers.first_run(run_compiled, compiled.name, missing):
                        works[compiled.name], about["compile_s"] = compiled.decoder(ids, args.tokens), seconds
                    numbers["missing"] |= missing
                size = decoding_bytes(config, length, dtype)
                bound = measure.reading_bound(size * args.tokens, size, device, clock)
                done = about | measure.case(works, args.seconds, args.tokens, bound)
                if length == args.lengths[0]:
                    done["where"] = {p.name: measure.where(works[p.name], device) for p in (ours, theirs) if p}
                add("cases", f"decoding, {dtype}, after {length}", done)
            works = {p.name: lambda p=p: p.generate(row[:, :1], 2 * args.tokens) for p in programs}
            add("generate", f"generate, {dtype}", {"dtype": dtype} | measure.case(works, args.seconds, 2 * args.tokens))
            done = {"dtype": dtype, "context": args.lengths[0]} | verify(ours, row[:, : args.lengths[0]], args.seconds)
            numbers["verify"].append(done)
            card[f"pass over guesses, {dtype}, after {args.lengths[0]}"] = text = "; ".join(
                f"{n} tokens: {ratio['median']:.2f} times one" for n, ratio in zip(done["tokens"], done["to_one"])
            )
            measure.say(f"pass over guesses, {dtype}: {text}")
    measure.save("decode", args, numbers, card, start)


def verify(ours: peers.Minimoe, ids: torch.Tensor, seconds: float) -> dict[str, Any]:
    """A pass over each number of GUESSES after ``ids``, and its time over that of one token, repeat by repeat."""
    sizes = [n for n in GUESSES if n <= ids.shape[1]]
    works: dict[str, Callable[[], float]] = {str(n): ours.verifier(ids, n, calls=8) for n in sizes}
    runs, _ = measure.in_turns({"minimoe": works.pop("1")} | works, seconds / 4)
    one, *several = runs.values()
    return {
        "tokens": sizes[1:], "repeats": len(one), "one_s": statistics.median(one),
        "seconds": [statistics.median(r) for r in several],
        "to_one": [measure.spread([b / a for a, b in zip(one, r)]) for r in several],
    }  # fmt: skip


if __name__ == "__main__":
    main()
