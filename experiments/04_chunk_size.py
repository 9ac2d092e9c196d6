"""Which chunk size is fastest, and could one have known?

    python experiments/04_chunk_size.py        about 1 minute on one core

Writes results/04_chunk_size.json: CPU seconds of ssd_chunked on one thread at each chunk size, for three shapes,
beside two predictions made from the machine's measured rates before the scan is timed:

flops   floating-point operations only
bytes   operations, the bytes of the Q x Q decays, and the bytes of one state a chunk
"""
from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path

import torch

from minimoe.bench.report import write_result
from minimoe.bench.timing import in_turns, summary
from minimoe.layers.mamba2 import ssd_chunked

RESULT = Path(__file__).parents[1] / "results" / "04_chunk_size.json"
LENGTH, REPEATS = 2048, 7
CHUNKS = (8, 16, 32, 64, 128, 256, 512)
# heads, head dim, groups, state; the last is a Mamba-2 layer of Nemotron 3 Nano 30B
SHAPES = {"small": (8, 64, 2, 64), "medium": (32, 64, 4, 128), "nano-30b": (64, 64, 8, 128)}
# Passes over memory, counted in the code of ssd_chunked. A decay is written as a difference, clamped, exponentiated
# and multiplied by its score (a read and a write each), and read by the product with x: 1 + 3 * 2 + 1. A state is
# written by the product, passed on (two reads, a write), stacked (a read, a write) and read: 1 + 3 + 2 + 1.
DECAY_PASSES, STATE_PASSES = 8, 7


def rates() -> dict[str, float]:
    """Bytes a second of an element-wise pass, and FLOP/s of batched products as small as a chunk's."""
    x = torch.randn(2**24)
    y = torch.empty_like(x)
    passes = in_turns({"pass": lambda: torch.mul(x, 0.5, out=y)}, 9)["pass"]
    a, b = torch.randn(64, 64, 64), torch.randn(64, 64, 64)
    products = in_turns({"40 products": lambda: [a @ b for _ in range(40)]}, 9)["40 products"]
    return {
        "bytes_per_s": 2 * x.nbytes / statistics.median(passes),
        "flop_per_s": 40 * 64 * 2 * 64**3 / statistics.median(products),
    }


def flops(Q: int, H: int, P: int, G: int, N: int) -> float:
    """A token: scores 2QN a group, their product with x 2QP a head, writing and reading the state 4PN a head,
    and passing it on 2PN a head once a chunk."""
    return 2 * Q * N * G + 2 * Q * P * H + 4 * P * N * H + 2 * P * N * H / Q


def bytes_moved(Q: int, H: int, P: int, G: int, N: int) -> float:
    """A token: Q decays a head, and one state a chunk."""
    return 4 * (DECAY_PASSES * Q * H + STATE_PASSES * P * N * H / Q)


def main() -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    rate = rates()
    numbers: dict = {"length": LENGTH, "chunks": list(CHUNKS), "repeats": REPEATS, "threads": 1, "rates": rate,
                     "decay_passes": DECAY_PASSES, "state_passes": STATE_PASSES, "shapes": {}}
    for name, (H, P, G, N) in SHAPES.items():
        by_flops = [LENGTH * flops(Q, H, P, G, N) / rate["flop_per_s"] for Q in CHUNKS]
        by_bytes = [f + LENGTH * bytes_moved(Q, H, P, G, N) / rate["bytes_per_s"] for f, Q in zip(by_flops, CHUNKS)]
        x, dt = torch.randn(1, LENGTH, H, P), torch.rand(1, LENGTH, H) * 0.1
        A, Bmat, Cmat = -torch.rand(H) * 15 - 1, torch.randn(1, LENGTH, G, N), torch.randn(1, LENGTH, G, N)
        state = torch.zeros(1, H, P, N)
        given = x, dt, A, Bmat, Cmat, state
        times = summary(in_turns({Q: partial(ssd_chunked, *given, Q) for Q in CHUNKS}, REPEATS).values())
        measured = times["seconds"]
        numbers["shapes"][name] = {
            "heads": H, "head_dim": P, "groups": G, "state": N, **times,
            "predicted_flops": by_flops, "predicted_bytes": by_bytes,
            "best": CHUNKS[measured.index(min(measured))],
            "best_flops": CHUNKS[by_flops.index(min(by_flops))], "best_bytes": CHUNKS[by_bytes.index(min(by_bytes))],
        }  # fmt: skip
        shape = numbers["shapes"][name]
        print(f"{name}: best chunk {shape['best']} measured, {shape['best_flops']} from FLOPs, {shape['best_bytes']} with bytes")
        print("  ", [f"{Q}: {s * 1e3:.1f}" for Q, s in zip(CHUNKS, measured)], [f"{s * 1e3:.1f}" for s in by_bytes])
    print({k: f"{v:.3g}" for k, v in rate.items()})
    write_result(RESULT, numbers, time.perf_counter() - start)
    print(RESULT)


if __name__ == "__main__":
    with torch.no_grad():
        main()
