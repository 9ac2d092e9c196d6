"""Why is the first token slow and the rest steady? Reading a prompt and writing an answer, timed apart.

    python experiments/17_serving.py        about 9 minutes on one core, 3 GiB of memory

Writes results/17_serving.json. CPU seconds of one thread, float32; everything that is compared takes turns, so that a
change of the machine's pace meets all of it. "hybrid" is the small preset, "twin" the same with every Mamba-2 layer
replaced by attention, both with random weights and without the MTP block: time does not ask what a weight says.

rates    the machine's peaks: a matrix product, and a matrix times a vector that fits no cache ("memory") or is as large
         as what a step of decoding reads ("cache")
answer   the shipped checkpoint reads a prompt and writes an answer: the time of each of its tokens
prefill  a whole prompt against its length, as minimoe.generate reads it
decode   one step against the context, in four models whose tokens leave from 1 to 16 KiB behind; a line fitted within
         each repeat, also as a multiple of bytes / bandwidth in that repeat, and the slopes of two of its parts:

         read    a matrix of as many bytes as the step reads (weights, keys and values), times a vector
         attend  the attention of the step alone, over the same keys and values

shared   a prompt whose first part was read before: from its stored state, and from nothing
chunks   one user's answer goes on while another's prompt is read in pieces, a piece and a step in turn
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe import HybridConfig, HybridLM, generate
from minimoe.bench.report import write_result
from minimoe.bench.timing import cpu_seconds, in_turns, summary
from minimoe.data import load_corpus
from minimoe.generation import prefill
from minimoe.interop import load_model
from minimoe.sizing import count_parameters, state_bytes
from minimoe.state import HybridState, KVState

ROOT = Path(__file__).parents[1]
RESULT, CHECKPOINT = ROOT / "results" / "17_serving.json", ROOT / "checkpoints" / "small"
SMALL = HybridConfig.preset("small").replace(num_nextn_predict_layers=0, max_position_embeddings=65_536)
TWIN = SMALL.replace(hybrid_override_pattern=SMALL.hybrid_override_pattern.replace("M", "*"))
MODELS = {  # the first two are the question; the others only vary the bytes that a token leaves
    "hybrid": SMALL, "twin": TWIN,
    "twin, 4 KV heads": TWIN.replace(num_key_value_heads=4), "twin, 8 KV heads": TWIN.replace(num_key_value_heads=8),
}  # fmt: skip
PROMPT, NEW, ANSWERS = 4096, 64, 7
LENGTHS, PREFILL_REPEATS = (64, 256, 1024, 4096, 16_384), 5
CONTEXTS, STEPS, DECODE_REPEATS = (1024, 2048, 4096, 8192, 16_384), 12, 15
SYSTEM, QUESTION, SHARED_REPEATS = (512, 2048, 8192), 64, 5
OTHERS, PIECES, CHUNK_REPEATS = 1024, (4096, 1024, 256, 64), 5
MEMORY = 1 << 30  # bytes that fit no cache

Work = Callable[[], object]


def band(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of some runs, and between them the 10th and the 90th percentile."""
    p10, p90 = np.percentile(values, [10, 90]).tolist()
    return {"median": statistics.median(values), "p10": p10, "p90": p90, "low": min(values), "high": max(values)}


