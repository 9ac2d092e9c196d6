"""How far below the roof are a model's own blocks?

    python experiments/16_roofline.py [--device cuda] [--quick]        2 to 6 minutes on one core, 8 GiB of memory

Writes results/16_roofline.json (16_roofline_cuda.json on a GPU; --quick: into a temporary folder, fewer repeats and a
smaller wide model). CPU seconds of one thread in float32; on a GPU wall seconds to the end of the work, in bfloat16.

roofs      bytes/s of reading, from memory (a buffer of four times the largest cache, at least 256 MiB) and from where
           as many bytes lie as a token of ``small`` has at work; FLOP/s of a large matrix product
product    one n x n matrix times 1 to 512 columns
points     each kind of block of ``small`` and of Nemotron 3 Nano 30B, reading one token after 512 others (decode) and
           512 tokens at once (prefill), with FLOPs and bytes from minimoe.sizing

What is timed against each other takes turns, and so do the readings of the roofs: a share of the roof is that of its
own repeat. Blocks are copied until the copies fill the buffer of their roof, and called in turn, so that weights come
from where the roof was measured, and not from a smaller cache.
"""
from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe import HybridConfig, catalog
from minimoe.bench.device import pick_device
from minimoe.bench.host import last_level_cache_bytes
from minimoe.bench.report import write_result
from minimoe.bench.timing import in_turns, summary
from minimoe.catalog import as_spec
from minimoe.layers import Attention, Mamba2, MoE
from minimoe.sizing import block_work, count_parameters

RESULTS = Path(__file__).parents[1] / "results"
WIDE, TOKENS, CONTEXT, LEAST = "nemotron-3-nano-30b-a3b", 512, 512, 0.03
COLUMNS = tuple(2**k for k in range(10))
LAYERS: dict[str, tuple[type, type[nn.Module]]] = {
    "mamba2": (catalog.Mamba2, Mamba2), "attention": (catalog.Attention, Attention), "moe": (catalog.MoE, MoE),
}  # fmt: skip


