"""Three forms of one function: how does their time grow with length?

    python experiments/04_three_forms.py        about 3 minutes on one core, 5 GiB of memory

Writes results/04_three_forms.json: CPU seconds of one thread. Within each repeat the forms take turns, so that a
change of the machine's pace meets all of them; median, least and greatest over repeats.

recurrence   ssd_recurrent, token by token
attention    ssd_chunked with the whole length as its one chunk: masked attention
chunks       ssd_chunked in chunks of 64

forward      lengths 1 to 8,192, one group of a Mamba-2 layer of Nemotron 3 Nano 30B (8 of its 64 heads)
layer        2,048 tokens, all 64 heads; recurrence and chunks
training     2,048 tokens, one group, forward and backward, and the bytes that autograd keeps between the two
matmul       FLOP/s of a 1,024 x 1,024 product: what the chunks' products could reach at best
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minimoe import catalog
from minimoe.bench.report import write_result
from minimoe.bench.timing import in_turns, summary
from minimoe.layers import ssd_chunked, ssd_recurrent

RESULT = Path(__file__).parents[1] / "results" / "04_three_forms.json"
MODEL, CHUNK, LENGTH, REPEATS = "nemotron-3-nano-30b-a3b", 64, 2048, 7
LENGTHS = tuple(2**k for k in range(14))
LEAST = 0.005  # seconds that a sample lasts

FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "recurrence": ssd_recurrent,
    "attention": lambda *inputs: ssd_chunked(*inputs, chunk_size=inputs[0].shape[1]),
    "chunks": lambda *inputs: ssd_chunked(*inputs, chunk_size=CHUNK),
}


def inputs(length: int, groups: int) -> list[Tensor]:
    """Random inputs for the heads of ``groups`` groups: x, dt, A, Bmat, Cmat and an empty state."""
    config = catalog.model(MODEL).config
    H, P, N = groups * config.mamba_num_heads // config.n_groups, config.mamba_head_dim, config.ssm_state_size
    return [
        torch.randn(1, length, H, P), torch.rand(1, length, H) * config.time_step_max, -torch.rand(H) * 15 - 1,
        torch.randn(1, length, groups, N), torch.randn(1, length, groups, N), torch.zeros(1, H, P, N),
    ]  # fmt: skip


def train(form: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor]) -> int:
    """One forward and backward pass; returns the bytes that autograd kept for the backward one, inputs included."""
    leaves = [t.clone().requires_grad_() for t in tensors[:-1]]
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = form(*leaves, tensors[-1])
    y.backward(torch.ones_like(y))
    return sum(kept.values())


def main() -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    runs: dict[str, list[list[float]]] = {name: [] for name in FORMS}
    for length in LENGTHS:
        given = inputs(length, 1)
        for name, r in in_turns({n: lambda f=f: f(*given) for n, f in FORMS.items()}, REPEATS, LEAST).items():
            runs[name].append(r)
        print(length, {name: f"{statistics.median(r[-1]) * 1e3:.3g} ms" for name, r in runs.items()}, flush=True)
    numbers: dict = {
        "model": MODEL, "chunk": CHUNK, "threads": 1, "repeats": REPEATS, "lengths": list(LENGTHS),
        "forward": {name: summary(r) for name, r in runs.items()},
    }  # fmt: skip

    given = inputs(LENGTH, 8)
    layer = in_turns({n: lambda f=FORMS[n]: f(*given) for n in ("recurrence", "chunks")}, 5, LEAST)
    numbers["layer"] = {"length": LENGTH} | {name: summary([r]) for name, r in layer.items()}

    given = inputs(LENGTH, 1)
    kept = {name: train(form, given) for name, form in FORMS.items()}
    training = in_turns({n: lambda f=f: train(f, given) for n, f in FORMS.items()}, 5, LEAST)
    numbers["training"] = {"length": LENGTH} | {name: summary([r]) | {"kept_bytes": kept[name]} for name, r in training.items()}

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    product = in_turns({"product": lambda: a @ b}, REPEATS, LEAST)["product"]
    numbers["matmul_flop_per_s"] = 2 * 1024**3 / statistics.median(product)

    write_result(RESULT, numbers, time.perf_counter() - start)
    for what in ("layer", "training"):
        print(what, {name: f"{d['seconds'][0]:.3g} s" for name, d in numbers[what].items() if name != "length"})
    print("kept", {name: f"{b / 2**20:.0f} MiB" for name, b in kept.items()})
    print(f"matmul {numbers['matmul_flop_per_s']:.3g} FLOP/s")
    print(RESULT)


if __name__ == "__main__":
    with torch.no_grad():
        main()
