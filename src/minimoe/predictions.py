"""The reader's guesses, kept, shown beside the bound and the measurement, and scored.

Guesses live in one small JSON file in the user's data directory, or where MINIMOE_PREDICTIONS says. Under the ci
profile they stay in memory, so that stored outputs never depend on whose machine made them.
"""

from __future__ import annotations

import html
import json
import math
import os
import pathlib
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .files import write_text
from .profiles import stated

_memory: dict[str, dict[str, Any]] = {}


def path() -> pathlib.Path:
    """The file that holds the guesses."""
    if named := os.environ.get("MINIMOE_PREDICTIONS"):
        return pathlib.Path(named).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or pathlib.Path.home() / "AppData/Local"
    elif sys.platform == "darwin":
        base = pathlib.Path.home() / "Library/Application Support"
    else:
        base = os.environ.get("XDG_DATA_HOME") or pathlib.Path.home() / ".local/share"
    return pathlib.Path(base) / "minimoe" / "predictions.json"


def _load() -> dict[str, dict[str, Any]]:
    if stated() == "ci":
        return _memory
    try:
        data = json.loads(path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise ValueError(f"{path()} cannot be read as predictions ({e}); mend or delete it") from None
    if not isinstance(data, dict) or not all(isinstance(v, dict) and "value" in v for v in data.values()):
        raise ValueError(f"{path()} does not hold predictions; mend or delete it")
    return data


def _save(data: dict[str, dict[str, Any]]) -> None:
    if stated() == "ci":
        return
    target = path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False))
    except OSError as e:
        raise OSError(f"cannot keep predictions in {target} ({e.strerror}); set MINIMOE_PREDICTIONS to another file") from None


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return number


def _show(value: float | None, unit: str) -> str:
    if value is None:
        return "none"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


@dataclass(frozen=True)
class Comparison:
    """A prediction with what is known about it; shows itself as a small table."""

    key: str
    unit: str = ""
    prediction: float | None = None
    bound: float | None = None
    measured: float | None = None

    @property
    def ratio(self) -> float | None:
        """measured / prediction; None where either is missing or the prediction is 0."""
        return _ratio(self.measured, self.prediction)

    @property
    def score(self) -> float | None:
        """|log2(measured / prediction)|: 0 for a perfect guess, 1 for one that is half or twice the measurement.

        None where either is missing or not above 0, since a ratio says nothing there.
        """
        if self.prediction is None or self.measured is None or min(self.prediction, self.measured) <= 0:
            return None
        return abs(math.log2(self.measured) - math.log2(self.prediction))

    @property
    def of_bound(self) -> float | None:
        """measured / bound; None where either is missing or the bound is 0."""
        return _ratio(self.measured, self.bound)

    def rows(self) -> list[tuple[str, str]]:
        """What the table says, as (label, text)."""
        rows = [("your prediction", _show(self.prediction, self.unit))]
        if self.bound is not None:
            rows.append(("bound", _show(self.bound, self.unit)))
        rows.append(("measured", _show(self.measured, self.unit)))
        for label, r in (("measured / prediction", self.ratio), ("measured / bound", self.of_bound)):
            if r is not None:
                rows.append((label, f"{r:.2f}" if 0.01 <= abs(r) < 100 else f"{r:.2g}"))
        return rows

    def _repr_html_(self) -> str:
        body = "".join(f'<tr><th scope="row">{k}</th><td>{html.escape(v)}</td></tr>' for k, v in self.rows())
        return f'<div class="mm-card mm-compare"><table class="mm-table"><tbody>{body}</tbody></table></div>'

    def __repr__(self) -> str:
        return " | ".join(f"{k}: {v}" for k, v in self.rows())


class Scored(list[Comparison]):
    """A list of comparisons that shows itself as one table, with the score of each and the median of all."""

    COLUMNS = ("question", "prediction", "bound", "measured", "measured / prediction", "score")
    EMPTY = "No predictions are stored on this machine yet."

    @property
    def median(self) -> float | None:
        """The median of all scores; None if there are none."""
        scores = [c.score for c in self if c.score is not None]
        return statistics.median(scores) if scores else None

    @property
    def verdict(self) -> str:
        """What the scores say, in a line."""
        scores, open_ = sum(c.score is not None for c in self), sum(c.measured is None for c in self)
        lost = len(self) - scores - open_
        said = ["No question has a score yet"]
        if self.median is not None:
            off = f"{2 ** min(self.median, 1000):.3g} times off"  # a float ends at 2**1024
            said = [f"Median score of {_count(scores, 'question')}: {self.median:.2f}, which is {off}"]
        if open_:
            said.append(f"{_count(open_, 'question')} not measured yet")
        if lost:
            said.append(f"{_count(lost, 'question')} without a score, because the guess or the measurement is not above 0")
        return "; ".join(said) + "."

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (c.key, _show(c.prediction, c.unit), "" if c.bound is None else _show(c.bound, c.unit),
             _show(c.measured, c.unit), "" if c.ratio is None else f"{c.ratio:.2g}", "" if c.score is None else f"{c.score:.2f}")
            for c in self
        ]  # fmt: skip

    def _repr_html_(self) -> str:
        if not self:
            return f'<p class="mm-volatile">{self.EMPTY}</p>'
        rows = ([html.escape(text) for text in row] for row in self._cells())
        return f'<div class="mm-card">{html_table(self.COLUMNS, rows)}<p>{html.escape(self.verdict)}</p></div>'

    def __repr__(self) -> str:
        if not self:
            return self.EMPTY
        return "\n".join([*(" | ".join(row) for row in [self.COLUMNS, *self._cells()]), self.verdict])


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def html_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are HTML already; the first of a row is its heading."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{x}</td>" if n else f'<th scope="row">{x}</th>' for n, x in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<table class="mm-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def predict(key: str, value: float, unit: str = "") -> None:
    """Store a guess under ``key``; a later guess replaces it and drops what was measured for the old one.

    ``key`` names chapter and question ("02-kv-32k"); ``value`` is a finite number in ``unit``.
    """
    if not isinstance(key, str) or not key.strip():
        raise ValueError(f"key must be a non-empty text, got {key!r}")
    guess = {"value": _number(f"the prediction for {key!r}", value), "unit": unit}
    data = _load()
    old = data.get(key, {})
    same = {k: old.get(k) for k in guess} == guess
    data[key] = old if same else guess
    _save(data)


def compare(key: str, bound: float | None = None, measured: float | None = None, unit: str | None = None) -> Comparison:
    """Set the guess stored under ``key`` beside a bound and a measurement, and keep both with it.

    Works without a guess too, for a reader who skipped the question: that row says so.
    """
    data = _load()
    entry = data.get(key, {})
    if unit is not None and entry and entry["unit"] != unit:
        raise ValueError(f"{key!r} was predicted in {entry['unit']!r} and compared in {unit!r}; use one unit")
    found = {k: _number(f"{k} for {key!r}", v) for k, v in (("bound", bound), ("measured", measured)) if v is not None}
    if entry:
        data[key] = entry = entry | found
        _save(data)
    known = {k: entry.get(k, found.get(k)) for k in ("bound", "measured")}
    return Comparison(key, entry.get("unit", unit or ""), entry.get("value"), **known)


def scored() -> Scored:
    """Every stored prediction with what has been measured for it, by key."""
    data = _load()
    return Scored(
        Comparison(k, v.get("unit", ""), v["value"], v.get("bound"), v.get("measured")) for k, v in sorted(data.items())
    )