class Bench:
    """One device: how its works take turns, and the two roofs that take theirs among them."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        n = 1024 if device.type == "cpu" else 8192
        self.square = self.fill(torch.empty(n, n))
        self.rates: dict[str, list[list[float]]] = {"memory": [], "cache": [], "flops": []}

    def fill(self, like: Tensor | nn.Module) -> Any:
        """On the device, in its dtype, full of small random numbers: pages that nobody wrote have no memory behind."""
        like = like.to(self.device, self.dtype)
        for tensor in like.parameters() if isinstance(like, nn.Module) else [like]:
            tensor.uniform_(-0.02, 0.02)
        return like

    def turns(self, works: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """:func:`~minimoe.bench.timing.in_turns`; a GPU's work is not CPU time, so there by the clock, to its end."""
        if self.device.type == "cpu":
            return in_turns(works, self.repeats, LEAST)

        def seconds(work: Callable[[], object], calls: int) -> float:
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(calls):
                work()
            torch.cuda.synchronize(self.device)
            return (time.perf_counter() - start) / calls

        calls = {}
        for name, work in works.items():
            seconds(work, 3)
            calls[name] = max(1, round(LEAST / max(seconds(work, 1), 1e-5)))
        runs: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self.repeats):
            for name, work in works.items():
                runs[name].append(seconds(work, calls[name]))
        return runs

    def against(self, roof: str, pool: int, works: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of the works, with reading ``pool`` bytes and a large product in the same turns.

        Adds "bytes" and "flops": the two roofs in each repeat, as rates. Of two kernels that read, the faster counts.
        """
        columns = 4096
        matrix = self.fill(torch.empty(max(1, pool // (columns * self.dtype.itemsize)), columns))
        vector = self.fill(torch.empty(columns))
        own = {
            "sum": lambda: matrix.sum(), "matvec": lambda: matrix @ vector, "matmul": lambda: self.square @ self.square,
        }  # fmt: skip
        runs = self.turns({**own, **works})
        read = min((runs.pop(name) for name in ("sum", "matvec")), key=statistics.median)
        runs["bytes"] = [matrix.nbytes / s for s in read]
        runs["flops"] = [2 * len(self.square) ** 3 / s for s in runs.pop("matmul")]
        self.rates[roof].append(runs["bytes"])
        self.rates["flops"].append(runs["flops"])
        return runs


def work_of(config: HybridConfig, kind: str, tokens: int, context: int, size: int) -> tuple[float, float]:
    """FLOPs and bytes of one block that reads ``tokens`` tokens after ``context`` others; of the head, of one token."""
    d, V = config.hidden_size, config.vocab_size
    if kind == "head":
        return 2.0 * d * V, float(size * (d * V + d + V))
    block = next(b for b in as_spec(config).blocks if isinstance(b, LAYERS[kind][0]))
    work = block_work(block, d, tokens, context, bytes_per_number=size)
    return work.flops, work.bytes


def works_of(bench: Bench, config: HybridConfig, kind: str, pool: int) -> tuple[dict[str, Callable[[], object]], int]:
    """A call of the next copy for each phase, and how many copies there are."""
    d = config.hidden_size

    def make() -> nn.Module:
        return bench.fill(nn.Linear(d, config.vocab_size, bias=False) if kind == "head" else LAYERS[kind][1](config))

    layers = [make()]
    size = sum(p.nbytes for p in layers[0].parameters())
    layers += [make() for _ in range(-(-pool // size) - 1)]
    prompt_BLD = torch.randn(1, TOKENS, d, device=bench.device, dtype=bench.dtype)
    # one token after another, or a router would choose the same experts each time and keep them in a cache
    tokens = itertools.cycle(torch.randn(64, 1, 1, d, device=bench.device, dtype=bench.dtype))
    turn = itertools.cycle(range(len(layers)))
    if kind in ("head", "moe"):
        works = {"decode": lambda: layers[next(turn)](next(tokens))}
        if kind == "moe":
            works["prefill"] = lambda: layers[next(turn)](prompt_BLD)
        return works, len(layers)
    context_BLD = torch.randn(1, CONTEXT, d, device=bench.device, dtype=bench.dtype)
    states = [layer(context_BLD)[1] for layer in layers]

    def decode() -> None:
        i = next(turn)
        _, states[i] = layers[i](next(tokens), states[i])  # going on, because writing behind an old state copies it

    return {"decode": decode, "prefill": lambda: layers[next(turn)](prompt_BLD)}, len(layers)


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def point(bench: Bench, runs: dict[str, list[float]], phase: str, flops: float, moved: float) -> dict[str, Any]:
    """One point: seconds with their spread, and the share of the roof, repeat by repeat."""
    bounds = [max(flops / f, moved / b) for f, b in zip(runs["flops"], runs["bytes"])]
    shares = [bound / s for bound, s in zip(bounds, runs[phase])]
    return {
        "flops": flops, "bytes": moved, **{key: value[0] for key, value in summary([runs[phase]]).items()},
        "bound": statistics.median(bounds), "share": spread(shares),
    }  # fmt: skip


def products(bench: Bench, pool: int) -> dict[str, Any]:
    """A matrix times more and more columns."""
    n = 4096
    size = n * n * bench.dtype.itemsize
    matrices = [bench.fill(torch.empty(n, n)) for _ in range(-(-pool // size))]
    turn = itertools.cycle(matrices)
    inputs = {b: torch.randn(b, n, device=bench.device, dtype=bench.dtype) for b in COLUMNS}
    runs = bench.against("memory", pool, {str(b): lambda x=x: F.linear(x, next(turn)) for b, x in inputs.items()})
    moved = [size + 2 * b * n * bench.dtype.itemsize for b in COLUMNS]
    points = [point(bench, runs, str(b), 2.0 * n * n * b, m) for b, m in zip(COLUMNS, moved)]
    return {"n": n, "columns": list(COLUMNS)} | {key: [p[key] for p in points] for key in points[0]}


def card_of(numbers: dict[str, Any]) -> dict[str, str | float]:
    """What a page shows in the place of a reader's own measurement: the roofs, and each kind of block below them."""
    memory, cache, flops = (numbers["rates"][name]["median"] for name in ("memory", "cache", "flops"))
    card: dict[str, str | float] = {
        "reading memory [GB/s]": round(memory / 1e9, 1), "reading what fits a cache [GB/s]": round(cache / 1e9, 1),
        f"matrix product, {numbers['dtype']} [GFLOP/s]": round(flops / 1e9),
        "ridge [FLOP/byte]": round(flops / memory, 1),
    }  # fmt: skip
    for p in numbers["points"]:
        if p["kind"] == "mamba2":
            tokens = "one token" if p["phase"] == "decode" else f"{numbers['tokens']} tokens"
            what = f"Mamba-2 of {p['model'].removeprefix('nemotron-3-')}, {tokens}"
            card[what] = f"{p['flops'] / p['seconds'] / 1e9:.3g} GFLOP/s, {p['share']['median']:.0%} of the roof"
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="prove that it runs: nothing under results/ changes")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    bench = Bench(pick_device(args.device), 3 if args.quick else 9)
    small = HybridConfig.preset("small")
    wide = HybridConfig.preset("base-12gb") if args.quick else catalog.model(WIDE).config
    pools = {
        "memory": max(256 << 20, 4 * (last_level_cache_bytes() or 0)) if bench.device.type == "cpu" else 1 << 30,
        "cache": count_parameters(small).active_with_head * bench.dtype.itemsize,
    }
    numbers: dict[str, Any] = {
        "dtype": str(bench.dtype).removeprefix("torch."), "threads": 1, "repeats": bench.repeats, "tokens": TOKENS,
        "context": CONTEXT, "buffer_bytes": pools, "product": products(bench, pools["memory"]), "points": [],
    }  # fmt: skip
    print("columns", {b: f"{s * 1e3:.1f} ms" for b, s in zip(COLUMNS, numbers["product"]["seconds"])}, flush=True)
    for config, name, roof in ((small, "small", "cache"), (wide, "base-12gb" if args.quick else WIDE, "memory")):
        for kind in (*LAYERS, "head"):
            works, copies = works_of(bench, config, kind, pools[roof])
            runs = bench.against(roof, pools[roof], works)
            for phase in works:
                new, before = (1, CONTEXT) if phase == "decode" else (TOKENS, 0)
                flops, moved = work_of(config, kind, new, before, bench.dtype.itemsize)
                found = point(bench, runs, phase, flops, moved)
                about = {"model": name, "kind": kind, "phase": phase, "roof": roof, "copies": copies}
                numbers["points"].append(about | found)
                print(f"{name} {kind} {phase}: {found['seconds'] * 1e3:.2f} ms, {flops / moved:.2f} FLOP/byte, "
                      f"{found['share']['median']:.0%} of the roof", flush=True)  # fmt: skip
            del works
    numbers["rates"] = {name: spread(itertools.chain(*found)) for name, found in bench.rates.items()}
    card = card_of(numbers)
    print(card)
    folder = Path(tempfile.mkdtemp()) if args.quick else RESULTS
    name = "16_roofline.json" if bench.device.type == "cpu" else f"16_roofline_{bench.device.type}.json"
    print(write_result(folder / name, numbers, time.perf_counter() - start, card))


if __name__ == "__main__":
    with torch.no_grad():
        main()
