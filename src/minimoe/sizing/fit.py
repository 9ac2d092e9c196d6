"""Will it fit: what of a model goes into which memory, and llama.cpp's flags for it. Imports no torch.

The only part of a model that can leave the GPU cheaply is its routed experts: most of the bytes, of which a token reads a
few per cent. Everything else is read whole for every token, so it stays (``-ngl 99``), and the experts of as many blocks as
must go into the host's memory (``--n-cpu-moe``).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..catalog import device as find_device
from ..catalog.hardware import Device
from ..catalog.spec import ArchitectureSpec, as_spec
from ..config import HybridConfig
from ..errors import MinimoeError
from .placement import Placement, pad
from .quants import TYPES, QuantError
from .roofline import Ceiling, Memory, decode_ceiling
from .traffic import expert_blocks
from .weights import WeightBytes, weight_bytes

RESERVE = 900_000_000  # estimate: CUDA's own share of a card, the driver's, and a desktop on it
HOST_RESERVE = 4_000_000_000  # estimate: what the system and other programs keep of a host's memory
NO_GPU = "no GPU"  # the name of a device that is the host's memory alone
# The quants worth comparing: no 32-bit, no older forms that a newer one of the same size beats, none for models that were
# trained in three values.
COMPARED = (
    "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4_MOE", "Q3_K_L",
    "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip
WHOLE = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0")  # the first of these that fits whole is the best one
FOUR_BITS = ("Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4_MOE")


@dataclass(frozen=True)
class Fallback:
    """What rows that no block divides cost a quant: its size, and what its recipe would weigh if all rows were divisible.

    ``share``: of the bytes, how much is in tensors with another type than the recipe's. ``columns``: their rows' lengths.
    """

    quant: str
    bytes: int
    intended_bytes: int
    share: float
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """A model in one quant on one machine; see :func:`plan`. All sizes are bytes.

    fits          "whole" (all of it on the device), "split" (the routed experts of ``ram_blocks`` in RAM) or "no"
    vram, ram     what is where, by name; "compute" and "reserve" are estimates
    ram_blocks    blocks of the file whose routed experts are in RAM; of ``expert_blocks``, all that have some
    max_context   the longest context with which this placement still fits, a multiple of 256 (0: none);
                  ``longest_context`` with the routed experts of all blocks in RAM
    ceiling       the most tokens a second with this context; None if no bandwidth is known
    why           what decided, in words
    """

    model: str
    quant: str
    context: int
    batch: int
    kv_dtype: str
    device: Device
    ram_bytes: int | None
    weights: WeightBytes
    fits: str
    vram: dict[str, int]
    ram: dict[str, int]
    ram_blocks: tuple[int, ...]
    expert_blocks: tuple[int, ...]
    max_context: int
    longest_context: int
    ceiling: Ceiling | None
    why: tuple[str, ...]

    @property
    def headroom(self) -> int:
        """Bytes that stay free on the device, estimates taken off; below 0: so many are missing."""
        return self.device.memory_bytes - sum(self.vram.values())

    @property
    def n_cpu_moe(self) -> int | None:
        """llama.cpp's N: it counts blocks from 0 to N - 1, whether they have experts or not. None: nothing to move."""
        return self.ram_blocks[-1] + 1 if self.ram_blocks else None

    @property
    def fallback(self) -> Fallback:
        return fallback(self.weights)

    @property
    def flags(self) -> tuple[str, ...]:
        """For llama-server. Never a lower -ngl: it would take whole blocks off the GPU, Mamba among them."""
        experts: tuple[str, ...] = ()
        if self.ram_blocks:
            every = self.ram_blocks == self.expert_blocks
            experts = ("--cpu-moe",) if every else ("--n-cpu-moe", str(self.n_cpu_moe))
        kind = () if self.kv_dtype == "f16" else ("-fa", "on", "-ctk", self.kv_dtype, "-ctv", self.kv_dtype)
        layers = "0" if self.device.name == NO_GPU else "99"
        return ("-ngl", layers, *experts, "-c", str(pad(self.context) * self.batch), "-np", str(self.batch), *kind, "--jinja")


