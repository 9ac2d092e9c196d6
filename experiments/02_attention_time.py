"""How does the time of one attention layer grow with length?

    python experiments/02_attention_time.py        about 5 minutes on one core

Writes results/02_attention_time.json. CPU seconds of one thread, float32, the lengths in turn within each repeat (so
that a change of the machine's pace meets all of them), median with least and greatest over repeats.

prefill   one call over L tokens, for the attention layer of the "small" preset and for that of Nemotron 3 Nano 30B;
          beside it the layer's floating-point operations at the machine's measured rate, and a fit a + b L + c L^2
decode    the attention of one new token over L keys with Nano's heads (no projections), in two ways that give the
          same numbers, and with as many key heads as query heads; beside them the bytes of the shared keys and
          values at the machine's measured bandwidth

          separate     a key head for each query head: nothing is shared
          enable_gqa   F.scaled_dot_product_attention with the query heads as they are
          folded       the query heads that share a key head as rows of one matrix
"""
from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minimoe import HybridConfig, catalog
from minimoe.bench.report import write_result
from minimoe.bench.timing import in_turns, summary
from minimoe.layers import Attention

RESULT = Path(__file__).parents[1] / "results" / "02_attention_time.json"
# lengths and repeats
PREFILL = {
    "small": ((256, 512, 1024, 2048, 4096, 8192, 16_384), 9),
    "nano-30b": ((512, 1024, 2048, 4096, 8192, 16_384), 5),
}
POSITIONS, STEPS, DECODE_REPEATS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536), 4, 9


def least_seconds(work) -> float:
    return min(in_turns({"work": work}, 15)["work"])


def rates() -> dict[str, float]:
    """The best seen, for the bounds: FLOP/s of a float32 matrix product, bytes a second of a matrix times a vector."""
    flop = 0.0
    for n in (512, 1024, 2048):
        a, b = torch.randn(n, n), torch.randn(n, n)
        flop = max(flop, 2 * n**3 / least_seconds(lambda: a @ b))
    matrix, vector = torch.randn(16_384, 4096), torch.randn(4096)
    return {"flop_per_s": flop, "bytes_per_s": matrix.nbytes / least_seconds(lambda: matrix @ vector)}


def flops(c: HybridConfig, length: int) -> tuple[float, float]:
    """Of one call over ``length`` tokens: the projections, and the scores with their mixing (half: causal)."""
    H, G, P, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size
    return 2 * D * (2 * H + 2 * G) * P * length, 4 * H * P * length**2 / 2


def fit(x: tuple[int, ...], y: list[float], degree: int) -> list[float]:
    """Least squares in relative error: coefficients of 1, x, x^2, ... up to ``degree``."""
    rows = np.stack([np.power(np.array(x, float), k) for k in range(degree + 1)], 1) / np.array(y)[:, None]
    scale = np.linalg.norm(rows, axis=0)
    return (np.linalg.lstsq(rows / scale, np.ones(len(y)), rcond=None)[0] / scale).tolist()


def prefill(config: HybridConfig, lengths: tuple[int, ...], repeats: int, flop_per_s: float) -> dict:
    layer = Attention(config)
    x_BLD = torch.randn(1, max(lengths), config.hidden_size)
    runs = in_turns({length: partial(layer, x_BLD[:, :length]) for length in lengths}, repeats)
    out = summary(runs.values())
    crossings = []
    for i in range(repeats):
        _, b, c = fit(lengths, [runs[length][i] for length in lengths], 2)
        crossings.append(b / c)
    return {
        "hidden_size": config.hidden_size, "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads, "head_dim": config.head_dim, "lengths": list(lengths),
        "repeats": repeats, **out, "fit": fit(lengths, out["seconds"], 2), "crossings": crossings,
        "predicted": [sum(flops(config, length)) / flop_per_s for length in lengths],
    }  # fmt: skip


def decode(config: HybridConfig, bytes_per_s: float) -> dict:
    H, G, P = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q_BHLP = torch.randn(1, H, 1, P)
    k_BGSP, v_BGSP = torch.randn(2, 1, G, max(POSITIONS), P)
    own_BHSP = torch.randn(2, 1, H, max(POSITIONS), P)
    ways = {
        "separate": lambda k, v: F.scaled_dot_product_attention(q_BHLP, *own_BHSP[:, :, :, : k.shape[2]]),
        "enable_gqa": lambda k, v: F.scaled_dot_product_attention(q_BHLP, k, v, enable_gqa=True),
        "folded": lambda k, v: F.scaled_dot_product_attention(q_BHLP.view(1, G, H // G, P), k, v),
    }

    def steps(way: str, n: int) -> None:
        for _ in range(STEPS):
            ways[way](k_BGSP[:, :, :n], v_BGSP[:, :, :n])

    runs = in_turns({(way, n): partial(steps, way, n) for n in POSITIONS for way in ways}, DECODE_REPEATS)
    times = {way: summary([s / STEPS for s in runs[way, n]] for n in POSITIONS) for way in ways}
    kv = 2 * G * P * 4
    return {
        "positions": list(POSITIONS), "repeats": DECODE_REPEATS, "steps": STEPS, "kv_bytes_per_token": kv,
        "predicted": [kv * n / bytes_per_s for n in POSITIONS],
        **{way: t | {"fit": fit(POSITIONS, t["seconds"], 1)} for way, t in times.items()},
    }  # fmt: skip


def main() -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    nano = catalog.model("nemotron-3-nano-30b-a3b").config
    configs = {"small": HybridConfig.preset("small"), "nano-30b": nano}
    rate = rates()
    numbers: dict = {"threads": 1, "dtype": "float32", "rates": rate, "prefill": {}}
    for name, (lengths, repeats) in PREFILL.items():
        numbers["prefill"][name] = shape = prefill(configs[name], lengths, repeats, rate["flop_per_s"])
        crossing = sorted(shape["crossings"])
        print(f"{name}: linear and quadratic part equal at {shape['fit'][1] / shape['fit'][2]:,.0f} tokens "
              f"({crossing[0]:,.0f} to {crossing[-1]:,.0f})")
        print("  ", [f"{n}: {s:.4f}/{p:.4f}" for n, s, p in zip(lengths, shape["seconds"], shape["predicted"])])
    numbers["decode"] = shape = decode(nano, rate["bytes_per_s"])
    for way in ("separate", "enable_gqa", "folded"):
        print(f"one token, {way}: {shape[way]['fit'][1] * 1e6:.3f} ms per 1,000 tokens of context")
        print("  ", [f"{n}: {s * 1e3:.2f}/{p * 1e3:.2f}"
                     for n, s, p in zip(POSITIONS, shape[way]["seconds"], shape["predicted"])])
    print({k: f"{v:.3g}" for k, v in rate.items()})
    write_result(RESULT, numbers, time.perf_counter() - start)
    print(RESULT)


if __name__ == "__main__":
    with torch.no_grad():
        main()
