"""What does a second user cost? Decoding and reading in batches, with the experts that are really chosen.

    python experiments/17_batch.py        about 3 minutes on one core, 2 GiB of memory

Writes results/17_batch.json. CPU seconds of one thread, float32; everything that is compared takes turns.

experts  the shipped checkpoint on held-out code: how many different experts a router sends b tokens to, on average, for
         b tokens of different texts (a batch of decoding) and b that follow each other in one text (a prompt); beside
         it "load", what tokens independent of each other would choose with each expert as busy as it is
decode   a step of the checkpoint for b texts at once, and "read", a matrix of as many bytes times a vector: the weights
         at work with the experts counted above, the states of b texts
prefill  b prompts at once
rows     the same step for hybrid and all-attention twin (random weights) at a short and a long context: what one more
         sequence costs
"""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimoe import HybridConfig, HybridLM
from minimoe.bench.report import write_result
from minimoe.bench.timing import in_turns, summary
from minimoe.data import load_corpus
from minimoe.interop import load_model
from minimoe.layers.moe import Router
from minimoe.sizing import count_parameters, state_bytes

ROOT = Path(__file__).parents[1]
RESULT, CHECKPOINT = ROOT / "results" / "17_batch.json", ROOT / "checkpoints" / "small"
SEED, BATCHES, CONTEXT, LENGTH, DRAWS = 17, (1, 2, 4, 8, 16, 32), 256, 512, 40
STEPS, REPEATS, PROMPT = 8, 11, 64
ROWS, LONG, ROW_REPEATS = (1, 2, 4, 8, 16), 4096, 9
SMALL = HybridConfig.preset("small").replace(num_nextn_predict_layers=0)
TWIN = SMALL.replace(hybrid_override_pattern=SMALL.hybrid_override_pattern.replace("M", "*"))


def texts(tokenizer: Any, rows: int) -> Tensor:
    """[rows, LENGTH] stretches of held-out files, as evenly from all as there is room, in a random order."""
    found: list[list[int]] = []
    for text in load_corpus().split()[1].texts:
        ids = tokenizer.encode(text)
        found += [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH + 1, LENGTH)]
    chosen = np.random.default_rng(SEED).permutation(len(found))[:rows]
    return torch.tensor([found[i] for i in chosen])


def choices(model: HybridLM, ids_BL: Tensor) -> dict[str, np.ndarray]:
    """experts_BLK of each of the trunk's routers."""
    seen: dict[str, np.ndarray] = {}
    hooks = []
    for name, router in model.model.named_modules():
        if isinstance(router, Router):
            hooks.append(router.register_forward_hook(
                lambda _, args, out, name=name: seen.update({name: out[0].view(*ids_BL.shape, -1).numpy()})
            ))  # fmt: skip
    model(ids_BL, last_only=True)
    for hook in hooks:
        hook.remove()
    return seen


def experts(model: HybridLM, ids_BL: Tensor) -> dict[str, Any]:
    """Distinct experts, a mean over routers, positions from CONTEXT on, and draws of rows."""
    random, found = np.random.default_rng(SEED), {"rows": [], "text": [], "load": []}
    seen, E = choices(model, ids_BL), model.config.n_routed_experts
    for b in BATCHES:
        rows, text, load = [], [], []
        for experts_BLK in seen.values():
            after_BTK = experts_BLK[:, CONTEXT:]
            B, T, K = after_BTK.shape
            for _ in range(DRAWS):
                some = random.permutation(B)[:b]
                rows += [len(np.unique(after_BTK[some, t])) for t in range(0, T, 8)]
            text += [len(np.unique(after_BTK[row, t : t + b])) for row in range(B) for t in range(0, T - b + 1, b)]
            share_E = np.bincount(after_BTK.ravel(), minlength=E) / (B * T)  # of tokens that choose it
            load.append(float((1 - (1 - share_E) ** b).sum()))
        for name, counted in (("rows", rows), ("text", text), ("load", load)):
            found[name].append(float(np.mean(counted)))
    return {"tokens": ids_BL[:, CONTEXT:].numel(), "routers": len(seen), "experts": E,
            "top_k": model.config.num_experts_per_tok, **found}  # fmt: skip


class Batch:
    """Decodes STEPS tokens of each row, always from the newest state; the tokens are given, so texts stay real."""

    def __init__(self, model: HybridLM, state: Any, ids_BL: Tensor) -> None:
        self.model, self.state, self.next = model, state, iter(ids_BL.split(1, 1))

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.state = self.model(next(self.next), self.state).state


def reads(size: float) -> Callable[[], object]:
    matrix, vector = torch.ones(round(size / 16_384), 4096), torch.ones(4096)
    return lambda: [matrix @ vector for _ in range(STEPS)]


