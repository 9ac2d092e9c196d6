"""Mixture of experts: a sigmoid router with a correction bias, non-gated experts, optional latent projections.

LatentMoE (arXiv 2601.18089) lets the routed experts read and write R < D channels: one projection down before
them, one up after. The router and the shared expert keep the full width D.

Legend: layers/__init__.py.  Matches transformers ``NemotronHTopkRouter``, ``NemotronHExperts`` and ``NemotronHMoE``.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import HybridConfig
from .mlp import MLP, relu2
from .norm import at_least_float32, without_autocast

_grouped_mm_wanted = True


def route(
    x_TD: Tensor, gate_ED: Tensor, bias_E: Tensor, top_k: int, scale: float, normalise: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose K experts a token.

    ``score = sigmoid(x W^T)``; the K largest ``score + bias`` are chosen; their weights are the scores *without*
    the bias, divided by their sum, times ``scale``. So the bias moves tokens between experts and never enters the
    output (Wang et al. 2024, arXiv 2408.15664).

    Returns experts_TK (int64), weights_TK and scores_TE, both at least float32.
    """
    with without_autocast(x_TD):  # scores in bfloat16 would reorder close experts
        scores_TE = F.linear(at_least_float32(x_TD), at_least_float32(gate_ED)).sigmoid()
    experts_TK = (scores_TE.detach() + bias_E).topk(top_k, dim=-1, sorted=False).indices
    weights_TK = scores_TE.gather(-1, experts_TK)
    if normalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return experts_TK, weights_TK * scale, scores_TE


