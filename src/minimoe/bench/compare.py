"""Cards side by side, each measured rate beside what that card's own bandwidth allows. Imports no torch."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .cards import read_rate
from .table import columns, label, value
from .variants import plural

KEY = ("model", "format", "runtime", "threads", "gpu_layers", "cpu_moe", "test", "depth", "batch")
SETTINGS = ("tasks", "depths", "batches", "rounds", "repeats", "quick", "threads_wait")


def compare(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"cards", "differences", "device", "rows"}.

    differences  settings and versions that the cards do not share, {what: [one of each card]}
    rows         a row of each test that any card has; "cells" has one a card: "median" and "share" of its ceiling where
                 it was measured, "at_most" where another card tells how many bytes it takes and this one how fast it
                 reads, or the reason why there is nothing
    """
    device = [
        {"what": what, "unit": unit, "values": [pick(card) for card in cards]} for what, unit, pick in _figures(cards)
    ]  # fmt: skip
    keys = dict.fromkeys(tuple(row.get(name) for name in KEY) for card in cards for row in card["rows"])
    rows = []
    for key in keys:
        found = [next((row for row in card["rows"] if tuple(row.get(name) for name in KEY) == key), None) for card in cards]
        one = next(row for row in found if row)
        cells = [_cell(row, card, found) for row, card in zip(found, cards)]
        rows.append(dict(zip(KEY, key)) | {"unit": one["unit"], "cells": cells})
    return {"cards": [card["name"] for card in cards], "differences": differences(cards), "device": device, "rows": rows}


def differences(cards: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Versions, settings, commits and machines that are not the same on all cards."""
    found: dict[str, list[Any]] = {}
    places = [("versions", name) for card in cards for name in card["versions"]]
    places += [("settings", name) for name in SETTINGS] + [("machine", name) for name in ("os", "device_name", "cores", "driver")]
    for place, name in dict.fromkeys(places):
        values = [card[place].get(name) for card in cards]
        if any(one != values[0] for one in values):
            found[f"{place}.{name}"] = values
    commits = [card["commit"] for card in cards]
    return found | ({"commit": commits} if len(set(commits)) > 1 else {})


def text(comparison: Mapping[str, Any]) -> str:
    """For people: differences first, then the device, then a table a variant."""
    cards = comparison["cards"]
    lines = ["Not the same on all cards:"] if comparison["differences"] else []
    lines += columns([[what, " | ".join("-" if one is None else str(one) for one in values)]
                      for what, values in comparison["differences"].items()]) if lines else []  # fmt: skip
    lines += [""] if lines else []
    rows = [[f["what"], *("-" if one is None else _number(one, f["unit"]) for one in f["values"])] for f in comparison["device"]]
    lines += _table([["device", *cards], *rows])
    last = None
    for row in comparison["rows"]:
        variant = f"{row['model']} {row['format']}, {row['runtime']}, {plural(row['threads'], 'thread')}"
        if variant != last:
            block = [r for r in comparison["rows"] if _same(r, row)]
            lines += ["", variant, *_table([["", *cards], *([label(r), *(_show(c, r["unit"]) for c in r["cells"])] for r in block)])]
            last = variant
    return "\n".join([*lines, "", "(share): of the most that the card's own measured bandwidth and products allow; "
                      "<=: that most, where it was not measured"])  # fmt: skip


def _cell(row: Mapping[str, Any] | None, card: Mapping[str, Any], others: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    if row and "median" in row:
        return {name: row[name] for name in ("median", "p10", "p90", "ceiling", "share", "bound") if name in row}
    cell = {name: row[name] for name in ("missing", "refused") if row and name in row}
    moved = next((other for other in others if other and other.get("moved_bytes")), None)
    if moved and "missing" not in card["bandwidth"] and "refused" not in cell:
        new = moved["tokens"] if moved["test"].startswith("pp") else 1
        rate, sure = read_rate(card["bandwidth"], moved["moved_bytes"])
        if sure:  # a few megabytes may fit that machine's cache, whose rate is then not known
            cell["at_most"] = moved["batch"] * new * rate / moved["moved_bytes"]
    return cell


def _figures(cards: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Any]]:
    found: list[tuple[str, str, Any]] = [
        ("read", "B/s", lambda card: card["bandwidth"].get("read_bytes_per_second")),
        ("copy", "B/s", lambda card: card["bandwidth"].get("copy_bytes_per_second")),
    ]
    for dtype in dict.fromkeys(dtype for card in cards for dtype in card["matmul"]):
        found.append((f"products, {dtype}", "FLOP/s", lambda card, d=dtype: card["matmul"].get(d, {}).get("flop_per_second")))
    return [*found, ("a call", "s", lambda card: card["launch_latency_s"])]


def _number(number: float, unit: str) -> str:
    return f"{1e6 * number:.2f} us" if unit == "s" else f"{number / 1e9:,.1f} G{unit}"


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("model", "format", "runtime", "threads"))


def _show(cell: Mapping[str, Any], unit: str) -> str:
    if "median" in cell:
        return value(cell["median"], unit) + (f" ({cell['share']:.0%})" if "share" in cell else "")
    if "refused" in cell:
        return "refused"
    return f"<= {value(cell['at_most'], unit)}" if "at_most" in cell else "-"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """:func:`columns`, also for a single card, whose rows have two cells."""
    return columns([[*row, ""] if len(row) == 2 else row for row in rows])
