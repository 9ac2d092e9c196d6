"""The least time that a step can take: its bytes over a bandwidth, its operations over a rate. Imports no torch.

A ceiling is no prediction. It leaves out everything that is no bandwidth and no multiplication (launches, waiting,
caches that miss), so a measured speed lies below it, and one above it is wrong. The idea is the roofline of Williams,
Waterman and Patterson, "Roofline: an insightful visual performance model", CACM 52 (2009).
"""
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from ..catalog.spec import ArchitectureSpec, as_spec
from ..config import HybridConfig
from ..errors import MinimoeError
from .flops import flops_per_token
from .traffic import Traffic, step_traffic
from .weights import WeightBytes, weight_bytes

__all__ = ["Ceiling", "Memory", "Roof", "decode_ceiling", "prefill_ceiling", "ridge", "step_flops"]

UBATCH = 512  # tokens of a prompt that llama.cpp reads in one pass, unless told otherwise (-ub)


class Memory(Protocol):
    """What knows its bandwidth: a device of the catalogue (published), or a measurement of minimoe.bench.device."""

    @property
    def bytes_per_second(self) -> float:
        """Of reading."""


@dataclass(frozen=True)
class Roof:
    """A device as two rates: FLOP/s and bytes/s."""

    flop_per_second: float
    bytes_per_second: float

    @property
    def ridge(self) -> float:
        """FLOP a byte from which on arithmetic, not memory, is what one waits for."""
        return ridge(self.flop_per_second, self.bytes_per_second)

    def attainable(self, intensity: float) -> float:
        """FLOP/s at most, of work that does ``intensity`` FLOP with each byte."""
        return min(self.flop_per_second, intensity * self.bytes_per_second)

    def seconds(self, flops: float, moved: float) -> float:
        """The least time of work of so many FLOP and bytes; the two overlap, so the longer one counts."""
        return max(flops / self.flop_per_second, moved / self.bytes_per_second)


@dataclass(frozen=True)
class Ceiling:
    """The most tokens a second; ``parts`` are seconds of one step (of the whole prompt for prefill).

    ``bound``: the part that decides, "vram", "ram" or "compute". ``origin`` says what the bandwidths are: "given",
    "measured" or "published peak", for each memory that counts. ``traffic`` is that of the (last) step.
    """

    tokens_per_second: float
    seconds: float
    bound: str
    parts: dict[str, float]
    origin: dict[str, str]
    traffic: Traffic


def ridge(flop_per_second: float, bytes_per_second: float) -> float:
    """FLOP a byte at which a device's two bounds meet."""
    return flop_per_second / bytes_per_second


def step_flops(model: ArchitectureSpec | HybridConfig, context: int = 0, batch: int = 1, tokens: int = 1) -> float:
    """FLOPs of a step that reads ``tokens`` new tokens of each of ``batch`` sequences, after ``context`` others.

    As :func:`~minimoe.sizing.flops.flops_per_token` counts, but the head for the last token of each sequence only (the others
    of a prompt need no logits, and llama.cpp computes none).
    """
    spec = as_spec(model)
    kinds = dict(flops_per_token(spec, tokens, mtp=False).by_kind)
    head = kinds.pop("head")
    kinds["attention_scores"] = (_scores(spec, context + tokens) - _scores(spec, context)) / tokens
    return batch * (tokens * sum(kinds.values()) + head)


def decode_ceiling(
    model: ArchitectureSpec | HybridConfig,
    memory: Memory | float,
    quant: str | WeightBytes = "BF16",
    context: int = 0,
    batch: int = 1,
    kv_dtype: object = "f16",
    ram_blocks: Collection[int] | None = None,
    ram: Memory | float | None = None,
    flop_per_second: float | None = None,
) -> Ceiling:
    r"""The most tokens a second that ``batch`` sequences with ``context`` tokens each can get together.

    .. math::

        t \ge \max\left(\frac{\text{bytes in VRAM}}{\text{bandwidth}} + \frac{\text{bytes in RAM}}{\text{its bandwidth}},\;
                        \frac{\text{FLOP}}{\text{FLOP/s}}\right), \qquad
        \text{tokens per second} \le \frac{\text{batch}}{t}

    The times of two memories add, because layers run one after the other: while the experts of a block are read from
    RAM, VRAM has nothing to do. The bytes are those of :func:`~minimoe.sizing.traffic.step_traffic`. Without
    ``flop_per_second`` only memory counts, which at batch 1 is what decides on nearly every device.

    Parameters
    ----------
    memory, ram
        bytes/s, or something with ``bytes_per_second``: a device of the catalogue, or a measured bandwidth. ``ram`` is
        needed with ``ram_blocks``, the blocks whose routed experts are in the host's memory.
    flop_per_second
        a measured matrix product rate, for the roof over large batches.

    Raises
    ------
    MinimoeError
        a rate that is not above 0, ``ram_blocks`` without ``ram``, and what step_traffic refuses.
    """
    rates, origin = _rates(memory, ram, ram_blocks, flop_per_second)
    traffic = step_traffic(model, quant, context, batch, 1, kv_dtype, ram_blocks)
    parts = _parts(traffic, step_flops(model, context, batch), rates)
    return _ceiling(batch, parts, _least(parts), origin, traffic)


