"""RMSNorm, and the gated form that Mamba-2 ends with.

RMSNorm divides a vector by its root mean square; unlike LayerNorm it subtracts no mean (Zhang & Sennrich 2019,
eq. 4). Matches transformers ``NemotronHRMSNorm`` and ``NemotronHRMSNormGated``.
"""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it already was: the dtype of everything that sums or exponentiates."""
    return x if x.dtype.itemsize >= 4 else x.float()


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which autocast leaves the products of x's device alone."""
    device = "cpu" if x.is_meta else x.device.type
    # to enter autocast costs as much as three small operations, which a decoded token would pay in every layer
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class RMSNorm(nn.Module):
    """``y = weight * x / sqrt(mean(x^2) + eps)`` over the last axis.

    Shapes: [..., D] -> [..., D], dtype of x; computed in at least float32, weight included.
    """

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.dtype == weight.dtype and x.dtype.itemsize >= 4:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        wide = at_least_float32(x)
        return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Mean-subtracting norm with a weight and no bias. Only for comparing MTP drafts with llama.cpp."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__(size, eps=eps, bias=False)


def gated_rms_norm(y_BLI: Tensor, gate_BLI: Tensor, weight_I: Tensor, groups: int, eps: float) -> Tensor:
    """``weight * rmsnorm_per_group(y * silu(gate))``.

    The gate comes first, then each of the G groups of I/G channels is normalised by itself: one RMS over the
    whole inner width would be another model. Result in at least float32 (I = inner width, H * P).
    """
    y_BLI = at_least_float32(y_BLI) * F.silu(at_least_float32(gate_BLI))
    width = y_BLI.shape[-1] // groups
    y = F.rms_norm(y_BLI.view(*y_BLI.shape[:-1], groups, width), (width,), eps=eps)
    return y.view(y_BLI.shape) * weight_I


class GatedRMSNorm(nn.Module):
    """Weight of :func:`gated_rms_norm`. Shapes: [B, L, I], [B, L, I] -> [B, L, I]."""

    def __init__(self, size: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.eps = groups, eps

    def forward(self, y_BLI: Tensor, gate_BLI: Tensor) -> Tensor:
        return gated_rms_norm(y_BLI, gate_BLI, self.weight, self.groups, self.eps)
