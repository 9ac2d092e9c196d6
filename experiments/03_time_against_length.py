"""How does time grow with length? One Mamba-2 layer, and the whole model.

    python experiments/03_time_against_length.py        about 2 minutes on one core

Writes results/03_time_against_length.json. CPU seconds of one thread, the lengths in turn within each repeat (so
that a change of the machine's pace meets all of them), median over repeats.

layer   one Mamba-2 layer of the "small" preset reads 2k to 16k tokens: in segments of 2k with the state carried,
        and in one pass; the operating system's share (finding and clearing memory) is kept apart
model   the whole "small" model reads 16k tokens in segments of 1k; seconds per token against the position
"""
from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch

from minimoe import HybridConfig, HybridLM
from minimoe.bench.report import write_result
from minimoe.layers import Mamba2

RESULT = Path(__file__).parents[1] / "results" / "03_time_against_length.json"
LENGTHS = (2048, 4096, 8192, 16_384)
SEGMENT, MODEL_SEGMENT, REPEATS = 2048, 1024, 7


def cpu_seconds(work) -> tuple[float, float]:
    """CPU seconds of the whole work, and the operating system's part of them."""
    start, before = time.process_time(), os.times().system
    work()
    return time.process_time() - start, os.times().system - before


def read(layer: Mamba2, x_BLD: torch.Tensor, segment: int) -> None:
    state = None
    for part in x_BLD.split(segment, 1):
        _, state = layer(part, state)


def slope(lengths: tuple[int, ...], seconds: list[float]) -> float:
    """Least-squares slope of log seconds against log length: 1 is linear, 2 quadratic."""
    x = torch.tensor(lengths, dtype=torch.float64).log()
    y = torch.tensor(seconds, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def layer_times(config: HybridConfig) -> dict:
    layer = Mamba2(config)
    x_BLD = torch.randn(1, max(LENGTHS), config.hidden_size)
    ways = {"segments": SEGMENT, "one_pass": max(LENGTHS)}
    seconds = {way: {length: [] for length in LENGTHS} for way in ways}
    read(layer, x_BLD[:, :SEGMENT], SEGMENT)  # the first call pays for set-up
    for _ in range(REPEATS):
        for length in LENGTHS:
            for way, segment in ways.items():
                seconds[way][length].append(cpu_seconds(lambda: read(layer, x_BLD[:, :length], segment)))
    out = {}
    for way, runs in seconds.items():
        total = [[both[0] for both in runs[length]] for length in LENGTHS]
        medians = [statistics.median(one) for one in total]
        out[way] = {
            "seconds": medians, "low": [min(one) for one in total], "high": [max(one) for one in total],
            "system": [statistics.median(both[1] for both in runs[length]) for length in LENGTHS],
            "slope": slope(LENGTHS, medians),
        }  # fmt: skip
    return {"lengths": list(LENGTHS), "segment": SEGMENT, "repeats": REPEATS, **out}


def model_times(config: HybridConfig) -> dict:
    model = HybridLM(config)
    ids = torch.randint(0, config.vocab_size, (1, max(LENGTHS)))
    parts = ids.split(MODEL_SEGMENT, 1)
    runs = [[] for _ in parts]
    for repeat in range(REPEATS + 1):  # the first, with its set-up, is dropped
        state = None
        for i, part in enumerate(parts):
            start = time.process_time()
            state = model(part, state, last_only=True).state
            if repeat:
                runs[i].append((time.process_time() - start) / MODEL_SEGMENT)
    position = torch.arange(len(parts), dtype=torch.float64) * MODEL_SEGMENT + MODEL_SEGMENT / 2
    per_token = torch.tensor([statistics.median(run) for run in runs], dtype=torch.float64)
    b = float(((position - position.mean()) @ (per_token - per_token.mean())) / ((position - position.mean()) ** 2).sum())
    a = float(per_token.mean() - b * position.mean())
    residual = per_token - (a + b * position)
    r2 = 1 - float((residual**2).sum() / ((per_token - per_token.mean()) ** 2).sum())
    return {
        "position": position.tolist(), "seconds_per_token": per_token.tolist(),
        "low": [min(run) for run in runs], "high": [max(run) for run in runs],
        "a": a, "b": b, "r2": r2, "segment": MODEL_SEGMENT,
    }  # fmt: skip


def main() -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = HybridConfig.preset("small")
    with torch.no_grad():
        numbers = {"preset": "small", "threads": 1, "layer": layer_times(config), "model": model_times(config)}
    write_result(RESULT, numbers, time.perf_counter() - start)
    layer, model = numbers["layer"], numbers["model"]
    print(f"one Mamba-2 layer, 2k to 16k tokens: slope {layer['segments']['slope']:.3f} in segments of {SEGMENT}, "
          f"{layer['one_pass']['slope']:.3f} in one pass")
    print(f"whole model: {model['a'] * 1e6:.1f} us + {model['b'] * 1e9:.3f} ns x position per token, r2 {model['r2']:.3f}")
    print(RESULT)


if __name__ == "__main__":
    main()
