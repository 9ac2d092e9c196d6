"""How the benchmarks measure: one thread, flushed denormals, CPU time (a GPU: wall time after it has finished), all
programs in turn, medians with their spread; and where the time goes."""
from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from minimoe import HybridConfig
from minimoe.bench.device import MatmulRate, describe, measure_matmul, pick_device
from minimoe.bench.report import write_result
from minimoe.config import PRESETS
from minimoe.sizing import count_parameters

RESULTS = Path(__file__).parents[1] / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAST, MOST = 3, 15  # repeats; the time given decides between them
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest logit, at the median token
_BOUND = "the bound"
_MATMUL = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "matmul", "linear", "_grouped_mm", "mkldnn_linear"}


def parser(about: str, lengths: Sequence[int], dtypes: Sequence[str], shapes: Sequence[str]) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    p = argparse.ArgumentParser(description=about.splitlines()[0])
    p.add_argument("--preset", default="small", choices=sorted({*PRESETS, *shapes}))
    p.add_argument("--lengths", type=int, nargs="+", default=list(lengths), help="tokens a sequence")
    p.add_argument("--device", help="cpu, cuda, ... (default: CUDA if there is one)")
    p.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(dtypes))
    p.add_argument("--seconds", type=float, default=20.0, help=f"for each case, beyond {LEAST} repeats")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    return p