def reader(size: int) -> Work:
    """Reads about ``size`` bytes once."""
    matrix, vector = torch.ones(max(1, size // 16_384), 4096), torch.ones(4096)
    return lambda: matrix @ vector


def rates(step: int) -> dict[str, Any]:
    """FLOP/s and bytes/s, medians; ``step``: bytes that a step of decoding reads."""
    a, b = torch.randn(2, 1024, 1024)
    sizes, flop = {"memory": MEMORY, "cache": step}, 2 * 1024**3
    runs = in_turns({"product": lambda: a @ b} | {name: reader(n) for name, n in sizes.items()}, 15, least=0.1)
    return {
        "flop_per_s": band([flop / s for s in runs["product"]]),
        "bytes_per_s": {name: band([n / s for s in runs[name]]) for name, n in sizes.items()},
        "buffer_bytes": sizes,
    }  # fmt: skip


def held_out(tokenizer: Any, tokens: int) -> list[int]:
    """Python code that the checkpoint was not trained on."""
    ids: list[int] = []
    for text in load_corpus().split()[1].texts:
        ids += tokenizer.encode(text)
        if len(ids) >= tokens:
            return ids[:tokens]
    raise SystemExit(f"the held-out files have {len(ids)} tokens, {tokens} are wanted")


def answer(model: HybridLM, ids: list[int]) -> dict[str, Any]:
    """CPU time from the question to each token of its answer."""
    first, gaps = [], []
    for repeat in range(ANSWERS + 1):
        times = [time.process_time()]
        generate(model, [ids], NEW, on_token=lambda row, token: times.append(time.process_time()))
        spent = np.diff(times).tolist()
        if repeat:  # the first run pays for set-up
            first.append(spent[0])
            gaps.append(spent[1:])
    if min(map(len, gaps)) < NEW - 1:
        raise SystemExit(f"an answer ended after {min(map(len, gaps)) + 1} tokens: take another prompt")
    return {
        "prompt": len(ids), "tokens": NEW, "repeats": ANSWERS, "first": band(first),
        "gap": band([g for run in gaps for g in run]), "gaps": [statistics.median(g) for g in zip(*gaps)],
    }  # fmt: skip


def prefills(models: dict[str, HybridLM]) -> dict[str, Any]:
    ids = torch.randint(0, SMALL.vocab_size, (max(LENGTHS),)).tolist()
    works = {(name, n): lambda model=model, n=n: prefill(model, [ids[:n]]) for name, model in models.items() for n in LENGTHS}
    runs = in_turns(works, PREFILL_REPEATS)
    return {"lengths": list(LENGTHS), "repeats": PREFILL_REPEATS,
            **{name: summary(runs[name, n] for n in LENGTHS) for name in models}}  # fmt: skip


class Decoder:
    """Writes on from a state, always from the newest: from an older one each step would copy the keys first."""

    def __init__(self, model: HybridLM, state: HybridState) -> None:
        self.model, self.state, self.token = model, state, torch.tensor([[1]])

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.state = self.model(self.token, self.state).state


def states_of(model: HybridLM) -> dict[int, HybridState]:
    """The states after CONTEXTS random tokens."""
    ids, state, found = torch.randint(0, model.config.vocab_size, (1, max(CONTEXTS))), None, {}
    for part in ids.split(1024, 1):
        state = model(part, state, last_only=True).state
        if state.lengths[0] in CONTEXTS:
            found[state.lengths[0]] = state
    return found


def attention_of(config: HybridConfig, state: HybridState) -> Work:
    """The attention of STEPS steps, without what comes before and after it; folded as the layer does it."""
    G, P = config.num_key_value_heads, config.head_dim
    q_BGJP = torch.randn(1, G, config.num_attention_heads // G, P)
    layers = [layer for layer in state.layers if isinstance(layer, KVState)]
    return lambda: [F.scaled_dot_product_attention(q_BGJP, kv.k, kv.v) for _ in range(STEPS) for kv in layers]


def reads_of(matrix: Tensor, vector: Tensor, size: float) -> Work:
    rows = round(size / vector.nbytes)
    return lambda: [matrix[:rows] @ vector for _ in range(STEPS)]


def line(seconds: Sequence[float]) -> tuple[float, float]:
    """a, b of ``a + b context``: least squares in relative error."""
    rows = np.stack([np.ones(len(CONTEXTS)), np.array(CONTEXTS, float)], 1) / np.array(seconds)[:, None]
    scale = np.linalg.norm(rows, axis=0)
    a, b = np.linalg.lstsq(rows / scale, np.ones(len(seconds)), rcond=None)[0] / scale
    return float(a), float(b)


def decode(models: dict[str, HybridLM]) -> dict[str, Any]:
    largest = max(traffic(m.config, max(CONTEXTS)) for m in models.values())
    matrix, vector = torch.ones(round(largest / 16_384) + 1, 4096), torch.ones(4096)
    works: dict[tuple[str, str, int], Work] = {}
    for name, model in models.items():
        for n, state in states_of(model).items():
            works["step", name, n] = decoder = Decoder(model, state)
            decoder()  # from here on it has a buffer of its own
            works["attend", name, n] = attention_of(model.config, decoder.state)
            works["read", name, n] = reads_of(matrix, vector, traffic(model.config, n))
    works["memory", "", MEMORY] = reader(MEMORY)
    runs = in_turns(works, DECODE_REPEATS)
    rates = [MEMORY / s for s in runs.pop(("memory", "", MEMORY))]
    out: dict[str, Any] = {
        "contexts": list(CONTEXTS), "steps": STEPS, "repeats": DECODE_REPEATS, "bytes_per_s": band(rates),
    }  # fmt: skip
    each = {key: [s / STEPS for s in seconds] for key, seconds in runs.items()}
    for name, model in models.items():
        kv = state_bytes(model.config, 0, kv_dtype="f32").kv_per_token
        out[name] = {"kv_bytes_per_token": kv, "weight_bytes": weights_at_work(model.config)}
        for part in ("step", "attend", "read"):
            points = [each[part, name, n] for n in CONTEXTS]
            fits = [line(repeat) for repeat in zip(*points)]
            out[name][part] = summary(points) | {
                "start": band([a for a, _ in fits]), "slope": band([b for _, b in fits]),
                # how many times the bytes, at the bandwidth of the same repeat
                "times_bytes": band([b * rate / kv for (_, b), rate in zip(fits, rates, strict=True)]),
                "doubled": band([long / short for long, short in zip(points[-1], points[-2])]),
            }  # fmt: skip
    return out


def weights_at_work(config: HybridConfig) -> int:
    """Bytes that one token reads of the weights: those at work, and a row of the embedding."""
    return 4 * (count_parameters(config).active_with_head + config.hidden_size)


def traffic(config: HybridConfig, context: int) -> float:
    """Bytes that a step reads: weights at work, keys and values."""
    return weights_at_work(config) + state_bytes(config, context, kv_dtype="f32").kv


def shared(models: dict[str, HybridLM]) -> dict[str, Any]:
    ids = torch.randint(0, SMALL.vocab_size, (1, max(SYSTEM) + QUESTION))
    out: dict[str, Any] = {"system": list(SYSTEM), "question": QUESTION, "repeats": SHARED_REPEATS}
    for name, model in models.items():
        works, kept = {}, []
        for n in SYSTEM:
            system, question = ids[:, :n], ids[:, n : n + QUESTION]
            state = prefill(model, system.tolist()).state
            works["stored", n] = lambda question=question, state=state: model(question, state, last_only=True)
            works["whole", n] = lambda n=n: prefill(model, ids[:, : n + QUESTION].tolist())
            off = (works["stored", n]().logits - works["whole", n]().logits).abs().max()
            if off > 1e-3:
                raise SystemExit(f"{name}: from the stored state the logits differ by {off}")
            kept.append(state.nbytes)
        runs = in_turns(works, SHARED_REPEATS)
        out[name] = {"state_bytes": kept, **{way: summary(runs[way, n] for n in SYSTEM) for way in ("stored", "whole")}}
    return out


def chunks(model: HybridLM) -> dict[str, Any]:
    """A writes; B's prompt comes. CPU seconds of B's first token, and of A's longest wait, by size of piece."""
    ids = torch.randint(0, SMALL.vocab_size, (1, PROMPT))
    talk = model(ids[:, :OTHERS], last_only=True).state
    talk = model(ids[:, :1], talk).state
    found: dict[int, dict[str, list[float]]] = {n: {"first": [], "wait": []} for n in PIECES}
    for repeat in range(CHUNK_REPEATS + 1):
        for piece in PIECES:
            a, b, waits = talk.select([0]), None, []
            a = model(ids[:, :1], a).state  # the copy is made here, before the clock starts

            def turn(part: Tensor) -> None:
                nonlocal a, b
                b = model(part, b, last_only=True).state
                a = model(ids[:, :1], a).state

            for part in ids.split(piece, 1):
                waits.append(cpu_seconds(lambda: turn(part)))
            if repeat:
                found[piece]["first"].append(sum(waits))
                found[piece]["wait"].append(max(waits))
    return {"prompt": PROMPT, "others": OTHERS, "pieces": list(PIECES), "repeats": CHUNK_REPEATS,
            **{what: summary(found[n][what] for n in PIECES) for what in ("first", "wait")}}  # fmt: skip


def card(numbers: dict[str, Any]) -> dict[str, str]:
    """What the page shows for the reader's own measurement."""
    found, decoding = numbers["answer"], numbers["decode"]

    def each(name: str) -> str:
        b = decoding[name]["step"]["slope"]
        return f"{b['median'] * 1e9:.0f} ns ({b['p10'] * 1e9:.0f} to {b['p90'] * 1e9:.0f})"

    return {
        f"TTFT, {found['prompt']:,} tokens read": f"{found['first']['median'] * 1e3:,.0f} ms",
        "TPOT (10th to 90th percentile)": f"{found['gap']['median'] * 1e3:.1f} ms "
                                          f"({found['gap']['p10'] * 1e3:.1f} to {found['gap']['p90'] * 1e3:.1f})",
        "a step, for each token of context: hybrid": each("hybrid"),
        "all-attention twin": each("twin"),
    }  # fmt: skip


def main() -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {name: HybridLM(config).eval() for name, config in MODELS.items()}
    pair = {name: models[name] for name in ("hybrid", "twin")}
    trained, tokenizer = load_model(CHECKPOINT, dtype=torch.float32)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "rates": lambda: rates(weights_at_work(SMALL)),
        "answer": lambda: answer(trained.eval(), held_out(tokenizer, PROMPT)),
        "prefill": lambda: prefills(pair), "decode": lambda: decode(models), "shared": lambda: shared(pair),
        "chunks": lambda: chunks(models["hybrid"]),
    }  # fmt: skip
    numbers: dict[str, Any] = {"threads": 1, "dtype": "float32", "preset": "small", "patterns": {
        name: config.hybrid_override_pattern for name, config in MODELS.items()}}  # fmt: skip
    for name, part in parts.items():
        numbers[name] = part()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    write_result(RESULT, numbers, time.perf_counter() - start, card(numbers))
    for name in MODELS:
        m = numbers["decode"][name]
        slopes = ", ".join(f"{part} {m[part]['slope']['median'] * 1e9:.0f}" for part in ("step", "attend", "read"))
        print(f"{name}: {m['kv_bytes_per_token']:,} bytes a token; slopes in ns: {slopes}; "
              f"start {m['step']['start']['median'] * 1e3:.2f} ms; 8k to 16k x {m['step']['doubled']['median']:.2f}")
    print(*(f"{key}: {value}" for key, value in card(numbers).items()), RESULT, sep="\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
