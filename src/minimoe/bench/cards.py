"""Reader cards: one measured machine in one JSON file, ``results/cards/NAME.json``. Imports no torch.

README.md beside the cards describes each key; :func:`check` is what counts. A card carries no names of people or hosts and
no paths: texts that look like one are refused when it is read and when it is written.
"""
from __future__ import annotations

import datetime
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MinimoeError
from ..files import write_text

SCHEMA = 1
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
UNKNOWN_CACHE = 128 << 20  # bytes that may be cached where the system does not tell
CLOCKS = ("cpu", "wall")
UNITS = ("tokens/s", "s", "bytes", "J/token")
_PATH = re.compile(r"(?<![\w.)])(?:~|/(?:home|root|Users|tmp|mnt|media|work|opt|var|usr|data)\b)/?|[A-Za-z]:\\|\\\\|\w@\w")
_FOLDERS = re.compile(r"(?<![\w.)])(?!/(?:sys|proc)/)(?:~|[A-Za-z]:)?(?:[/\\]{1,2}[^\s/\\:'\",;]+)+[/\\]?")
_REASON = ("missing", "refused")
_NUMBERS = ("median", "p10", "p90", "n")
# key: (kinds, whether it must be there)
_TOP: dict[str, tuple[tuple[type, ...], bool]] = {
    "schema": ((int,), True), "name": ((str,), True), "date": ((str,), True), "minimoe": ((str,), True),
    "commit": ((str,), True), "machine": ((dict,), True), "versions": ((dict,), True), "settings": ((dict,), True),
    "bandwidth": ((dict,), True), "matmul": ((dict,), True), "launch_latency_s": ((float, type(None)), True),
    "round_trip_s": ((float, type(None)), False), "cpu_threads": ((dict,), True), "rows": ((list,), True),
}  # fmt: skip
_ROW: dict[str, tuple[tuple[type, ...], bool]] = {
    "runtime": ((str,), True), "model": ((str,), True), "format": ((str,), True), "device": ((str,), True),
    "threads": ((int,), True), "file_bytes": ((int,), True), "gpu_layers": ((int, type(None)), False),
    "cpu_moe": ((int,), False), "test": ((str,), True), "unit": ((str,), True), "tokens": ((int,), True),
    "depth": ((int,), True), "batch": ((int,), True), "median": ((float,), False), "p10": ((float,), False),
    "p90": ((float,), False), "n": ((int,), False), "clock": ((str,), False), "busy": ((float,), False), "ceiling": ((float,), False),
    "share": ((float,), False), "bound": ((str,), False), "moved_bytes": ((float,), False), "flops": ((float,), False),
    "missing": ((str,), False), "refused": ((str,), False), "no_ceiling": ((str,), False), "note": ((str,), False),
}  # fmt: skip


class CardError(MinimoeError):
    """A card that cannot be used; one line that names the file and the key."""


def folder() -> Path:
    """``results/cards`` of the checkout that this package runs from, else of the current directory."""
    root = Path(__file__).resolve().parents[3]
    return (root if (root / "results").is_dir() else Path.cwd()) / "results" / "cards"


def names() -> list[str]:
    """The cards in :func:`folder`."""
    return sorted(path.stem for path in folder().glob("*.json"))


