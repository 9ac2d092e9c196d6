"""What a training step holds in memory at its most: weights, gradients, moments, activations. Imports no torch."""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..config import HybridConfig
from ..errors import MinimoeError
from .activations import Pass, parts
from .parameters import count_parameters

PRODUCTS = {"float32": 4, "bfloat16": 2}  # bytes of a number that enters or leaves a matrix product


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes of one step of :class:`minimoe.train.loop.Training`; see :func:`training_bytes`.

    saved    what autograd keeps when a forward pass ends, by kind: embedding, mamba2, attention, moe, mlp, head, mtp
    peak     the most that is there at once
    peak_at  when: in the backward pass of that kind, or "end of forward", or "optimizer"
    """

    weights: int
    gradients: int
    moments: int
    saved: dict[str, int]
    peak: int
    peak_at: str

    @property
    def activations(self) -> int:
        return sum(self.saved.values())

    def fits(self, vram_bytes: float, reserve: float = 1e9) -> bool:
        """Whether the peak leaves ``reserve`` bytes to the screen, to CUDA and to gaps between the allocator's blocks."""
        return self.peak + reserve <= vram_bytes


def training_bytes(
    config: HybridConfig, batch: int, length: int, *, precision: str = "bfloat16", device: str = "cuda",
    accumulate: int = 1, recompute: bool = False, mtp: bool = True, documents: int | None = None,
) -> TrainingBytes:
    r"""Memory of a training step on ``batch`` windows of ``length`` tokens (2 or more), in ``accumulate`` parts.

    Weights, gradients and AdamW's two moments are float32: 16 bytes a weight. Activations come on top. The backward
    pass goes from the last part of the model to the first. While it is at part i,

    .. math:: \text{weights} + \text{moments} + \sum_{j < i} \text{saved}_j + \text{saved}_i + \text{flight}_i
        + \sum_{j > i} \text{gradients}_j

    are there, where ``flight`` are gradients that are being made (see ``activations.Part``). From
    the second of several parts on, the gradients of the one before are all there. The peak is the largest of these
    sums, or that at the end of the forward pass, or the optimizer's 16 bytes a weight.

    precision  "float32", or "bfloat16" for the products: their weights are then kept once more, in 2 bytes
    device     "cpu", or "cuda", whose fused RMSNorm (torch 2.9 or later) keeps one vector less, and where keys and
               values are repeated for each query head in float32 and with documents
    recompute  keep the input only of each trunk block; the rest comes back one block at a time
    mtp        train the MTP block, if the model has one
    documents  documents a window that are kept apart; None reads each window as one text

    Where experts are chosen in bfloat16 on a CPU, runs of rows are rounded up to multiples of 32: 15.5 rows an expert
    are counted, 31 is the bound. Not counted: what CUDA and its libraries take, gaps between the allocator's blocks,
    torch.compile, which keeps less, and a balance loss, which keeps a few numbers an expert and token.

    Raises
    ------
    MinimoeError
        a ValueError, for numbers below 1, parts that do not divide the batch, an unknown precision or device.
    TypeError
        for anything but a HybridConfig.
    """
    if not isinstance(config, HybridConfig):
        raise TypeError(f"expected a HybridConfig, got {type(config).__name__}")
    for name, value in {"batch": batch, "length": length, "accumulate": accumulate, "documents": documents}.items():
        if value is not None and value < 1:
            raise MinimoeError(f"{name}={value}: must be 1 or more")
    if batch % accumulate:
        raise MinimoeError(f"accumulate={accumulate}: must divide batch={batch}")
    if precision not in PRODUCTS:
        raise MinimoeError(f"precision={precision!r}: must be one of {', '.join(PRODUCTS)}")
    if device not in ("cpu", "cuda"):
        raise MinimoeError(f"device={device!r}: must be cpu or cuda")
    how = Pass(config, batch // accumulate, length, PRODUCTS[precision], device == "cpu", documents)
    model, count = parts(how, mtp), count_parameters(config)
    weights, gradients = 4 * (count.total + count.mtp), 4 * sum(part.weights for part in model)

    stream = 4 * config.hidden_size * how.tokens  # what passes from one block to the next, and its gradient
    kept = [stream if recompute and part.trunk else part.saved for part in model]
    lasting = weights + 2 * gradients + (how.batch * length**2 if documents else 0)  # one mask for all layers
    copies = sum(part.copies for part in model if recompute and part.trunk)  # held, though their blocks keep nothing
    earlier = gradients if accumulate > 1 else 0
    sums = {"end of forward": lasting + earlier + sum(kept) + copies, "optimizer": weights + 3 * gradients}
    for at, part in enumerate(model):
        behind = gradients + part.waiting if accumulate > 1 else 4 * sum(later.weights for later in model[at + 1 :])
        now = lasting + sum(kept[:at]) + part.saved + max(part.flight, 4 * part.weights) + stream + behind
        sums[part.kind] = max(now, sums.get(part.kind, 0))
    peak_at = max(sums, key=sums.__getitem__)
    saved: Counter[str] = Counter()
    for part, size in zip(model, kept, strict=True):
        saved[part.kind] += round(size)
    return TrainingBytes(weights, gradients, 2 * gradients, dict(saved), round(sums[peak_at]), peak_at)


def largest_batch(config: HybridConfig, length: int, vram_bytes: float, reserve: float = 1e9, **how: Any) -> int:
    """The most windows at once whose step fits into ``vram_bytes``; 0 if not even one does.

    how  as :func:`training_bytes` takes it; with ``accumulate``, the answer is the windows of one part
    """
    several = how.get("accumulate", 1)

    def fits(rows: int) -> bool:
        return training_bytes(config, rows * several, length, **how).fits(vram_bytes, reserve)

    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
