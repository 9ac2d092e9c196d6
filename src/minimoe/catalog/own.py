"""The reader's own catalogue: one JSON file with models, files, GPUs and memories that this package does not list.

    {"devices": {"my-card": {"memory_gib": 12, "bus_bits": 192, "gigabits_per_pin": 15, "source": "its data sheet"}},
     "models": {"mine": {"config": "config.json", "source": "trained here"}}}

The environment variable MINIMOE_CATALOG names it (``minimoe plan --catalog FILE`` does too). Its sections have the form of
the catalogue's own files: ``models`` of models.json, with ``config`` or ``spec`` as an object or as the path of one beside
the file; ``files`` of files.json; ``devices``, ``host_memories`` and ``sources`` of devices.json. An entry wins over one of
the same name in the catalogue. Imports no torch.
"""
from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..config import ConfigError

VARIABLE = "MINIMOE_CATALOG"
SECTIONS: dict[str, type] = {"models": dict, "devices": dict, "host_memories": dict, "sources": dict, "files": list}
_WORDS = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object", list: "a list",
    type(None): "null",
}  # fmt: skip


class CatalogError(ConfigError):
    """A catalogue file that cannot be used; the message names the file, the key and the rule."""


def own_file() -> Path | None:
    """The reader's file, or None."""
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


@contextlib.contextmanager
def use(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Within, ``path`` is the reader's file; None changes nothing."""
    before = os.environ.get(VARIABLE)
    if path is not None:
        os.environ[VARIABLE] = os.fspath(path)
    try:
        yield
    finally:
        if path is not None:
            os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})


def section(name: str) -> Any:
    """A section of the reader's file as it stands there, empty without one. Entries are checked by who uses them.

    Raises
    ------
    CatalogError
        the file is missing, no JSON, or has a section that does not exist or is of the wrong type.
    """
    path = own_file()
    return SECTIONS[name]() if path is None else read(path).get(name, SECTIONS[name]())


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A catalogue file's sections, checked as a whole; read again when the file has changed."""
    path = Path(path)
    try:
        stamp = path.stat()
    except OSError as error:
        raise CatalogError(f"{path}: {error.strerror} ({VARIABLE} or --catalog names it)") from None
    return _read(path, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, _changed: int, _size: int) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CatalogError(f"{path}: not JSON: {error}") from None
    except OSError as error:
        raise CatalogError(f"{path}: {error.strerror}") from None
    return fields(data, str(path), {}, {name: (kind,) for name, kind in SECTIONS.items()})


def fields(
    item: object, where: str, required: Mapping[str, tuple[type, ...]], optional: Mapping[str, tuple[type, ...]] = {}
) -> dict[str, Any]:
    """An entry whose keys and types are right; ``where`` says in messages which one it is.

    Every number has to be above 0, and a whole number serves as a float; a key of value None counts as missing unless
    its types allow it.

    Raises
    ------
    CatalogError
        no object, a key that is missing, unknown (with the nearest that is known) or of the wrong type.
    """
    if not isinstance(item, dict):
        raise CatalogError(f"{where}: must be an object, this is {_WORDS.get(type(item), 'something else')}")
    known = {**required, **optional}
    for key, value in item.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; the keys are {', '.join(known)}"
            raise CatalogError(f"{where}: unknown key {key!r}{hint}")
        if not _fits(value, known[key]):
            wanted = " or ".join(_WORDS[kind] for kind in known[key])
            raise CatalogError(f"{where}: {key} must be {wanted}, not {json.dumps(value)[:60]}")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 < value < float("inf"):
            raise CatalogError(f"{where}: {key} must be a number above 0, not {value}")
    if missing := [key for key in required if key not in item]:
        raise CatalogError(f"{where}: {missing[0]} is missing")
    return dict(item)


def _fits(value: object, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)
