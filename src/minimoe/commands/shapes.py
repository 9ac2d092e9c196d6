"""A model named on the command line, as a shape: what ``inspect`` and ``plan`` share."""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .. import catalog
from ..config import PRESETS, ConfigError, HybridConfig
from . import UserError

HELP = "catalogue name, preset, config.json or its folder"


def find_shape(name: str) -> tuple[catalog.ArchitectureSpec, Mapping[str, catalog.Published], str]:
    """The spec of a catalogue model, a preset, a config.json or its folder; what was published; where it is from.

    Raises UserError or ConfigError, in one line, for a name or a file that is none of these.
    """
    if name in catalog.models():
        entry = catalog.model(name)
        return entry.spec, entry.published, entry.source
    if name in PRESETS:
        return catalog.spec_from_config(HybridConfig.preset(name), name), {}, "preset of this package"
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return catalog.spec_from_config(_read_config(path), str(path)), {}, str(path)
    if path.suffix == ".json" or len(path.parts) > 1:
        raise UserError(f"{path}: no such file")
    catalog.model(name)  # raises, with the names there are
    raise AssertionError("unreachable")


def _read_config(path: Path) -> HybridConfig:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a JSON object, this is a {type(data).__name__}")
    try:
        return HybridConfig.from_dict(data)
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:  # a value of a wrong type, such as a word for a number
        raise UserError(f"{path}: a value has the wrong type: {error}") from None