def step_bytes(config: HybridConfig, distinct: float, b: int, context: int) -> float:
    """Moved by a step: weights once, of the experts the distinct ones, one embedding row and the state of each text."""
    count, state = count_parameters(config), state_bytes(config, context, b, kv_dtype="f32")
    routed = count.by_kind["routed_experts"]
    weights = count.total - count.by_kind["embedding"] - routed * (1 - distinct / config.n_routed_experts)
    return 4 * (weights + b * config.hidden_size) + state.kv + 2 * (state.ssm + state.conv)


def decode(model: HybridLM, ids_BL: Tensor, distinct: Sequence[float]) -> dict[str, Any]:
    works: dict[tuple[str, int], Callable[[], object]] = {}
    sizes = [step_bytes(model.config, d, b, CONTEXT) for b, d in zip(BATCHES, distinct, strict=True)]
    for b, size in zip(BATCHES, sizes, strict=True):
        state = model(ids_BL[:b, :CONTEXT], last_only=True).state
        works["step", b], works["read", b] = Batch(model, state, ids_BL[:b, CONTEXT:]), reads(size)
    runs = in_turns(works, REPEATS)
    return {"context": CONTEXT, "repeats": REPEATS, "bytes": sizes,
            **{what: summary([s / STEPS for s in runs[what, b]] for b in BATCHES) for what in ("step", "read")}}  # fmt: skip


def prefill(model: HybridLM, ids_BL: Tensor) -> dict[str, Any]:
    runs = in_turns({b: lambda b=b: model(ids_BL[:b, :PROMPT], last_only=True) for b in BATCHES}, REPEATS)
    return {"prompt": PROMPT, "repeats": REPEATS, **summary(runs[b] for b in BATCHES)}


def rows() -> dict[str, Any]:
    models = {"hybrid": HybridLM(SMALL).eval(), "twin": HybridLM(TWIN).eval()}
    works: dict[tuple[str, int, int], Batch] = {}
    tokens = torch.randint(0, SMALL.vocab_size, (max(ROWS), STEPS * (ROW_REPEATS + 2)))
    for name, model in models.items():
        state = None
        for part in torch.randint(0, SMALL.vocab_size, (1, LONG)).split(CONTEXT, 1):
            state = model(part, state, last_only=True).state
            if state.lengths[0] in (CONTEXT, LONG):
                for b in ROWS:  # the same past for all rows: a copy each costs as much to read
                    works[name, state.lengths[0], b] = Batch(model, state.select([0] * b), tokens[:b])
    runs = in_turns(works, ROW_REPEATS)
    out: dict[str, Any] = {"rows": list(ROWS), "contexts": [CONTEXT, LONG], "repeats": ROW_REPEATS}
    for name, model in models.items():
        for n in (CONTEXT, LONG):
            state = state_bytes(model.config, n, kv_dtype="f32")
            out[f"{name}, {n}"] = summary([s / STEPS for s in runs[name, n, b]] for b in ROWS) | {
                "bytes_a_row": state.kv + 2 * (state.ssm + state.conv),
            }  # fmt: skip
    return out


def main() -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model, tokenizer = load_model(CHECKPOINT, dtype=torch.float32)
    ids_BL = texts(tokenizer, max(BATCHES))
    numbers: dict[str, Any] = {"threads": 1, "dtype": "float32", "batches": list(BATCHES)}
    numbers["experts"] = experts(model.eval(), ids_BL)
    numbers["decode"] = decode(model, ids_BL, numbers["experts"]["rows"])
    numbers["prefill"] = prefill(model, ids_BL)
    numbers["rows"] = rows()
    step = numbers["decode"]["step"]["seconds"]
    rates = [b / s for b, s in zip(BATCHES, step)]
    write_result(RESULT, numbers, time.perf_counter() - start, {
        "one text": f"{rates[0]:,.0f} tokens/s",
        f"{BATCHES[-1]} texts at once": f"{rates[-1]:,.0f} tokens/s together, {1 / step[-1]:,.0f} each",
    })  # fmt: skip
    for what in ("rows", "text", "load"):
        print(f"{what}:", *(f"{n:.1f}" for n in numbers["experts"][what]))
    for b, s, r, p in zip(BATCHES, step, numbers["decode"]["read"]["seconds"], numbers["prefill"]["seconds"]):
        print(f"{b:3} texts: step {s * 1e3:.2f} ms, read {r * 1e3:.2f} ms, {b / s:,.0f} tokens/s; "
              f"prompts {b * PROMPT / p:,.0f} tokens/s")
    for name in ("hybrid", "twin"):
        for n in (CONTEXT, LONG):
            m = numbers["rows"][f"{name}, {n}"]
            print(f"{name} at {n}: {m['bytes_a_row'] / 1e6:.1f} MB a row;", *(f"{s * 1e3:.1f}" for s in m["seconds"]), "ms")
    print(RESULT)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
