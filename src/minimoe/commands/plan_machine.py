"""Which memories ``minimoe plan`` plans for, and where each figure about them is from."""
from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import catalog
from ..bench.host import nvidia_gpus
from ..catalog.hardware import GIB
from ..sizing.fit import NO_GPU
from . import UserError


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second, and what that figure is."""

    name: str
    bytes_per_second: float
    origin: str


@dataclass(frozen=True)
class Machine:
    """A device, the host's memory (``ram_bytes`` None: nobody said how much), and what was assumed about either."""

    device: catalog.Device
    ram: Bandwidth | None
    ram_bytes: int | None
    notes: tuple[str, ...]
    ram_notes: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--gpu", metavar="NAME", help="a device of the catalogue, such as rtx-3060 or dgx-spark, or none: RAM "
                         "only (default: the one that nvidia-smi shows)")
    machine.add_argument("--vram", type=float, metavar="GIB", help="its memory in GiB, what a card's \"12 GB\" means")
    machine.add_argument("--ram", type=float, metavar="GIB", help="the host's memory in GiB (default: not checked)")
    machine.add_argument("--memory", metavar="NAME", help="the host's memory, for its bandwidth (default: "
                         f"{catalog.host_memories()[0]}): {', '.join(catalog.host_memories())}")
    machine.add_argument("--bandwidth", type=float, metavar="GB/S", help="the device's memory bandwidth, if you measured it")
    machine.add_argument("--ram-bandwidth", type=float, metavar="GB/S", help="the host's memory bandwidth, if you measured it")
    machine.add_argument("--card", type=Path, metavar="FILE", help="a card that minimoe bench --save wrote: its bandwidth")
    machine.add_argument("--reserve", type=float, metavar="GB",
                         help="what to keep free on the device for all else (default: an estimate, 0.9; 4 where there is one memory)")


def find_machine(args: argparse.Namespace) -> Machine:
    """The machine that the arguments describe.

    A measured bandwidth (``--bandwidth``, ``--card``) wins over a published one.

    Raises UserError for contradictions and sizes that are not above 0, and what the catalogue raises.
    """
    for option in ("vram", "ram", "bandwidth", "ram_bandwidth"):
        value = getattr(args, option)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{option.replace('_', '-')} {value:g}: must be above 0")
    if args.reserve is not None and not 0 <= args.reserve < float("inf"):
        raise UserError(f"--reserve {args.reserve:g}: must be 0 or more")
    notes: list[str] = []
    ram_notes: list[str] = []
    measured = _card(args.card) if args.card else {}
    ram = _ram(args, measured, ram_notes)
    device = _device(args, ram, notes)
    rate = Bandwidth("--bandwidth", args.bandwidth * 1e9, "given") if args.bandwidth else measured.get("device")
    if rate and device.name != NO_GPU:
        device = dataclasses.replace(device, bytes_per_second=rate.bytes_per_second, origin=rate.origin)
    if device.unified:
        if args.ram and device.name != NO_GPU:
            raise UserError(f"--ram {args.ram:g}: {device.name} has one memory for all; --vram says how much of it")
        return Machine(device, None, None, (*notes, *(ram_notes if device.name == NO_GPU else ())))
    return Machine(device, ram, None if args.ram is None else int(args.ram * GIB), tuple(notes), tuple(ram_notes))


def _ram(args: argparse.Namespace, measured: dict[str, Bandwidth], notes: list[str]) -> Bandwidth:
    if args.ram_bandwidth:
        return Bandwidth("RAM", args.ram_bandwidth * 1e9, "given")
    if "ram" in measured and not args.memory:
        return measured["ram"]
    name = args.memory or catalog.host_memories()[0]
    memory = catalog.host_memory(name)
    if not args.memory:
        notes.append(f"RAM is taken to be {memory.name} in {memory.channels} channels; say yours with --memory or --ram-bandwidth.")
    return Bandwidth(memory.name, memory.bytes_per_second, memory.origin)


def _device(args: argparse.Namespace, ram: Bandwidth, notes: list[str]) -> catalog.Device:
    size = None if args.vram is None else int(args.vram * GIB)
    if args.gpu and args.gpu.lower() == "none":
        if args.vram or not args.ram:
            raise UserError("--gpu none: give the host's memory with --ram, and no --vram")
        return catalog.Device(NO_GPU, int(args.ram * GIB), ram.bytes_per_second, "--ram", unified=True, origin=ram.origin)
    if args.gpu:
        device = catalog.device(args.gpu)
        return dataclasses.replace(device, memory_bytes=size) if size else device
    if size is None:
        return _found(notes)
    like = next((card for card in map(catalog.device, catalog.devices()) if card.memory_bytes == size and not card.unified), None)
    name = "a GPU"
    if like is None:
        if not (args.bandwidth or args.card):
            notes.append("No speed is given, because no bandwidth is known: name the GPU with --gpu, or give --bandwidth.")
        return catalog.Device(name, size, None, "--vram")
    if not (args.bandwidth or args.card):
        notes.append(f"The bandwidth is taken to be that of an {like.name}, the first card of {args.vram:g} GiB in the "
                     "catalogue; say yours with --gpu or --bandwidth.")  # fmt: skip
    return dataclasses.replace(like, name=name)


def _found(notes: list[str]) -> catalog.Device:
    """The first GPU of this machine."""
    gpus, _ = nvidia_gpus()
    if not gpus or not gpus[0]["memory_bytes"]:
        raise UserError("nvidia-smi shows no GPU here: say what to plan for, --gpu NAME or --vram GIB (or --gpu none --ram GIB); "
                        f"the catalogue has {', '.join(catalog.devices())}")  # fmt: skip
    name, size = gpus[0]["name"], gpus[0]["memory_bytes"]
    notes.append(f"This machine's GPU: {name}, {size / GIB:.1f} GiB.")
    try:
        return dataclasses.replace(catalog.device(name), memory_bytes=size)
    except catalog.UnknownDevice:
        notes.append("No speed is given, because the catalogue does not know its bandwidth: give --bandwidth or --card.")
        return catalog.Device(name, size, None, "nvidia-smi")


def _card(path: Path) -> dict[str, Bandwidth]:
    """The measured bandwidth of a reader card, as that of the GPU or, of a card from a CPU, of RAM."""
    try:
        card: Any = json.loads(path.read_text(encoding="utf-8"))
        rate = card["bandwidth"]["read_bytes_per_second"]
        on = str(card.get("machine", {}).get("device", ""))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: no card of minimoe bench: bandwidth.read_bytes_per_second is missing") from None
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
        raise UserError(f"{path}: bandwidth.read_bytes_per_second must be a number above 0")
    return {"ram" if on.startswith("cpu") else "device": Bandwidth(path.stem, float(rate), "measured")}
