"""minimoe beside transformers' NemotronHForCausalLM: the same weights, one process, one thread, in turn.

    python benchmarks/against_transformers.py [--preset small]        about a minute on one core

Prints CPU seconds and ratios (above 1: minimoe is faster) and writes results/bench_transformers.json. transformers
runs with the fastest of its expert implementations, chosen here by timing them; its optional CUDA kernels are not
part of the comparison. Denormals are flushed on both sides, as long decays produce them on both.
"""
from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from minimoe import HybridConfig, HybridLM
from minimoe.bench.report import write_result
from minimoe.bench.timing import cpu_seconds, in_turns
from minimoe.interop import save_hf

RESULT = Path(__file__).parents[1] / "results" / "bench_transformers.json"
REPEATS = 7
DECODED = 48


def side_by_side(ours: Callable[[], object], theirs: Callable[[], object]) -> dict[str, float]:
    """Medians of both and the ratio, repeat by repeat in turn."""
    a, b = in_turns({"minimoe": ours, "transformers": theirs}, REPEATS).values()
    ratios = [y / x for x, y in zip(a, b)]
    return {
        "minimoe_s": statistics.median(a), "transformers_s": statistics.median(b),
        "ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios),
    }  # fmt: skip


def peer(model: HybridLM) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder) / "model")
        return AutoModelForCausalLM.from_pretrained(Path(folder) / "model").eval()


def fastest_experts(model: torch.nn.Module, ids: torch.Tensor) -> str:
    """The expert implementation of transformers that reads ``ids`` in the least CPU time."""
    seconds = {}
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        with torch.no_grad():
            seconds[name] = min(cpu_seconds(lambda: model(input_ids=ids, use_cache=False)) for _ in range(2))
    best = min(seconds, key=seconds.__getitem__)
    model.set_experts_implementation(best)
    return best


def measure(config: HybridConfig) -> dict:
    ours = HybridLM(config)
    theirs = peer(ours)
    batch, row = (torch.randint(0, config.vocab_size, shape) for shape in ((4, 256), (1, 1024)))
    numbers: dict = {"experts": fastest_experts(theirs, batch)}
    with torch.no_grad():
        a, b = ours(batch).logits, theirs(input_ids=batch, use_cache=False).logits
    numbers["largest_difference"] = float((a - b).abs().max() / b.abs().max())

    def train_ours() -> None:
        ours.zero_grad()
        ours.loss(batch, batch).backward()

    def train_theirs() -> None:
        theirs.zero_grad()
        logits = theirs(input_ids=batch, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), batch.flatten()).backward()

    numbers["train_4x256"] = side_by_side(train_ours, train_theirs)
    with torch.no_grad():
        numbers["prefill_1024"] = side_by_side(
            lambda: ours(row, last_only=True), lambda: theirs(input_ids=row, use_cache=True, logits_to_keep=1)
        )
        start = row[:, :64]

        def decode_ours() -> None:
            out = ours(start, last_only=True)
            for _ in range(DECODED):
                out = ours(out.logits[:, -1:].argmax(-1), out.state)

        def decode_theirs() -> None:
            out = theirs(input_ids=start, use_cache=True, logits_to_keep=1)
            for _ in range(DECODED):
                out = theirs(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)

        numbers[f"prompt_64_decode_{DECODED}"] = side_by_side(decode_ours, decode_theirs)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    preset = parser.parse_args().preset
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    numbers = {"preset": preset, "threads": 1, "repeats": REPEATS, **measure(HybridConfig.preset(preset))}
    for name, value in numbers.items():
        if isinstance(value, dict):
            print(f"{name}: {value['ratio']:.2f} ({value['ratio_low']:.2f} to {value['ratio_high']:.2f}), "
                  f"minimoe {value['minimoe_s']:.3f} s, transformers {value['transformers_s']:.3f} s")
        else:
            print(f"{name}: {value}")
    write_result(RESULT, numbers, time.perf_counter() - start)


if __name__ == "__main__":
    main()
