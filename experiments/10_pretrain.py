"""What four settings of a run change, and where the time and memory of a step go.

    python experiments/10_pretrain.py [--steps N] [--out FILE]        about 15 minutes on one core, 2 GiB of memory

Writes results/10_pretrain.json; with fewer steps, which is for trying it, only what --out names.

runs    a model of one million weights reads the same 300,000 tokens of the standard library with three seeds: as it comes,
        with products in bfloat16, without moving the routers' biases, and without lowering the learning rate in the end.
        Held-out loss in nats a token, and how the routers spread the held-out text's choices
kept    bytes of tensors at the peak of one step of the preset small, and its CPU seconds: whole, in four parts, with blocks
        recomputed, and both
speed   tokens a CPU second by preset and precision, the parts of a step, and the share of the measured matmul rate (MFU)
"""
from __future__ import annotations

import argparse
import statistics
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimoe import HybridConfig, HybridLM
from minimoe.bench.report import write_result
from minimoe.bench.timing import cpu_seconds, in_turns
from minimoe.data import Tokenizer, Tokens, encode_corpus, load_corpus
from minimoe.sizing import flops_per_token
from minimoe.train import Training, TrainOptions, evaluate, train
from minimoe.train.router_load import counted_choices, load

RESULT = Path(__file__).parents[1] / "results" / "10_pretrain.json"
SEEDS, STEPS, LENGTH, EVALUATED = (0, 1, 2), 300, 128, 40
EVERY = 4  # one of so many files is read: six times what the runs need
POINTS = 30  # of a curve
REPEATS = 5
SHAPE = dict(  # the model of chapter 05
    vocab_size=512, hidden_size=128, head_dim=32, mamba_head_dim=32, ssm_state_size=32, chunk_size=32,
    moe_latent_size=64, moe_intermediate_size=128, moe_shared_expert_intermediate_size=128,
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {}, "bfloat16": {"precision": "bfloat16"}, "biases not moved": {"balance": 0.0}, "rate not lowered": {"decay": 0.0},
}  # fmt: skip
PARTS: dict[str, dict[str, Any]] = {
    "whole": {}, "in four parts": {"accumulate": 4}, "recomputed": {"recompute": True},
    "both": {"accumulate": 4, "recompute": True},
}  # fmt: skip
WINDOWS = {"tiny": (8, 256), "small": (4, 512)}
PRECISIONS, SQUARES = ("float32", "bfloat16"), (512, 1024, 2048)