def prefill_ceiling(
    model: ArchitectureSpec | HybridConfig,
    memory: Memory | float,
    flop_per_second: float | None = None,
    tokens: int = 512,
    quant: str | WeightBytes = "BF16",
    context: int = 0,
    kv_dtype: object = "f16",
    ram_blocks: Collection[int] | None = None,
    ram: Memory | float | None = None,
    ubatch: int = UBATCH,
) -> Ceiling:
    """The most tokens a second at which a prompt of ``tokens`` tokens can be read, after ``context`` others.

    The prompt goes through the model in micro-batches of ``ubatch`` tokens. Each reads the weights again (of the experts
    those that so many tokens are expected to choose: nearly all), and the states. A micro-batch takes the longer of its
    arithmetic and its traffic; the times of micro-batches add.

    Experts in RAM are taken to be read once a micro-batch at ``ram``'s bandwidth. llama.cpp copies them to the GPU for
    that (op_offload), so the bandwidth of PCIe is what to give for ``ram`` if it is the lower one.

    Raises
    ------
    MinimoeError
        as :func:`decode_ceiling`; tokens or ubatch below 1.
    """
    for name, value in (("tokens", tokens), ("ubatch", ubatch)):
        if value < 1:
            raise MinimoeError(f"{name}={value}: must be 1 or more")
    rates, origin = _rates(memory, ram, ram_blocks, flop_per_second)
    spec = as_spec(model)
    weights = weight_bytes(spec, quant) if isinstance(quant, str) else quant
    parts, seconds = dict.fromkeys(rates, 0.0), 0.0
    for start in range(0, tokens, ubatch):
        new, before = min(ubatch, tokens - start), context + start
        traffic = step_traffic(spec, weights, before, 1, new, kv_dtype, ram_blocks)
        now = _parts(traffic, step_flops(spec, before, 1, new), rates)
        seconds += _least(now)
        parts = {name: parts[name] + now[name] for name in parts}
    return _ceiling(tokens, parts, seconds, origin, traffic)


def _scores(spec: ArchitectureSpec, length: int) -> float:
    """FLOPs of the scores of a whole sequence."""
    return length * flops_per_token(spec, length, mtp=False).by_kind.get("attention_scores", 0.0) if length else 0.0


def _rates(
    memory: Memory | float, ram: Memory | float | None, ram_blocks: Collection[int] | None, flops: float | None
) -> tuple[dict[str, float], dict[str, str]]:
    given = {"vram": memory, "ram": ram, "compute": flops}
    if ram is None and ram_blocks:
        raise MinimoeError("ram: give the bandwidth of the host's memory, because ram_blocks puts experts there")
    if ram_blocks is None:
        given.pop("ram")
    rates, origin = {}, {}
    for name, what in given.items():
        if what is None:
            continue
        number = isinstance(what, (int, float))
        rate = what if number else what.bytes_per_second
        if rate is None:
            raise MinimoeError(f"{name}: the bandwidth of {getattr(what, 'name', 'this memory')} is not known; give bytes a second")
        rates[name], origin[name] = float(rate), "given" if number else getattr(what, "origin", "measured")
        if not rates[name] > 0:
            raise MinimoeError(f"{name}: the rate must be above 0, not {rates[name]:g}")
    return rates, origin


def _parts(traffic: Traffic, flops: float, rates: dict[str, float]) -> dict[str, float]:
    work = {"vram": sum(traffic.vram.values()), "ram": sum(traffic.ram.values()), "compute": flops}
    return {name: work[name] / rate for name, rate in rates.items()}


def _least(parts: dict[str, float]) -> float:
    return max(parts["vram"] + parts.get("ram", 0.0), parts.get("compute", 0.0))


def _ceiling(tokens: int, parts: dict[str, float], seconds: float, origin: dict[str, str], traffic: Traffic) -> Ceiling:
    moving = parts["vram"] + parts.get("ram", 0.0)
    compute = parts.get("compute", 0.0)
    bound = "compute" if compute > moving else max(("vram", "ram"), key=lambda name: parts.get(name, 0.0))
    return Ceiling(tokens / seconds, seconds, bound, parts, origin, traffic)