def options(p: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked; ``device`` becomes a torch device."""
    args = p.parse_args(argv)
    if min(args.lengths) < 1:
        p.error(f"--lengths {min(args.lengths)}: must be 1 or more")
    try:
        args.device = pick_device(args.device)
    except ValueError as error:
        p.error(str(error))
    args.lengths = sorted(set(args.lengths))
    return args


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """One thread, denormals flushed on all sides (long decays produce them), no TF32, no chatter; put back afterwards."""
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    disabled = logging.root.manager.disable
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.backends.cudnn.allow_tf32 = False
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
        torch.backends.cudnn.allow_tf32 = tf32
        logging.disable(disabled)


def clock(device: torch.device) -> Callable[[], float]:
    """CPU seconds of this process; with a GPU wall seconds, once it has nothing left to do."""
    if device.type == "cpu":
        return time.process_time

    def now() -> float:
        torch.accelerator.synchronize() if device.type != "cuda" else torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def in_turns(works: Mapping[str, Callable[[], float]], seconds: float) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Each work's seconds, one work after another within each repeat, and which failed, with the reason.

    A first round pays for set-up and is dropped; then LEAST to MOST repeats, as many as fit ``seconds`` of wall time.
    Only other programs may fail: an error of minimoe's is raised.
    """
    failed, left = {}, dict(works)
    for name, work in works.items():
        try:
            work()
        except Exception as error:
            if name == "minimoe":
                raise
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
            del left[name]
    runs: dict[str, list[float]] = {name: [] for name in left}
    start = time.perf_counter()
    for n in range(MOST):
        if n >= LEAST and time.perf_counter() - start > seconds:
            break
        for name, work in left.items():
            runs[name].append(work())
    return runs, failed


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


@dataclass(frozen=True)
class Bound:
    """What the device cannot do faster: ``work`` does ``does`` (FLOP or bytes) and nothing else; a case ``needs`` so many."""

    what: str
    needs: float
    does: float
    work: Callable[[], float]


def case(
    works: Mapping[str, Callable[[], float]], seconds: float, tokens: int, bound: Bound | None = None
) -> dict[str, Any]:
    """Time the works against each other, and against the bound, which takes its turn too.

    ratio   a program's seconds over minimoe's, repeat by repeat (above 1: minimoe is faster), with that of the two
            least beside
    share   of the bound's rate that each program reaches
    """
    runs, failed = in_turns(works if bound is None else {**works, _BOUND: bound.work}, seconds)
    pace = runs.pop(_BOUND, None)
    ours = runs["minimoe"]
    done: dict[str, Any] = {
        "tokens": tokens, "repeats": len(ours),
        "seconds": {name: spread(r) for name, r in runs.items()},
        "tokens_per_second": {name: tokens / statistics.median(r) for name, r in runs.items()},
        "ratio": {
            name: spread([b / a for a, b in zip(ours, r)]) | {"of_least": min(r) / min(ours)}
            for name, r in runs.items() if name != "minimoe"
        },
    }  # fmt: skip
    if bound and pace:
        rate = bound.does / statistics.median(pace)
        share = {name: bound.needs / statistics.median(r) / rate for name, r in runs.items()}
        done["bound"] = {"of": bound.what, "needs": bound.needs, "per_second": rate, "share": share}
    return done | ({"failed": failed} if failed else {})


def matmul_bound(needs: float, device: torch.device, dtype: str, now: Callable[[], float]) -> Bound | None:
    """FLOPs against square products of the size at which minimoe.bench.device finds this device fastest (None if it
    cannot multiply that dtype), by the clock of the programs: MFU, on a GPU."""
    found = _fastest_size(device, dtype)
    if found.n is None or found.flop_per_second is None:
        return None
    once = 2.0 * found.n**3
    calls = max(1, round(0.02 * found.flop_per_second / once))
    a, b = (torch.randn(found.n, found.n, device=device).to(DTYPES[dtype]) for _ in range(2))

    def work() -> float:
        start = now()
        for _ in range(calls):
            a @ b
        return now() - start

    return Bound(f"{dtype} matmul FLOP", needs, once * calls, work)


@functools.cache
def _fastest_size(device: torch.device, dtype: str) -> MatmulRate:
    return measure_matmul(device, DTYPES[dtype], seconds=0.5)


def reading_bound(needs: float, once: float, device: torch.device, now: Callable[[], float]) -> Bound:
    """Bytes against a matrix of ``once`` bytes times a vector: each number is read once. A small one may fit a cache, as
    the weights that it stands for may."""
    columns = 1024
    matrix = torch.ones(max(1, int(once) // 4 // columns), columns, device=device)
    vector = torch.ones(columns, device=device)
    calls = max(1, round(20e-3 * 1e10 / matrix.nbytes))  # about 20 ms at 10 GB/s

    def work() -> float:
        start = now()
        for _ in range(calls):
            matrix @ vector
        return now() - start

    return Bound("bytes", needs, float(matrix.nbytes * calls), work)


def agreement(ours: Tensor, theirs: Tensor, who: str, dtype: str) -> dict[str, float]:
    """Distance of two sets of logits [1, L, V], a token: largest difference over largest logit.

    Stops the benchmark if the median token differs by more than rounding does. A single token may: a router that is
    near a tie chooses another expert then.
    """
    distance = (ours - theirs).abs().amax(-1).flatten() / theirs.abs().max()
    found = {"median": float(distance.median()), "largest": float(distance.max())}
    if not found["median"] <= TOLERANCE[dtype]:
        raise SystemExit(f"{who} computes other logits than minimoe: {found}; a time would mean nothing")
    return found


def about(args: argparse.Namespace, config: HybridConfig, programs: Sequence[Any], missing: dict[str, str]) -> dict[str, Any]:
    """What was measured: sizes, device, versions, and which program is missing, with the reason."""
    count = count_parameters(config)
    return {
        "preset": args.preset, "parameters": count.total, "active": count.active_with_head,
        "device": describe(args.device)["device_name"] or str(args.device), "threads": torch.get_num_threads(),
        "clock": "CPU seconds" if args.device.type == "cpu" else "wall seconds",
        "versions": {p.name: p.version for p in programs if p}, "missing": missing,
    }  # fmt: skip


def where(work: Callable[[], object], device: torch.device) -> dict[str, float | int]:
    """Shares of the operators' own time, and how many calls there were. On a GPU also the share of the wall time in
    which it was busy; the rest is the program around it.

    torch.profiler counts wall time, its own included, so of three calls the one that nothing disturbed counts.
    """
    return min((_profiled(work, device) for _ in range(3)), key=lambda shares: shares[0])[1]


def _profiled(work: Callable[[], object], device: torch.device) -> tuple[float, dict[str, float | int]]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler prints when it starts and stops
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    start = time.perf_counter()
    with profile(activities=activities) as prof:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall = time.perf_counter() - start
    kinds = {"matmul": 0.0, "attention": 0.0, "convolution": 0.0, "optimizer": 0.0, "rest": 0.0}
    calls = 0
    for event in prof.key_averages():
        if not event.key.startswith("aten::"):  # kernels are counted with the operators that start them
            continue
        calls += event.count
        own = event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
        kinds[_kind(event.key.removeprefix("aten::"))] += own
    total = sum(kinds.values())
    if not total:  # no operator was seen: the device is one that this profiler cannot time
        return total, {"calls": calls}
    shares: dict[str, float | int] = {kind: own / total for kind, own in kinds.items()} | {"calls": calls}
    return total, shares if device.type == "cpu" else shares | {"device_busy": total * 1e-6 / wall}


def explain(done: dict[str, Any]) -> None:
    """Two numbers that multiply to a program's share of the bound of matrix products: the part of its time that it
    spends in them (and in attention), and ``products_at``, how near to the bound they run."""
    for name, shares in done.get("where", {}).items():
        inside = (shares.get("matmul", 0) + shares.get("attention", 0)) * shares.get("device_busy", 1)
        if "bound" in done and inside > 0:
            shares |= {"in_products": inside, "products_at": done["bound"]["share"][name] / inside}


def _kind(operator: str) -> str:
    if operator in _MATMUL:
        return "matmul"
    if "scaled_dot_product" in operator or "attention" in operator:
        return "attention"
    if "convolution" in operator or operator.startswith("conv"):
        return "convolution"
    return "optimizer" if "adam" in operator else "rest"


def exponents(lengths: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """Of time in length, from each length to the next: 1 is linear, 2 quadratic."""
    points = list(zip(lengths, seconds))
    return [math.log(t2 / t1) / math.log(n2 / n1) for (n1, t1), (n2, t2) in zip(points, points[1:])]


def line(label: str, done: Mapping[str, Any]) -> str:
    """One case for the terminal."""
    parts = []
    for name, s in done["seconds"].items():
        text = f"{name} {1e3 * s['median']:,.1f} ms, {done['tokens_per_second'][name]:,.0f} tokens/s"
        if "bound" in done:
            text += f", {done['bound']['share'][name]:.0%} of the bound"
        if name in done["ratio"]:
            text += ", ratio {median:.2f} ({low:.2f} to {high:.2f})".format(**done["ratio"][name])
        parts.append(text)
    parts += [f"{name}: {why}" for name, why in done.get("failed", {}).items()]
    return "\n    ".join([label, *parts])


def short(done: Mapping[str, Any]) -> str:
    """One case for a page's card."""
    share = done["bound"]["share"] if "bound" in done else {}
    rates = (f"{name} {rate:,.0f} tokens/s" + (f" ({share[name]:.0%} of the bound)" if share else "")
             for name, rate in done["tokens_per_second"].items())
    ratios = (f"{name} takes {r['median']:.2f} times as long ({r['low']:.2f} to {r['high']:.2f})"
              for name, r in done["ratio"].items())
    return "; ".join([*rates, *ratios])


def save(what: str, args: argparse.Namespace, numbers: dict[str, Any], card: dict[str, str], start: float) -> Path:
    """results/bench_WHAT_PRESET_DEVICE.json"""
    path = args.out / f"bench_{what}_{args.preset}_{args.device.type}.json"
    print(write_result(path, numbers, time.perf_counter() - start, card))
    return path


def say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
