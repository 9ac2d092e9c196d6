"""Which experts the routers choose: whether all of them work, or a few do everything."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.moe import Router


@contextmanager
def counted_choices(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Counts every router's choices of whatever the model computes inside:

        with counted_choices(model) as counts:
            evaluate(model, tokens)

    counts[name] is [E] int64, the name that of the layer ("model.layers.1.mixer", "mtp.layers.1.mixer").
    """
    counts: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, Router):
            counts_E = torch.zeros(len(module.weight), dtype=torch.int64, device=module.weight.device)
            counts[name.removesuffix(".gate")] = counts_E
            hooks.append(module.register_forward_hook(_counter(counts_E)))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _counter(counts_E: Tensor):
    def count(router: nn.Module, args: object, out: tuple[Tensor, Tensor, Tensor]) -> None:
        counts_E.add_(torch.bincount(out[0].flatten(), minlength=len(counts_E)))

    return count


@dataclass(frozen=True)
class Load:
    """How one router spreads its choices over E experts.

    shares   of all choices, an expert each; 1 / E everywhere is balance
    peak     the busiest expert's share as a multiple of 1 / E: 1 is balance, E / K the worst with K choices a token
    entropy  bits; log2(E) is balance
    """

    shares: list[float]
    peak: float
    entropy: float

    @property
    def experts_at_work(self) -> float:
        """2 ** entropy: so many experts, equally busy, would be as uncertain to guess."""
        return 2**self.entropy


def load(counts_E: Tensor) -> Load:
    """The :class:`Load` of one router's counts. Raises ValueError if it chose nothing."""
    if not int(counts_E.sum()):
        raise ValueError("this router has not chosen anything: run the model inside counted_choices first")
    shares_E = counts_E.double() / counts_E.sum()
    used = shares_E[shares_E > 0]
    return Load(shares_E.tolist(), float(shares_E.max() * len(shares_E)), float(-(used * used.log2()).sum()))
