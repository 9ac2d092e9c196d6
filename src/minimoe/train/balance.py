"""Keeping all experts busy: the router's correction bias, moved by counting, and a small loss on its scores.

A router that favours an expert trains it more, which makes it better, which makes the router favour it more. The bias
enters the choice only (see layers/moe.py), so moving it costs the model nothing that a gradient would fight for. But
an expert whose scores have sunk to 0 is then chosen with no weight, and learns nothing: the loss keeps scores up.
Nemotron 3 uses both, a rate of 1e-3 and a coefficient of 1e-4.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.moe import Router
from .world import World


def balance_loss(experts_BLK: Tensor, scores_BLE: Tensor) -> Tensor:
    """How unevenly each sequence uses the experts, as a mean over sequences: 1 at balance, up to E / K.

    .. math:: \\sum_e f_e P_e, \\quad f_e = \\frac{E}{K L} \\sum_t 1[e \\in \\text{chosen}_t], \\quad
        P_e = \\frac{1}{L} \\sum_t \\frac{s_{te}}{\\sum_{e'} s_{te'}}

    The choices f have no gradient; lowering it moves score from experts that are chosen often to those that are not
    (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20; Megatron-LM's ``seq_aux_loss``).
    """
    B, L, K = experts_BLK.shape
    E = scores_BLE.shape[-1]
    counts_BE = scores_BLE.new_zeros(B, E).scatter_add_(
        1, experts_BLK.flatten(1), scores_BLE.new_ones(1, 1).expand(B, L * K)
    )
    share_BE = (scores_BLE / scores_BLE.sum(-1, keepdim=True)).mean(1)
    return (counts_BE * share_BE).sum(-1).mean() * (E / (K * L))


class BalanceLoss:
    """Hears every router of a model during a forward pass; ``take(batch)`` is their mean :func:`balance_loss`."""

    def __init__(self, model: nn.Module) -> None:
        self._heard: list[tuple[Tensor, Tensor]] = []
        self._hooks = [
            module.register_forward_hook(lambda router, args, out: self._heard.append((out[0], out[2])))
            for module in model.modules() if isinstance(module, Router)
        ]

    def take(self, batch: int) -> Tensor:
        """Of what was heard since the last call, for ``batch`` sequences; then forget it."""
        heard, self._heard = self._heard, []
        return torch.stack([balance_loss(*(x.unflatten(0, (batch, -1)) for x in pair)) for pair in heard]).mean()

    def forget(self) -> None:
        """What an activation checkpoint's second forward pass has said."""
        self._heard = []

    def close(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()


class BiasUpdate:
    """Counts the choices of every router of a model, and after each step moves the biases toward balance:

    .. math:: b_e \\leftarrow b_e + \\gamma \\, \\mathrm{sign}(\\bar{c} - c_e)

    with c_e the tokens that chose expert e in the step and c-bar their mean (Wang et al. 2024, arXiv 2408.15664, and
    Megatron-LM's ``get_updated_expert_bias``).

    rate   gamma, in units of the router's scores (0 to 1)
    world  the processes whose choices count together
    """

    def __init__(self, model: nn.Module, rate: float, world: World | None = None) -> None:
        self.rate, self.world = rate, world or World()
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self.counts = [torch.zeros_like(router.e_score_correction_bias) for router in self.routers]
        self._hooks = [
            router.register_forward_hook(lambda router, args, out, number=number: self._count(number, out[0]))
            for number, router in enumerate(self.routers)
        ]

    def _count(self, number: int, experts_TK: Tensor) -> None:
        if torch.is_grad_enabled():  # an evaluation in between is not training
            counts_E = self.counts[number]
            counts_E += torch.bincount(experts_TK.flatten(), minlength=len(counts_E))

    @torch.no_grad()
    def step(self) -> list[float]:
        """Move the biases and forget the counts; each router's largest load, as a multiple of the mean load."""
        peaks = []
        for router, counts_E in zip(self.routers, self.counts, strict=True):
            self.world.sum(counts_E)
            if self.rate:
                router.e_score_correction_bias += self.rate * torch.sign(counts_E.mean() - counts_E)
            peaks.append(float(counts_E.max() / counts_E.mean().clamp(min=1e-9)))
        self.forget()
        return peaks

    def forget(self) -> None:
        """Count anew."""
        for counts_E in self.counts:
            counts_E.zero_()

    def close(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()