def experts_loop(x_TR: Tensor, up_EFR: Tensor, down_ERF: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The definition: ``y_t = sum_k weight_tk * W_down[e_tk] relu(W_up[e_tk] x_t)^2``, expert after expert.

    Returns y_TR in the dtype of x.
    """
    y_TR = torch.zeros_like(x_TR, dtype=torch.promote_types(x_TR.dtype, weights_TK.dtype))
    for e in range(up_EFR.shape[0]):
        token_I, slot_I = (experts_TK == e).nonzero(as_tuple=True)
        out_IR = F.linear(relu2(F.linear(x_TR[token_I], up_EFR[e])), down_ERF[e])
        y_TR = y_TR.index_add(0, token_I, out_IR * weights_TK[token_I, slot_I, None])
    return y_TR.to(x_TR.dtype)


def experts_grouped(x_TR: Tensor, up_EFR: Tensor, down_ERF: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The fast form of :func:`experts_loop`: sort the choices by expert, then multiply each expert's run of rows.

    Only experts that were chosen are read, so a single token costs K experts and not E.
    """
    T, K = experts_TK.shape
    if T == 1:
        return _experts_of_one(x_TR, up_EFR, down_ERF, experts_TK.tolist()[0], weights_TK)
    x, up, down = _as_autocast_would(x_TR, up_EFR, down_ERF)
    choice_M = experts_TK.flatten()
    order_M = choice_M.argsort(stable=True)
    token_M, weight_M = order_M // K, weights_TK.flatten().index_select(0, order_M)
    counts_E = torch.bincount(choice_M, minlength=len(up))
    grouped = len(choice_M) > len(up) and _has_grouped_mm(x, up)
    if grouped and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # oneDNN builds a kernel for every number of rows that it has not yet met, which costs more than the product
        from_M, real_M, counts_E = _round_up_runs(counts_E, 32)
        token_M, weight_M = token_M.index_select(0, from_M), weight_M.index_select(0, from_M) * real_M
    # index_select, because its backward is one fast index_add
    rows_MR = _multiply_runs(x.index_select(0, token_M), up, down, counts_E, grouped) * weight_M[:, None]
    return rows_MR.new_zeros(x.shape).index_add(0, token_M, rows_MR).to(x_TR.dtype)


def _experts_of_one(
    x_1R: Tensor, up_EFR: Tensor, down_ERF: Tensor, experts: list[int], weights_1K: Tensor
) -> Tensor:
    """One token has nothing to sort, and a decoded token is in a hurry: a matrix times a vector, twice an expert."""
    x_R = x_1R.view(-1)
    hidden_KF = relu2(torch.stack([F.linear(x_R, up_EFR[e]) for e in experts]))
    out_KR = torch.stack([F.linear(hidden_F, down_ERF[e]) for hidden_F, e in zip(hidden_KF.unbind(), experts)])
    return (weights_1K @ out_KR.to(weights_1K.dtype)).to(x_1R.dtype)


def _as_autocast_would(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's dtype where that is switched on: grouped_mm is not on its list."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


def _round_up_runs(counts_E: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of ``counts_E`` rows made longer, to the next multiple, by repeating their last rows.

    Returns which of the old rows each new row is, whether it is one of the real ones, and the new counts.
    """
    room_E = (counts_E + multiple - 1) // multiple * multiple
    expert_M = torch.repeat_interleave(room_E)
    within_M = torch.arange(len(expert_M), device=counts_E.device) - (room_E.cumsum(0) - room_E)[expert_M]
    count_M, start_M = counts_E[expert_M], (counts_E.cumsum(0) - counts_E)[expert_M]
    return start_M + torch.minimum(within_M, count_M - 1), within_M < count_M, room_E


def _multiply_runs(rows_MR: Tensor, up_EFR: Tensor, down_ERF: Tensor, counts_E: Tensor, grouped: bool) -> Tensor:
    """Each run of rows through its own expert: one grouped matmul a projection where the build has it."""
    if grouped:
        ends_E = counts_E.cumsum(0).int()
        hidden = relu2(F.grouped_mm(rows_MR, up_EFR.mT, offs=ends_E))
        return F.grouped_mm(hidden, down_ERF.mT, offs=ends_E)
    outputs, start = [], 0
    for e, count in enumerate(counts_E.tolist()):
        if count:
            run_IR = rows_MR[start : start + count]
            outputs.append(F.linear(relu2(F.linear(run_IR, up_EFR[e])), down_ERF[e]))
            start += count
    return torch.cat(outputs)


def _has_grouped_mm(x: Tensor, up_EFR: Tensor) -> bool:
    if any(width * x.element_size() % 16 for width in up_EFR.shape[1:]):  # its rows must begin at 16-byte borders
        return False
    # torch's CPU kernel takes float32 and bfloat16, its CUDA kernel bfloat16 on recent cards
    if not (_grouped_mm_wanted and hasattr(F, "grouped_mm")):
        return False
    if x.device.type == "cpu":
        return x.dtype in (torch.float32, torch.bfloat16)
    return x.dtype == torch.bfloat16 and x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= (8, 0)


@contextlib.contextmanager
def without_grouped_mm() -> Iterator[None]:
    """A context in which runs are multiplied expert after expert, as on a build or a card without a grouped matmul."""
    global _grouped_mm_wanted
    before, _grouped_mm_wanted = _grouped_mm_wanted, False
    try:
        yield
    finally:
        _grouped_mm_wanted = before


class Router(nn.Module):
    """Weights of :func:`route`. The correction bias is a buffer: it is set by counting, not by gradient."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.top_k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.normalise = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def _apply(self, fn, recurse: bool = True) -> "Router":
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype.itemsize < 4:  # a bias in bfloat16 would reorder close experts
            self.e_score_correction_bias = bias_E.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return route(x_TD, self.weight, self.e_score_correction_bias, self.top_k, self.scale, self.normalise)


class Experts(nn.Module):
    """Stacked weights of the routed experts: up_proj [E, F, R], down_proj [E, R, F]."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        E, F_, R = config.n_routed_experts, config.moe_intermediate_size, config.expert_input_size
        self.up_proj = nn.Parameter(torch.empty(E, F_, R))
        self.down_proj = nn.Parameter(torch.empty(E, R, F_))

    def forward(self, x_TR: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return experts_grouped(x_TR, self.up_proj, self.down_proj, experts_TK, weights_TK)


class MoE(nn.Module):
    """``y = W_up_latent(experts(W_down_latent x)) + shared_expert(x)``. Shapes: [B, L, D] -> [B, L, D].

    The combine weights are applied before the projection up, so it runs once a token, not once a choice.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        d, latent = config.hidden_size, config.moe_latent_size
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(d, config.moe_shared_expert_intermediate_size)
        self.fc1_latent_proj = nn.Linear(d, latent, bias=False) if latent else nn.Identity()
        self.fc2_latent_proj = nn.Linear(latent, d, bias=False) if latent else nn.Identity()

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_TD = x_BLD.flatten(0, 1)
        experts_TK, weights_TK, _ = self.gate(x_TD)
        routed_TR = self.experts(self.fc1_latent_proj(x_TD), experts_TK, weights_TK)
        return (self.fc2_latent_proj(routed_TR) + self.shared_experts(x_TD)).view_as(x_BLD)