def default_name(machine: Mapping[str, Any]) -> str:
    """From the device and today: "nvidia-geforce-rtx-3060-2026-11-22"."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"\([^)]*\)", " ", str(machine.get("device_name") or machine["device"])).lower())
    cores = [f"{machine['cores']}-cores"] if machine["device"] == "cpu" else []
    return "-".join([*words[:8], *cores, datetime.date.today().isoformat()])[:80]


def read(card: str | os.PathLike[str]) -> dict[str, Any]:
    """A card by its path, or by its name in :func:`folder`. Raises CardError for what is none."""
    path = Path(card)
    if NAME.fullmatch(str(card)) and not path.exists():
        path = folder() / f"{card}.json"
        if not path.is_file():
            there = ", ".join(names()) or "none"
            raise CardError(f"there is no card {str(card)!r}; give a file, or one of {there}")
    if not path.is_file():
        raise CardError(f"{path}: no such file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except ValueError as error:
        raise CardError(f"{path.name}: not JSON: {error}") from None
    try:
        return check(data)
    except CardError as error:
        raise CardError(f"{path.name}: {error}") from None


def write(card: Mapping[str, Any], path: Path, force: bool = False) -> Path:
    """Check a card and write it, whole or not at all. Raises CardError if it exists already and not ``force``."""
    check(card)
    if path.exists() and not force:
        raise CardError(f"{path} exists already; choose another name, or overwrite it with --force")
    text = json.dumps(card, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def check(card: Any) -> dict[str, Any]:
    """The card, if it is one of this schema. Raises CardError, with the key, for the first thing that is wrong."""
    if not isinstance(card, dict):
        raise CardError(f"a card is a JSON object, this is a {type(card).__name__}")
    if card.get("schema") != SCHEMA:
        raise CardError(f"schema: must be {SCHEMA}, not {card.get('schema')!r}; measure again with this minimoe")
    _fields("", card, _TOP)
    if not NAME.fullmatch(card["name"]):
        raise CardError(f"name: {card['name']!r} must be lower-case letters, digits, '.', '_' and '-', at most 80")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", card["date"]):
        raise CardError(f"date: {card['date']!r} must be YYYY-MM-DD")
    _rates("", card)
    for threads, rates in card["cpu_threads"].items():
        if not threads.isdigit() or not isinstance(rates, dict):
            raise CardError(f"cpu_threads.{threads}: must be a number of threads with its rates")
        _rates(f"cpu_threads.{threads}.", rates)
    for number, row in enumerate(card["rows"]):
        _row(f"rows[{number}]", row)
    _texts("", card)
    return card


def read_rate(bandwidth: Mapping[str, Any], size: float) -> tuple[float, bool]:
    """Bytes/s at which ``size`` bytes are read again and again, and whether that was measured at about this size.

    The rate of the largest buffer, or of one that is at most ``size`` and at least half of it, if that is higher: a few
    megabytes stay in a cache.
    """
    large = bandwidth["read_bytes_per_second"]
    near = [one for one in bandwidth.get("by_size", ()) if 0.5 * size <= one["buffer_bytes"] <= size]
    rate = max([large, *(one["read_bytes_per_second"] for one in near)])
    return rate, bool(near) or size > 4 * (bandwidth.get("cache_bytes") or UNKNOWN_CACHE)


def _row(where: str, row: Any) -> None:
    if not isinstance(row, dict):
        raise CardError(f"{where}: must be an object")
    _fields(f"{where}.", row, _ROW)
    told = [name for name in ("median", *_REASON) if name in row]
    if len(told) != 1:
        raise CardError(f"{where}: needs one of median, missing and refused, and has {', '.join(told) or 'none'}")
    if row["unit"] not in UNITS:
        raise CardError(f"{where}.unit: {row['unit']!r} must be one of {', '.join(UNITS)}")
    if row.get("clock", "cpu") not in CLOCKS:
        raise CardError(f"{where}.clock: {row['clock']!r} must be one of {', '.join(CLOCKS)}")
    if "median" not in row:
        return
    absent = [name for name in _NUMBERS if name not in row]
    if absent:
        raise CardError(f"{where}.{absent[0]}: is missing beside a median")
    if not 0 < row["p10"] <= row["median"] <= row["p90"]:
        raise CardError(f"{where}: needs 0 < p10 <= median <= p90")
    if "ceiling" in row and row["median"] > row["ceiling"]:
        raise CardError(f"{where}.median: is above its ceiling; such a row says refused, with the reason")


def _rates(where: str, rates: Mapping[str, Any]) -> None:
    bandwidth = rates.get("bandwidth")
    if not isinstance(bandwidth, dict) or not isinstance(rates.get("matmul"), dict):
        raise CardError(f"{where}bandwidth and {where}matmul: must be objects")
    if "missing" not in bandwidth:
        for name in ("read_bytes_per_second", "copy_bytes_per_second", "buffer_bytes"):
            if not _number(bandwidth.get(name)) or bandwidth[name] <= 0:
                raise CardError(f"{where}bandwidth.{name}: must be a number above 0")
    for dtype, found in rates["matmul"].items():
        rate = found.get("flop_per_second") if isinstance(found, dict) else None
        if not (_number(rate) and rate > 0) and not (isinstance(found, dict) and isinstance(found.get("missing"), str)):
            raise CardError(f"{where}matmul.{dtype}: needs flop_per_second above 0, or missing with the reason")


def _fields(where: str, data: Mapping[str, Any], known: Mapping[str, tuple[tuple[type, ...], bool]]) -> None:
    for name in data:
        if name not in known:
            raise CardError(f"{where}{name}: is no key of a card")
    for name, (kinds, needed) in known.items():
        if name not in data:
            if needed:
                raise CardError(f"{where}{name}: is missing")
            continue
        value = data[name]
        fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
        if not fits or isinstance(value, bool):
            words = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
            raise CardError(f"{where}{name}: must be {words}, not {str(value)[:40]!r}")


def _texts(where: str, value: Any) -> None:
    """No text that looks like somebody's path or address, no number that is none."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _texts(f"{where}.{name}".lstrip("."), name)
            _texts(f"{where}.{name}".lstrip("."), inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _texts(f"{where}[{number}]", inner)
    elif isinstance(value, float) and not math.isfinite(value):
        raise CardError(f"{where}: must be a finite number")
    elif isinstance(value, str) and _PATH.search(value):
        raise CardError(f"{where}: {value[:60]!r} looks like a path or an address, which a card does not carry")


def anonymous(text: str) -> str:
    """A message without the folders of files in it, for a row's reason."""
    text = _FOLDERS.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)
    return re.sub(r"\w+@\w[\w.]*", "...", text)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number")