def plan(
    model: ArchitectureSpec | HybridConfig,
    quant: str | WeightBytes,
    context: int,
    device: Device | str,
    reserve: float | None = None,
    ram: float | None = None,
    ram_memory: Memory | float | None = None,
    batch: int = 1,
    kv_dtype: str = "f16",
) -> Plan:
    """Place a model of one quant on a device: whole if it fits, else with the fewest blocks of experts in RAM.

    What is counted is in :class:`~minimoe.sizing.placement.Placement`: ``context`` tokens for each of ``batch`` sequences.
    Blocks go to RAM in the order of their number, because that is what ``--n-cpu-moe`` can say. On a device whose memory
    serves all processors (``unified``) there is nothing to split.

    Parameters
    ----------
    reserve
        bytes of the device for everything else; default: an estimate, 0.9 GB (with the compute buffer about 1.2), or 4 GB
        where memory is unified.
    ram
        bytes of host memory; None: not known, so every split is taken to fit. 4 GB of it are left to the system.
    ram_memory
        the host memory's bandwidth, as for :func:`~minimoe.sizing.roofline.decode_ceiling`.

    Raises
    ------
    MinimoeError
        unknown device or quant, and sizes below their least.
    """
    spec = as_spec(model)
    device = find_device(device) if isinstance(device, str) else device
    for name, value, least in (("context", context, 1), ("batch", batch, 1), ("reserve", reserve or 0, 0), ("ram", ram or 0, 0)):
        if value < least:
            raise MinimoeError(f"{name}={value}: must be {least} or more")
    weights = weight_bytes(spec, quant) if isinstance(quant, str) else quant
    owners = tuple(expert_blocks(spec, weights))
    kept = int((HOST_RESERVE if device.unified else RESERVE) if reserve is None else reserve)
    place = Placement(spec, weights, batch, kv_dtype, device.unified, kept)

    movable = () if device.unified else owners
    missing, count = place.needs(context) - device.memory_bytes, 0
    while missing > 0 and count < len(movable):
        missing -= place.experts[movable[count]]
        count += 1
    blocks = movable[:count]
    in_ram = place.ram(blocks)
    fits = "split" if blocks else "whole"
    if missing > 0 or (ram is not None and sum(in_ram.values()) + HOST_RESERVE > ram):
        fits = "no"
    ceiling = None
    if device.bytes_per_second and (ram_memory or not blocks):
        where = {} if device.unified else {"ram_blocks": blocks, "ram": ram_memory}
        ceiling = decode_ceiling(spec, device, weights, context, batch, kv_dtype, **where)
    return Plan(
        spec.name, weights.quant, context, batch, kv_dtype, device, None if ram is None else int(ram), weights, fits,
        place.device(context, blocks), in_ram, blocks, owners, place.longest(device.memory_bytes, blocks),
        place.longest(device.memory_bytes, movable), ceiling, tuple(_why(place, context, device, blocks, movable, ram)),
    )  # fmt: skip


def plans(
    model: ArchitectureSpec | HybridConfig, context: int, device: Device | str, quants: Sequence[str] = COMPARED, **options: object
) -> list[Plan]:
    """:func:`plan` for every quant that llama.cpp can make of a model, the largest first."""
    made = []
    for quant in quants:
        try:
            made.append(plan(model, quant, context, device, **options))  # type: ignore[arg-type]
        except QuantError:
            if len(quants) == 1:
                raise
    if not any(one.expert_blocks for one in made):
        made = [one for one in made if one.quant != "MXFP4_MOE" or len(quants) == 1]  # Q8_0 by another name
    return sorted(made, key=lambda one: -one.weights.total)


def choose(made: Sequence[Plan], published: Sequence[str] = ()) -> Plan | None:
    """The plan to begin with, None if nothing fits.

    Of what fits whole, the most bits up to eight. Else of the splits with four bits the one with the highest ceiling
    (the fewest bytes, where no bandwidth is known), ``published`` quants first; else the smallest that fits.
    """
    by_name = {one.quant: one for one in made if one.fits != "no"}
    for name in WHOLE:
        if name in by_name and by_name[name].fits == "whole":
            return by_name[name]
    four = [by_name[name] for name in FOUR_BITS if name in by_name]
    four = [one for one in four if one.quant in published] or four
    if four:
        return max(four, key=lambda one: (one.ceiling.tokens_per_second if one.ceiling else 0, -one.weights.total))
    return min(by_name.values(), key=lambda one: (one.weights.needs_importance, one.weights.total), default=None)


def fallback(weights: WeightBytes) -> Fallback:
    """What the row-length fallback does to a quant."""
    fell = weights.fallbacks
    extra = sum(tensor.bytes - tensor.numbers * TYPES[tensor.wanted][1] // TYPES[tensor.wanted][0] for tensor in fell)
    share = sum(tensor.bytes for tensor in fell) / weights.total
    return Fallback(weights.quant, weights.total, weights.total - extra, share, tuple(sorted({tensor.columns for tensor in fell})))


def _why(
    place: Placement, context: int, device: Device, blocks: Sequence[int], movable: Sequence[int], ram: float | None
) -> list[str]:
    """What decided, a sentence each."""
    spec, memory, said = place.spec, _gb(device.memory_bytes), []
    whole, needed, held = place.needs(context), place.needs(context, blocks), sum(place.ram(blocks).values())
    if spec.context and context > spec.context:
        said.append(f"A context of {context:,} is beyond the {spec.context:,} that the model declares; computed all the same.")
    if not blocks and needed <= device.memory_bytes:
        said.append(f"All of it fits: {_gb(whole)} of {memory}.")
    elif needed <= device.memory_bytes:
        said.append(f"All of it would take {_gb(whole)} of the device, which has {memory}: the routed experts of "
                    f"{len(blocks)} of {len(movable)} MoE blocks go to RAM, the fewest that make room.")  # fmt: skip
    elif movable:
        said.append(f"Even with all routed experts in RAM the rest takes {_gb(needed)} of the device, which has {memory}.")
    else:
        said.append(f"It takes {_gb(whole)}, and there are {memory}: a smaller quant, or a shorter context.")
    if ram is not None and held + HOST_RESERVE > ram:
        said.append(f"RAM would have to hold {_gb(held)}; with {_gb(HOST_RESERVE)} left to the system (an estimate) that is "
                    f"{_gb(held + HOST_RESERVE)}, and there are {_gb(ram)}.")  # fmt: skip
    if spec.mtp:
        said.append("The MTP block is not counted: llama.cpp loads it only for speculative decoding (--spec-type draft-mtp).")
    return said


def _gb(number: float) -> str:
    return f"{number / 1e9:.1f} GB"
