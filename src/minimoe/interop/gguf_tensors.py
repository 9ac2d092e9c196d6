"""Numbers of a tensor -> bytes of a GGUF file, and back."""
from __future__ import annotations

import math

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from ..config import HybridConfig
from .gguf_keys import GGUFError, Keys
from .gguf_names import Place, without_leading_ones

OWN_A_LOG = "minimoe.A_log"
SLAB = 1 << 22  # numbers that are converted at once
_FLOATS = {GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


def encode(place: Place, tensor: Tensor, shape: tuple[int, ...], kind: GGMLType) -> np.ndarray:
    """The bytes of a tensor in the file, as an array of any dtype.

    kind is F32, F16, BF16 or Q8_0; the bytes are those that llama.cpp's quantiser writes. Raises GGUFError for a
    number that is not finite there.
    """
    wide = tensor.detach().cpu().float().reshape(shape)
    if place.is_A:
        wide = -wide.exp()
    narrow = wide.to(_FLOATS.get(kind, torch.float32)).contiguous()
    # a block of Q8_0 has a float16 scale, its largest value over 127
    largest = 127 * torch.finfo(torch.float16).max if kind == GGMLType.Q8_0 else math.inf
    if not (narrow.isfinite().all() and wide.abs().max() <= largest):
        hint = "choose BF16 or F32" if wide.isfinite().all() else "it is not finite"
        raise GGUFError(f"tensor {place.ours} holds a number that {kind.name} cannot: {hint}")
    if kind == GGMLType.BF16:  # numpy has no such type
        return narrow.view(torch.int16).numpy()
    with np.errstate(all="ignore"):  # a block of numbers below 1e-36 has scale 0, whatever is computed on the way
        return gguf.quantize(narrow.numpy(), kind)


def decode(tensor: gguf.ReaderTensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor's numbers in ``dtype``, converted piece by piece; a copy, as somebody may overwrite the file."""
    found = tuple(int(size) for size in reversed(tensor.shape))
    if without_leading_ones(found) != without_leading_ones(shape):
        raise GGUFError(f"tensor {tensor.name} has shape {list(found)}, the file's keys ask for {list(shape)}")
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    values = torch.empty(shape, dtype=dtype)
    values_RC, step = values.view(len(rows), -1), max(1, SLAB // shape[-1])
    for at in range(0, len(rows), step):
        try:
            piece = gguf.dequantize(rows[at : at + step], tensor.tensor_type)
        except NotImplementedError:
            raise GGUFError(f"tensor {tensor.name} is of type {tensor.tensor_type.name}, which the gguf package cannot "
                            "turn back; take a file of another type") from None
        values_RC[at : at + step] = torch.from_numpy(np.array(piece, np.float32))
    return values


def own_A_logs(keys: Keys, config: HybridConfig) -> dict[str, Tensor]:
    """The exact A_log of each Mamba block of a file of ours, by the name of its A.

    llama.cpp reads A = -exp(A_log), and log(exp(x)) is not x in float32: so the file has both.
    """
    values = keys.read(OWN_A_LOG, list, [])
    blocks = [n for n, letter in enumerate(config.hybrid_override_pattern) if letter == "M"]
    if not values:
        return {}
    if len(values) != len(blocks) * config.mamba_num_heads or not all(isinstance(value, float) for value in values):
        raise GGUFError(f"key {OWN_A_LOG} has {len(values)} entries, not one for each Mamba head; export the model again")
    parts = torch.tensor(values, dtype=torch.float32).split(config.mamba_num_heads)
    return {f"blk.{n}.ssm_a": part for n, part in zip(blocks, parts)}


def to_A_log(name: str, A_H: Tensor, own_H: Tensor | None) -> Tensor:
    """log(-A), or our own A_log where it says the same: what the file computes with counts."""
    if not (A_H < 0).all():
        raise GGUFError(f"tensor {name} must be negative everywhere")
    A_log_H = (-A_H).log()
    if own_H is None:
        return A_log_H
    return torch.where(torch.isclose(-own_H.exp(), A_H, rtol=1e-6, atol=0.0), own_H, A_log_H)
