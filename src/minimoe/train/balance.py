"""Keeping the experts busy without a loss of its own: the router's correction bias, moved by counting.

A router that favours an expert trains it more, which makes it better, which makes the router favour it more. The bias
enters the choice only (see layers/moe.py), so moving it costs the model nothing that a gradient would fight for.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.moe import Router
from .world import World


class BiasUpdate:
    """Counts the choices of every router of a model, and after each step moves the biases toward balance:

    .. math:: b_e \\leftarrow b_e + \\gamma \\, \\mathrm{sign}(\\bar{c} - c_e)

    with c_e the tokens that chose expert e in the step and c-bar their mean (Wang et al. 2024, arXiv 2408.15664, and
    Megatron-LM's ``get_updated_expert_bias``; Nemotron 3 uses a rate of 1e-3).

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
