"""Text from a model: prefill once, then one token after another.

The module is not called generate.py: a submodule of that name would replace the function ``minimoe.generate``.
"""
from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .model import HybridLM, Output
from .state import HybridState
from .thinking import ThinkingBudget
from .timings import Timings

PREFILL_TOKENS = 2048  # a call; longer ones cost memory and, on a CPU, caches


@dataclass(frozen=True)
class Generation:
    """Result of :func:`generate`; a list entry for each row of the prompts.

    ids            new ids only, the stop ids that ended the row included
    finish_reason  "stop" (an end-of-text id or a stop sequence) or "length" (max_new_tokens, or the context is full)
    """

    ids: list[list[int]]
    finish_reason: list[str]
    timings: Timings = field(repr=False)


@torch.inference_mode()
def generate(
    model: HybridLM,
    prompts: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Iterable[int | Sequence[int]] = (),
    seed: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
    thinking_budget: ThinkingBudget | None = None,
) -> Generation:
    """Continue each prompt.

    prompts         [B, L], or a list of id lists of any lengths
    temperature     0 takes the likeliest token; else logits are divided by it and sampled
    top_k, top_p    sample only among the k likeliest (0: all), and among the likeliest whose probability reaches p
    stop            ids or id sequences that end a row; the config's end-of-text ids always do
    seed            row r draws from a generator of its own, seeded seed + r: other rows use up none of its numbers
    on_token        called as on_token(row, id) as soon as a token is known
    thinking_budget closes each row's thought when it has become too long; the prompts end inside a thought

    Raises ValueError, in one line, for settings out of range and for prompts that are empty, hold ids outside
    the vocabulary, or do not fit the context.
    """
    rows, stops = _check(model, prompts, max_new_tokens, temperature, top_p, top_k, stop)
    if seed is not None and not 0 <= seed < 2**63 - len(rows):
        raise ValueError(f"seed={seed}: must be 0 or above, and below 2**63")
    if thinking_budget is not None and not isinstance(thinking_budget, ThinkingBudget):
        raise ValueError(f"thinking_budget={thinking_budget!r}: must be made by ThinkingBudget.of(tokenizer, tokens)")
    device = model.lm_head.weight.device
    generators = [torch.Generator().manual_seed(seed + r) if seed is not None else None for r in range(len(rows))]
    new: list[list[int]] = [[] for _ in rows]
    reason = ["length"] * len(rows)
    room = [model.config.max_position_embeddings - len(row) for row in rows]

    start = time.perf_counter()
    out = prefill(model, rows)
    active, steps, prefill_s = list(range(len(rows))), [], None
    forced: list[list[int]] = [[] for _ in rows]
    while True:
        logits_BV = out.logits[:, -1].float().cpu()  # waits for the device, so the clock below is honest
        now = time.perf_counter()
        if prefill_s is None:
            prefill_s = now - start
        else:
            steps.append(now - start)
        start = now
        keep = []
        for i, row in enumerate(active):
            if thinking_budget and not forced[row]:
                forced[row] = list(thinking_budget.forced(new[row]))
            if forced[row]:
                token = forced[row].pop(0)
            else:
                token = pick(logits_BV[i], temperature, top_p, top_k, generators[row])
            new[row].append(token)
            if on_token:
                on_token(row, token)
            if any(new[row][-len(end):] == end for end in stops):
                reason[row] = "stop"
            elif len(new[row]) < min(max_new_tokens, room[row]):
                keep.append(i)
        if not keep:
            return Generation(new, reason, Timings(prefill_s, steps))
        state = out.state if len(keep) == len(active) else out.state.select(keep)
        active = [active[i] for i in keep]
        out = model(torch.tensor([[new[row][-1]] for row in active], device=device), state)


def prefill(model: HybridLM, rows: Sequence[Sequence[int]]) -> Output:
    """Read prompts of any lengths in calls of at most PREFILL_TOKENS; the last token's logits of every row."""
    device = model.lm_head.weight.device
    longest = max(len(row) for row in rows)
    ids_BL = torch.tensor([list(row) + [0] * (longest - len(row)) for row in rows], device=device)
    state: HybridState | None = None
    logits = None
    for at in range(0, longest, PREFILL_TOKENS):
        part = ids_BL[:, at : at + PREFILL_TOKENS]
        lengths = [min(max(len(row) - at, 0), part.shape[1]) for row in rows]
        out = model(part, state, lengths=lengths, last_only=True)
        state = out.state
        reached = torch.tensor([n > 0 for n in lengths], device=device)[:, None, None]
        logits = out.logits if logits is None else torch.where(reached, out.logits, logits)
    return Output(logits, state, out.hidden_BLD)


def pick(logits_V: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator | None) -> int:
    """One token id from one row of logits (on the CPU). Ties of the likeliest go to the smallest id."""
    if temperature < torch.finfo(torch.float32).tiny:  # to divide by less gives no numbers
        return int(logits_V.argmax())
    values, ids = logits_V.sort(descending=True, stable=True)
    values = (values - values[0]) / temperature  # the largest becomes 0, so that no temperature overflows
    if top_k:
        values, ids = values[:top_k], ids[:top_k]
    probabilities = values.softmax(0)
    if top_p < 1:
        before = probabilities.cumsum(0) - probabilities  # the token that reaches p is still in
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def _check(
    model: HybridLM, prompts: Tensor | Sequence[Sequence[int]], max_new_tokens: int, temperature: float,
    top_p: float, top_k: int, stop: Iterable[int | Sequence[int]],
) -> tuple[list[list[int]], list[list[int]]]:
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be a whole number, at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature}: must be 0 (likeliest token) or above")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1")
    if not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k={top_k}: must be a whole number, 0 (no limit) or above")
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    try:
        rows = [[operator.index(i) for i in row] for row in prompts]
    except TypeError:
        raise ValueError("prompts must be rows of whole-number ids, for example [[1, 2, 3]]; "
                         "text has to be encoded first") from None
    if not rows:
        raise ValueError("there is no prompt: give at least one row of token ids")
    config = model.config
    for r, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {r} is empty: give it at least one token, for example the bos id {config.bos_token_id}")
        wrong = [i for i in row if not 0 <= i < config.vocab_size]
        if wrong:
            raise ValueError(f"prompt {r} holds token id {wrong[0]}, outside the vocabulary 0..{config.vocab_size - 1}; "
                             "was it encoded with another tokenizer?")
        if len(row) >= config.max_position_embeddings:
            raise ValueError(f"prompt {r} has {len(row)} tokens and the declared context holds "
                             f"{config.max_position_embeddings} with the answer; shorten the prompt, or raise "
                             "max_position_embeddings in the config")
    try:
        stops = [_sequence(s) for s in stop] + [[i] for i in config.eos_token_ids]
    except TypeError:
        raise ValueError(f"stop={stop!r}: must be a list of ids and id lists") from None
    if any(not s for s in stops):
        raise ValueError("stop holds an empty sequence: remove it")
    return rows, stops


def _sequence(ids: int | Sequence[int]) -> list[int]:
    try:
        return [operator.index(ids)]  # a plain number, numpy's or a tensor's
    except TypeError:
        return [operator.index(i) for i in ids]
