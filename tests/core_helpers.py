"""What the tests of the core share: small configs, weights at which a mistake shows, a way to feed calls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minimoe import HybridConfig, HybridLM
from minimoe.layers.moe import Router
from minimoe.model import Output

NEAR_TIE = 1e-5  # closer scores than this may be ordered differently by another sequence of roundings


def small_config(pattern: str = "MEM*E", **changes: object) -> HybridConfig:
    """A config that runs in milliseconds: four groups, a latent, chunks of 4."""
    sizes = dict(
        vocab_size=61, hidden_size=32, max_position_embeddings=4096, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mamba_num_heads=8, mamba_head_dim=6,
        n_groups=4, ssm_state_size=10, chunk_size=4,
        n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=20, moe_latent_size=16, routed_scaling_factor=2.5,
        intermediate_size=28, eos_token_id=None,
    )  # fmt: skip
    return HybridConfig(hybrid_override_pattern=pattern, **(sizes | changes))


@torch.no_grad()
def scramble(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights at which a mistake shows.

    A fresh model is nearly the identity, its biases are zero, its norms one and its dt inside every clamp, so
    most mistakes change nothing. Here matrices have the scale fan_in^-0.5, everything else is random too, and
    softplus(dt_bias) goes from 1e-4 to 2.
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(p: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(p.shape, generator=random) * (high - low) + low

    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("A_log"):
            value = uniform(p, 1, 16).log()
        elif name.endswith("dt_bias"):
            value = uniform(p, -9, 2)
        elif name.endswith("e_score_correction_bias"):
            value = torch.randn(p.shape, generator=random) * 0.5
        elif name.endswith("gate.weight"):
            value = torch.randn(p.shape, generator=random) * 2 * p.shape[-1] ** -0.5
        elif "embeddings" in name:
            value = torch.randn(p.shape, generator=random)
        elif p.dim() >= 2:
            value = torch.randn(p.shape, generator=random) * p.shape[-1] ** -0.5
        elif "norm" in name:
            value = uniform(p, 0.5, 1.5)
        else:  # D and the convolution's bias
            value = torch.randn(p.shape, generator=random) * 0.5
        p.copy_(value)
    return model


def small_model(
    pattern: str = "MEM*E", seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object
) -> HybridLM:
    """A scrambled model of :func:`small_config`."""
    return scramble(HybridLM(small_config(pattern, **changes), dtype=dtype), seed).eval()


def random_ids(vocab: int, rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, as a part of the largest value of ``theirs``."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    if theirs.numel() == 0:
        return 0.0
    scale = theirs.detach().abs().max().clamp(min=1e-30)
    return float((ours.detach().to(theirs.dtype) - theirs.detach()).abs().max() / scale)


def router_gaps(model: HybridLM, ids: Tensor) -> Tensor:
    """For each token [B, L]: the smallest gap, over the MoE layers, between the last chosen and the first
    refused biased score."""
    gaps = torch.full(ids.shape, math.inf)

    def watch(router: Router, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        biased_TE = (output[2] + router.e_score_correction_bias).sort(-1, descending=True).values
        if router.top_k < biased_TE.shape[-1]:
            gap_T = biased_TE[:, router.top_k - 1] - biased_TE[:, router.top_k]
            gaps.copy_(torch.minimum(gaps, gap_T.view_as(gaps).float()))

    hooks = [m.register_forward_hook(watch) for m in model.model.modules() if isinstance(m, Router)]
    try:
        with torch.no_grad():
            model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return gaps


def clear_of_ties(model: HybridLM, ids: Tensor) -> Tensor:
    """True [B, L] where no near-tie of a router happened at this token or at an earlier one of its row."""
    return router_gaps(model, ids).cummin(1).values >= NEAR_TIE


def feed(
    model: HybridLM,
    rows: Sequence[Sequence[Tensor]],
    calls: Sequence[Sequence[int]],
    packed: bool = True,
    extra: int = 0,
    seed: int = 0,
) -> tuple[list[Tensor], Output]:
    """Feed rows of packed documents in right-padded calls.

    rows[r] is a list of documents (ids); calls[c][r] says how many tokens of row r are in call c. Padding,
    ``extra`` columns more than needed, holds random ids and random document numbers: neither may matter.
    Returns the logits of each row's real tokens [n, V], and the last call's output.
    """
    random = torch.Generator().manual_seed(seed)
    ids = [torch.cat(list(row)) for row in rows]
    numbers = [torch.cat([torch.full((len(doc),), n % 2) for n, doc in enumerate(row)]) for row in rows]
    at, state, got = [0] * len(rows), None, [[] for _ in rows]
    for counts in calls:
        L = max(1, max(counts) + extra)
        ids_BL = torch.randint(0, model.config.vocab_size, (len(rows), L), generator=random)
        segment_BL = torch.randint(0, 3, (len(rows), L), generator=random)
        for r, n in enumerate(counts):
            ids_BL[r, :n] = ids[r][at[r] : at[r] + n]
            segment_BL[r, :n] = numbers[r][at[r] : at[r] + n]
        out = model(ids_BL, state, lengths=counts, segment_ids=segment_BL if packed else None)
        state = out.state
        for r, n in enumerate(counts):
            got[r].append(out.logits[r, :n])
            at[r] += n
    assert at == [len(i) for i in ids], "the calls do not cover the rows"
    return [torch.cat(parts) for parts in got], out


def random_calls(lengths: Sequence[int], seed: int, most: int = 9) -> list[list[int]]:
    """Calls of random widths that together read rows of these lengths; a row may sit out a call."""
    random = torch.Generator().manual_seed(seed)
    left, calls = list(lengths), []
    while any(left):
        wish = torch.randint(0, most + 1, (len(left),), generator=random).tolist()
        calls.append([min(n, w) for n, w in zip(left, wish)])
        left = [n - c for n, c in zip(left, calls[-1])]
    return [c for c in calls if any(c)]


def alone(model: HybridLM, documents: Sequence[Tensor]) -> Tensor:
    """Logits of documents that are read one by one, each from an empty state [total, V]."""
    return torch.cat([model(doc[None]).logits[0] for doc in documents])
