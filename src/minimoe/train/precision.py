"""Where bfloat16 pays."""
from __future__ import annotations

import torch


def autocast(device: torch.device, precision: str, width: int) -> torch.autocast:
    """The context of the forward pass of a model of ``width``; "auto" takes bfloat16 where it pays.

    Weights, norms, softmax, the recurrence, the router and, on a CPU, convolution and experts stay in float32: the
    layers say so where they are.
    """
    wanted = products_dtype(device, precision, width) == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def products_dtype(device: torch.device, precision: str, width: int) -> torch.dtype:
    """What the matrix products of :func:`autocast` run in."""
    wanted = precision == "bfloat16" or precision == "auto" and bfloat16_pays(device, width)
    return torch.bfloat16 if wanted else torch.float32


def bfloat16_pays(device: torch.device, width: int) -> bool:
    """Whether training in bfloat16 is faster there: tensor cores, or a CPU's tile unit (AMX) and matrices wide enough.

    Measured on one AMX core, a step in bfloat16 takes 0.8 times as long as in float32 at width 512, and 2 times as
    long at width 128, where converting costs more than multiplying.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and width >= 512 and torch.cpu._is_amx_tile_supported()
