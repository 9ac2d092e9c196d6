"""The real models, as data: their shapes, what was published about them, and where it was read.

    >>> from minimoe import catalog
    >>> catalog.model("nemotron-3-nano-30b-a3b").spec.count("attention")
    6

``models.json`` is the index. A model of the Nemotron-H family has its ``config.json`` beside it, with the
field names and values of the release; any other has its blocks in the form of :func:`spec_from_dict`.
Imports no torch.
"""
from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from ..config import ConfigError, HybridConfig
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
    "MLP", "MTP", "ArchitectureSpec", "Attention", "Block", "CatalogEntry", "Mamba2", "MoE", "Published",
    "UnknownModel", "as_spec", "model", "models", "spec_from_config", "spec_from_dict",
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
    """The names, in the order of the index."""
    return list(_index())


@cache
def model(name: str) -> CatalogEntry:
    """The entry of a name; raises :class:`UnknownModel`."""
    index = _index()
    if name not in index:
        close = difflib.get_close_matches(str(name).lower(), index, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ";"
        raise UnknownModel(f"unknown model {name!r}{hint} the catalogue has {', '.join(index)}")
    item = index[name]
    config = None
    if "config" in item:
        config = HybridConfig.from_dict(_read(item["config"]) | item.get("changes", {}))
        spec = spec_from_config(config, name)
    else:
        spec = spec_from_dict(name, _read(item["spec"]))
    published = {key: Published(**figure) for key, figure in item["published"].items()}
    return CatalogEntry(name, spec, config, MappingProxyType(published), item["source"])


@cache
def _index() -> dict[str, Any]:
    return _read("models.json")


def _read(file: str) -> Any:
    return json.loads(resources.files(__name__).joinpath(file).read_text(encoding="utf-8"))