# ---------------------------------------------------------------------- runs
def trained(setting: dict[str, Any], seed: int, steps: int, tokens: Tokens, held_out: Tokens, end_id: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = HybridLM(HybridConfig.preset("tiny", **SHAPE, eos_token_id=(end_id,)))
    options = TrainOptions(**{"steps": steps, "length": LENGTH, "lr": 4e-3, "precision": "float32", "seed": seed} | setting)
    start = time.process_time()
    with torch.enable_grad():
        log = train(model, tokens, options, progress=True)
    seconds = time.process_time() - start
    every = max(1, steps // POINTS)
    with counted_choices(model.eval()) as counts:
        loss = evaluate(model, held_out, length=LENGTH, limit=EVALUATED)
    loads = [load(counts_E) for name, counts_E in counts.items() if not name.startswith("mtp")]  # evaluate leaves that alone
    return {
        "loss": loss, "cpu_seconds": seconds,
        "curve": [statistics.fmean(s.loss for s in log[at : at + every]) for at in range(0, steps - every + 1, every)],
        "peaks": [found.peak for found in loads], "shares": [sorted(found.shares, reverse=True) for found in loads],
    }  # fmt: skip


# ---------------------------------------------------------------------- memory
class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are made inside and still alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):  # what an operation is given and nobody has met was there before
            self._meet(storage, 0)
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._meet(storage, storage.nbytes())
        return out

    def _meet(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._part, storage._cdata, size)

    def _part(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(arguments: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def random_text(vocabulary: int) -> Tokens:
    """What a step costs does not depend on what it reads."""
    return Tokens(torch.randint(0, vocabulary, (50_000,), generator=torch.Generator().manual_seed(0)).numpy().astype("uint16"), 1)


def ready(preset: str, **options: Any) -> Training:
    """A run that has done one step, so that all memory that lasts is there."""
    torch.manual_seed(0)
    model = HybridLM(HybridConfig.preset(preset))
    training = Training(model, random_text(model.config.vocab_size), TrainOptions(**options))
    training.step()
    training.optimizer.zero_grad(set_to_none=True)
    return training


def kept(repeats: int) -> dict[str, Any]:
    batch, length = 4, 256
    runs = {name: ready("small", batch=batch, length=length, precision="float32", **how) for name, how in PARTS.items()}
    seconds = in_turns({name: run.step for name, run in runs.items()}, repeats)
    parameters = sum(p.numel() for p in runs["whole"].model.parameters())
    numbers: dict[str, Any] = {"preset": "small", "batch": batch, "length": length, "parameters": parameters, "parts": {}}
    for name, run in runs.items():
        run.optimizer.zero_grad(set_to_none=True)
        with LiveBytes() as live:
            run.step()
        numbers["parts"][name] = {"bytes": live.most, "seconds": statistics.median(seconds[name]),
                                  "low": min(seconds[name]), "high": max(seconds[name])}  # fmt: skip
    return numbers


# ---------------------------------------------------------------------- speed
def split(training: Training) -> dict[str, float]:
    """CPU seconds of a step's parts, on the same batch each time."""
    ids, targets = training.batches(0)
    losses: list[Tensor] = []

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=training.options.precision == "bfloat16"):
            main, mtp = training.loss(ids, targets, None, training.with_mtp)
        losses[:] = [main if mtp is None else main + training.options.mtp_weight * mtp]

    training.optimizer.zero_grad(set_to_none=True)
    return {"forward": cpu_seconds(forward), "backward": cpu_seconds(lambda: losses[0].backward()),
            "optimizer": cpu_seconds(training.optimizer.step)}  # fmt: skip


def speed(repeats: int) -> dict[str, Any]:
    """Steps and large matrix products in turn, by one clock: bench.device's would be the wall's."""
    squares = {(n, p): torch.randn(n, n).to(getattr(torch, p)) for n in SQUARES for p in PRECISIONS}
    runs = {(preset, p): ready(preset, batch=batch, length=length, precision=p)
            for preset, (batch, length) in WINDOWS.items() for p in PRECISIONS}  # fmt: skip
    seconds = in_turns({key: run.step for key, run in runs.items()}
                       | {key: lambda a=a: a @ a for key, a in squares.items()}, repeats, least=0.2)  # fmt: skip
    peaks = {p: max(2 * n**3 / statistics.median(seconds[n, p]) for n in SQUARES) for p in PRECISIONS}
    numbers: dict[str, Any] = {"peak": peaks, "steps": {}}
    for (preset, precision), run in runs.items():
        tokens = run.options.batch * run.options.length
        flops = flops_per_token(run.model.config, run.options.length).training
        rates = sorted(tokens / s for s in seconds[preset, precision])
        parts = [split(run) for _ in range(repeats)]
        numbers["steps"][f"{preset}, {precision}"] = {
            "tokens": tokens, "flops_per_token": flops, "tokens_per_second": statistics.median(rates), "low": rates[0],
            "high": rates[-1], "mfu": statistics.median(rates) * flops / peaks[precision],
            "parts": {name: statistics.median(part[name] for part in parts) for name in parts[0]},
        }  # fmt: skip
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer, to try the script")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write numbers of fewer steps")
    args = parser.parse_args()
    whole, start = args.steps == STEPS, time.perf_counter()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    training, validation = load_corpus().split()
    training = training.only(training.names[::EVERY])
    tokenizer = Tokenizer.train(training.texts, SHAPE["vocab_size"])
    tokens, held_out = encode_corpus(training, tokenizer), encode_corpus(validation, tokenizer)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    for seed in SEEDS:
        for name, setting in SETTINGS.items():
            runs[name].append(trained(setting, seed, args.steps, tokens, held_out, tokenizer.eos_id))
            print(seed, name, {key: value for key, value in runs[name][-1].items() if key not in ("curve", "shares")}, flush=True)
    with torch.enable_grad():
        memory, rates = kept(REPEATS if whole else 2), speed(REPEATS if whole else 2)
    numbers = {
        "threads": 1, "seeds": list(SEEDS), "steps": args.steps, "batch": TrainOptions().batch, "length": LENGTH,
        "tokens": args.steps * TrainOptions().batch * LENGTH,
        "parameters": sum(p.numel() for p in HybridLM(HybridConfig.preset("tiny", **SHAPE), device="meta").parameters()),
        "runs": runs, "kept": memory, "speed": rates,
    }  # fmt: skip
    card = {"peak, " + p: f"{rate / 1e9:,.0f} GFLOP/s" for p, rate in rates["peak"].items()}
    card |= {name: f"{found['tokens_per_second']:,.0f} tokens a CPU second, MFU {found['mfu']:.0%}"
             for name, found in rates["steps"].items()}  # fmt: skip
    print(*(f"{key}: {value}" for key, value in card.items()), sep="\n")
    out = RESULT if whole else args.out
    if out:
        print(write_result(out, numbers, time.perf_counter() - start, card))


if __name__ == "__main__":
    with torch.no_grad():
        main()
