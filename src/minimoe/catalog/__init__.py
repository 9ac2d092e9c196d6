"""The real models, as data: their shapes, what was published about them, and where it was read.

    >>> from minimoe import catalog
    >>> catalog.model("nemotron-3-nano-30b-a3b").spec.count("attention")
    6

``models.json`` is the index. A model of the Nemotron-H family has its ``config.json`` beside it, with the
field names and values of the release; any other has its blocks in the form of :func:`spec_from_dict`.
``devices.json`` has GPUs and memories, ``files.json`` published GGUF files. Readers add entries of their own with a
file, see :mod:`.own`.
Imports no torch.
"""
from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from ..config import ConfigError, HybridConfig
from . import own
from .gguf_files import GGUFFile, files
from .hardware import Device, HostMemory, UnknownDevice, device, devices, host_memories, host_memory
from .own import CatalogError
from .shipped import shipped
from .spec import (
    MLP,
    MTP,
    ArchitectureSpec,
    Attention,
    Block,
    Mamba2,
    MoE,
    as_spec,
    spec_from_config,
    spec_from_dict,
)

__all__ = [
    "ArchitectureSpec", "Attention", "Block", "CatalogEntry", "CatalogError", "Device", "GGUFFile", "HostMemory", "MLP",
    "MTP", "Mamba2", "MoE", "Published", "UnknownDevice", "UnknownModel", "as_spec", "device", "devices",
    "files", "host_memories", "host_memory", "model", "models", "spec_from_config", "spec_from_dict",
]  # fmt: skip


class UnknownModel(ConfigError):
    """A name that the catalogue does not have; the message lists those it has."""


@dataclass(frozen=True)
class Published:
    """A figure that somebody else printed, and where."""

    value: float | int
    source: str


@dataclass(frozen=True)
class CatalogEntry:
    """A released model. ``source`` says where the shape is from; ``config`` is None outside Nemotron-H."""

    name: str
    spec: ArchitectureSpec
    config: HybridConfig | None
    published: Mapping[str, Published]
    source: str


def models() -> list[str]:
    """The names, in the order of the index, then those of the reader's own file."""
    return list(_index() | own.section("models"))


def model(name: str) -> CatalogEntry:
    """The entry of a name.

    Raises
    ------
    UnknownModel
        with the nearest name and all there are.
    CatalogError
        an entry of the reader's own file cannot be used.
    """
    mine = own.section("models")
    if name in mine:
        return _own_model(name, mine[name])
    if name not in _index():
        close = difflib.get_close_matches(str(name).lower(), models(), n=1, cutoff=0.5)
        close = close or [known for known in models() if str(name).lower() in known][:1]
        hint = f"; did you mean {close[0]}?" if close else ";"
        raise UnknownModel(f"unknown model {name!r}{hint} the catalogue has {', '.join(models())}")
    return _published_model(name)


@cache
def _published_model(name: str) -> CatalogEntry:
    item = _index()[name]
    config = None
    if "config" in item:
        config = HybridConfig.from_dict(shipped(item["config"]) | item.get("changes", {}))
        spec = spec_from_config(config, name)
    else:
        spec = spec_from_dict(name, shipped(item["spec"]))
    published = {key: Published(**figure) for key, figure in item["published"].items()}
    return CatalogEntry(name, spec, config, MappingProxyType(published), item["source"])


def _own_model(name: str, item: object) -> CatalogEntry:
    """A model of the reader's file: "config" or "spec" as an object, or as the path of a JSON file beside it."""
    path = own.own_file()
    where = f"{path}: models.{name}"
    item = own.fields(item, where, {"source": (str,)}, {"config": (dict, str), "spec": (dict, str), "published": (dict,)})
    if ("config" in item) == ("spec" in item):
        raise CatalogError(f"{where}: give config (of a Nemotron-H model) or spec (blocks of any other)")
    shape = item.get("config", item.get("spec"))
    figures = {key: Published(**own.fields(figure, f"{where}: published.{key}", {"value": (float,), "source": (str,)}))
               for key, figure in item.get("published", {}).items()}  # fmt: skip
    config = None
    try:
        if isinstance(shape, str):
            shape = json.loads((path.parent / shape).read_text(encoding="utf-8"))
        if "config" in item:
            config = HybridConfig.from_dict(shape)
        spec = spec_from_config(config, name) if config else spec_from_dict(name, shape)
    except KeyError as error:
        raise CatalogError(f"{where}: {error} is missing, or no kind or shape of that name exists") from None
    except (AttributeError, TypeError, ValueError, OSError) as error:
        raise CatalogError(f"{where}: {error}") from None
    return CatalogEntry(name, spec, config, MappingProxyType(figures), item["source"])


def _index() -> dict[str, Any]:
    return shipped("models.json")
