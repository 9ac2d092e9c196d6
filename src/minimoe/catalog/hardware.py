"""Memories and how fast they are read at most: GPUs, machines with one memory for all, and the host's RAM.

A figure here is a peak that follows from the data sheet, bus width times data rate. No program reaches it: a bandwidth
measured on the reader's own device (``minimoe bench``) always says more. Imports no torch.

(Not devices.py: a submodule of that name would hide the function ``catalog.devices``.)
"""
from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import ConfigError
from . import own
from .shipped import shipped

GIB = 1 << 30


class UnknownDevice(ConfigError):
    """A name that the catalogue does not have; the message has the nearest ones."""


@dataclass(frozen=True)
class Device:
    """A GPU, or a machine whose processors share one memory (``unified``).

    memory_bytes       as sold: a card of "12 GB" has 12 GiB. Error correction and the driver keep some of it: nvidia-smi
                       shows what is left, 15 of 16 GiB on a T4
    bytes_per_second   published peak; None if nobody said
    bus_bits, gigabits_per_pin   what the peak follows from, None where only the peak is printed
    """

    name: str
    memory_bytes: int
    bytes_per_second: float | None
    source: str
    bus_bits: int | None = None
    gigabits_per_pin: float | None = None
    compute_capability: str | None = None
    unified: bool = False
    origin: str = "published peak"


@dataclass(frozen=True)
class HostMemory:
    """A host's RAM: channels of 8 bytes each, times transfers a second."""

    name: str
    channels: int
    megatransfers_per_second: int
    origin: str = "published peak"

    @property
    def bytes_per_second(self) -> float:
        return self.channels * 8 * self.megatransfers_per_second * 1e6

    @property
    def source(self) -> str:
        return f"{self.channels} channels x 8 bytes x {self.megatransfers_per_second:,} million transfers/s"


def devices() -> list[str]:
    """The names, the reference card of this book first, a reader's own ones last."""
    return list(_devices())


def device(name: str) -> Device:
    """A device by name: ``rtx-3060``, ``RTX 3060`` or ``NVIDIA GeForce RTX 3060``.

    compute_capability is that of the generation, after NVIDIA's list for CUDA.

    Raises
    ------
    UnknownDevice
        with the nearest names.
    CatalogError
        an entry of the reader's own file cannot be used.
    """
    return _find(name, _devices(), "GPU", _device)


def host_memories() -> list[str]:
    """The names of the usual ones, two channels each: what an ordinary board has."""
    return list(_memories())


def host_memory(name: str) -> HostMemory:
    """A host's memory by name, such as ``ddr4-3200``; raises as :func:`device` does."""
    return _find(name, _memories(), "memory", _memory)


def _find(name: str, items: Mapping[str, Any], what: str, make: Any) -> Any:
    short = {_short(known): known for known in items}
    found = short.get(_short(name))
    if found is None:
        close = [short[key] for key in difflib.get_close_matches(_short(name), short, n=3, cutoff=0.5)]
        hint = f"; the nearest are {', '.join(close)}" if close else f"; the catalogue has {', '.join(items)}"
        raise UnknownDevice(f"unknown {what} {name!r}{hint}; {own.VARIABLE} can name a file with your own")
    return make(found, *items[found])


def _short(name: str) -> str:
    """What is left of a name without makers, spaces and hyphens; drivers print the whole one."""
    words = re.split(r"[^a-z0-9]+", str(name).lower())
    makers = {"nvidia", "geforce", "tesla", "amd", "radeon", "intel", "apple", "gpu", "tm", "r"}
    return "".join(word for word in words if word not in makers)


def _device(name: str, item: Any, where: str, sources: Mapping[str, str]) -> Device:
    item = own.fields(
        item, where, {"memory_gib": (float,), "source": (str,)},
        {"bus_bits": (int,), "gigabits_per_pin": (float,), "gb_per_second": (float,), "compute_capability": (str,), "unified": (bool,)},
    )  # fmt: skip
    bus, pin = item.get("bus_bits"), item.get("gigabits_per_pin")
    rate = item.get("gb_per_second")
    if (bus is None) != (pin is None) or (bus is None) == (rate is None):
        raise own.CatalogError(f"{where}: give bus_bits and gigabits_per_pin, or gb_per_second")
    peak = rate * 1e9 if rate is not None else bus / 8 * pin * 1e9
    return Device(
        name, int(item["memory_gib"] * GIB), peak, sources.get(item["source"], item["source"]), bus, pin,
        item.get("compute_capability"), item.get("unified", False),
    )  # fmt: skip


def _memory(name: str, item: Any, where: str, sources: Mapping[str, str]) -> HostMemory:
    return HostMemory(name, **own.fields(item, where, {"channels": (int,), "megatransfers_per_second": (int,)}))


def _devices() -> dict[str, tuple[Any, str, Mapping[str, str]]]:
    return _entries("devices")


def _memories() -> dict[str, tuple[Any, str, Mapping[str, str]]]:
    return _entries("host_memories")


def _entries(kind: str) -> dict[str, tuple[Any, str, Mapping[str, str]]]:
    """Name -> what the file says, which file and key that is, and its sources; a reader's own entry wins."""
    data = shipped("devices.json")
    entries = {name: (item, f"devices.json: {kind}.{name}", data["sources"]) for name, item in data[kind].items()}
    sources = own.section("sources")
    if odd := [name for name, text in sources.items() if not isinstance(text, str)]:
        raise own.CatalogError(f"{own.own_file()}: sources.{odd[0]}: must be a text")
    for name, item in own.section(kind).items():
        entries[name] = (item, f"{own.own_file()}: {kind}.{name}", sources)
    return entries
