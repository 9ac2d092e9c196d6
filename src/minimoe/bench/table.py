"""A card as text for people, and cards beside each other. Imports no torch."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .variants import plural

BUSY = 0.9  # share of the wall time below which somebody else had the core
_OF = {"memory": "bandwidth", "ram": "host's bandwidth", "compute": "products"}
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "int8"}


def text(card: Mapping[str, Any]) -> str:
    """The device, then a table a variant."""
    machine = card["machine"]
    lines = [f"{machine['device_name'] or machine['device']}, {card['date']}", *_device(card)]
    for (model, format_, runtime, threads), rows in _variants(card["rows"]).items():
        lines += ["", f"{model} {format_}, {runtime}, {plural(threads, 'thread')}"]
        lines += columns([["", "median", "p10", "p90", "n", "ceiling", "share"], *map(_row, rows)])
        lines += [*_remarks(rows, "note"), *_remarks(rows, "no_ceiling")]
    busy = [row["busy"] for row in card["rows"] if "busy" in row]
    if busy:
        lines += ["", "One thread: CPU seconds, which are wall seconds on a machine that does nothing else"
                  + (f" (other programs took up to {1 - min(busy):.0%} of the core)." if min(busy) < BUSY else ".")]
    load, threads = card["settings"]["load_before"], {row["threads"] for row in card["rows"]}
    if load is not None and load > 0.5 and threads - {1}:
        lines.append(f"Other programs were running (load {load:g}): with several threads these rates are too low.")
    return "\n".join(lines)


def columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as aligned lines: the first to the left, the others to the right. A row of two cells is a label
    with a text, which no column is made wide for."""
    full = [row for row in table if len(row) != 2]
    widths = [max(map(len, column)) for column in zip(*full)] or [0]
    widths[0] = max(len(row[0]) for row in table)
    lines = []
    for row in table:
        cells = row[1:] if len(row) == 2 else [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join([f"  {row[0].ljust(widths[0])}", *cells]).rstrip())
    return lines


def label(row: Mapping[str, Any]) -> str:
    """"tg128 at depth 4,096, batch 8, tokens/s"."""
    name = row["test"].replace("_", " ")
    name += f" at depth {row['depth']:,}" if row["depth"] and row["unit"] == "tokens/s" else ""
    return f"{name}, batch {row['batch']}" if row["batch"] > 1 else name


def value(number: float, unit: str) -> str:
    """With its unit, in three or four digits."""
    if unit == "s":
        return f"{1e3 * number:,.3g} ms" if number < 1 else f"{number:,.3g} s"
    if unit == "bytes":
        return f"{number / 1e6:,.0f} MB"
    digits = f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
    return f"{digits} {unit}"


def _device(card: Mapping[str, Any]) -> list[str]:
    found = card["cpu_threads"] if card["machine"]["device"] == "cpu" else {}
    parts = {plural(int(number), 'thread'): rates for number, rates in found.items()} or {"": card}
    if not found and card["cpu_threads"]:
        parts["host's CPU"] = list(card["cpu_threads"].values())[-1]
    names: list[str] = list(dict.fromkeys(dtype for rates in parts.values() for dtype in rates["matmul"]))
    table = [["", "read", "copy", *(_SHORT.get(name, name) for name in names), "a call"]] if parts else []
    missing = []
    for name, rates in parts.items():
        bandwidth = rates["bandwidth"]
        if "missing" in bandwidth:
            missing.append([name, f"not measured: {bandwidth['missing']}"])
            continue
        products = [_rate(rates["matmul"].get(dtype, {}).get("flop_per_second")) for dtype in names]
        launch = rates["launch_latency_s"]
        table.append([name, _gigabytes(bandwidth["read_bytes_per_second"]), _gigabytes(bandwidth["copy_bytes_per_second"]),
                      *products, f"{1e6 * launch:.2f} us" if launch else "-"])  # fmt: skip
    return columns([*table, *missing])


def _remarks(rows: Iterable[Mapping[str, Any]], name: str) -> list[str]:
    """Each remark once, with the tests that it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        if name in row:
            about.setdefault(row[name], []).append(label(row))
    return [f"  {name.replace('_', ' ')} ({', '.join(tests)}): {text}" for text, tests in about.items()]


def _row(row: Mapping[str, Any]) -> list[str]:
    unit = row["unit"]
    for word in ("missing", "refused"):
        if word in row:
            return [label(row), f"{'not measured' if word == 'missing' else word}: {row[word]}"]
    numbers = [value(row["median"], unit), *(value(row[name], unit).split(" ")[0] for name in ("p10", "p90"))]
    ceiling = value(row["ceiling"], unit).split(" ")[0] if "ceiling" in row else "-"
    share = f"{row['share']:.1%} of {_OF.get(row['bound'], row['bound'])}" if "share" in row else "-"
    return [label(row), *numbers, str(row["n"]), ceiling, share]


def _variants(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["model"], row["format"], row["runtime"], row["threads"]), []).append(row)
    return found


def _gigabytes(rate: float) -> str:
    return f"{rate / 1e9:,.1f} GB/s"


def _rate(rate: float | None) -> str:
    if rate is None:
        return "-"
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.0f} GFLOP/s"
