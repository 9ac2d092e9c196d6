"""Sliders over a Python function: live with a kernel, and live on a page that has none.

With a kernel `Explore` is a set of ipywidgets sliders. Its stored output also carries a table of every state, computed
by the same function, which a small script makes live on the rendered page. No formula is written twice. Without
JavaScript, on GitHub or in print, the plain table of the starting state remains.
"""

from __future__ import annotations

import html
import io
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as W

MAX_STATES, MAX_FIGURES, MAX_BYTES = 4096, 64, 400_000


def _text(value: Any) -> str:
    """A slider's value as text: 131072 becomes 131,072, and 0.30000000000000004 becomes 0.3."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{html.escape(k)}</th><td>{html.escape(v)}</td></tr>' for k, v in rows)
    return f'<table class="mm-table"><tbody>{body}</tbody></table>'


def _svg(fig: Any, alt: str) -> str:
    """A matplotlib figure as a labelled SVG that is the same bytes each time."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    if not alt.strip():
        raise ValueError("figure_alt returned an empty text; say what the figure shows")
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "minimoe"}):
        fig.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(fig)
    text = out.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(alt, quote=True)}"', 1)


class Explore(W.VBox):
    """One function of a few discrete values, with a slider for each.

    ``Explore(fn, title="GPU memory", dims={"bits": [4, 8, 16]})`` calls ``fn(bits=...)``, which returns
    ``{row label: value}`` with the same labels in every state.

    Parameters: ``dims`` maps each keyword of ``fn`` to the values that its slider takes; ``start`` gives starting
    values (default: the first of each); ``labels`` gives the text beside a slider, unit included; ``figure`` returns a
    matplotlib figure for the same keywords and needs ``figure_alt``, which says in words what that figure shows.

    Raises ValueError, in one line, for states that do not fit together or do not fit into a page: more than 4,096
    states, 64 figures or 400 kB.
    """

    def __init__(
        self,
        fn: Callable[..., Mapping[str, Any]],
        *,
        title: str,
        dims: Mapping[str, Sequence[Any]],
        start: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
        figure: Callable[..., Any] | None = None,
        figure_alt: Callable[..., str] | None = None,
    ) -> None:
        self._fn, self._title, self._draw, self._alt = fn, title, figure, figure_alt
        self._dims = {k: list(v) for k, v in dims.items()}
        self._start = {k: v[0] for k, v in self._dims.items() if v} | dict(start or {})
        self._labels = {k: k for k in self._dims} | dict(labels or {})
        self._check()
        self._cells = [self._rows(s) for s in self._states()]
        self._check_rows()
        self._out = W.HTML()
        self._sliders = {
            k: W.SelectionSlider(
                options=[(_text(x), x) for x in v], value=self._start[k], description=self._labels[k],
                continuous_update=figure is None, style={"description_width": "14em"}, layout={"width": "36em"},
            )
            for k, v in self._dims.items()
        }  # fmt: skip
        for s in self._sliders.values():
            s.observe(self._update, "value")
        super().__init__([W.HTML(f"<b>{html.escape(title)}</b>"), *self._sliders.values(), self._out])
        self._update()

    def _check(self) -> None:
        if not self._dims:
            raise ValueError("dims is empty: name at least one keyword of the function and its values")
        for k, v in self._dims.items():
            if not v:
                raise ValueError(f"dims[{k!r}] is empty: give the values that its slider takes")
            if len(set(map(_text, v))) < len(v):
                raise ValueError(f"dims[{k!r}] has two values that read alike: {', '.join(map(_text, v))}")
        for name, given in (("start", self._start), ("labels", self._labels)):
            for k in given:
                if k not in self._dims:
                    raise ValueError(f"{name}[{k!r}] has no slider; dims has {', '.join(self._dims)}")
        for k, v in self._start.items():
            if v not in self._dims[k]:
                raise ValueError(f"start[{k!r}] = {v!r} is not in dims[{k!r}]: {', '.join(map(_text, self._dims[k]))}")
        n = math.prod(len(v) for v in self._dims.values())
        most = MAX_FIGURES if self._draw else MAX_STATES
        if n > most:
            raise ValueError(f"{n:,} states; a page takes {most:,}{' with figures' if self._draw else ''}")
        if self._draw and self._alt is None:
            raise ValueError("figure needs figure_alt: a function that says in words what the figure shows")

    def _check_rows(self) -> None:
        first = [k for k, _ in self._cells[0]]
        for state, rows in zip(self._states(), self._cells, strict=True):
            if [k for k, _ in rows] != first:
                at = ", ".join(f"{k}={_text(v)}" for k, v in state.items())
                raise ValueError(f"rows at {at} are {[k for k, _ in rows]}, elsewhere {first}; give every state the same")

    def _states(self) -> list[dict[str, Any]]:
        return [dict(zip(self._dims, p, strict=True)) for p in itertools.product(*self._dims.values())]

    def _rows(self, values: Mapping[str, Any]) -> list[tuple[str, str]]:
        got = self._fn(**values)
        if not isinstance(got, Mapping) or not got:
            raise ValueError(f"the function returned {type(got).__name__} {got!r}; it must return {{row label: value}}")
        return [(str(k), _text(v)) for k, v in got.items()]

    def _figure(self, values: Mapping[str, Any]) -> str:
        return _svg(self._draw(**values), self._alt(**values)) if self._draw and self._alt else ""

    def _update(self, _: Any = None) -> None:
        self._out.value = _table(self._rows(self.values)) + self._figure(self.values)

    @property
    def values(self) -> dict[str, Any]:
        """Where the sliders stand."""
        return {k: s.value for k, s in self._sliders.items()}

    def payload(self) -> dict[str, Any]:
        """Every state, as the page gets it: the last slider varies fastest."""
        out: dict[str, Any] = {
            "title": self._title,
            "dims": [
                {"key": k, "label": self._labels[k], "values": list(map(_text, v)), "start": v.index(self._start[k])}
                for k, v in self._dims.items()
            ],
            "rows": [k for k, _ in self._cells[0]],
            "cells": [[v for _, v in rows] for rows in self._cells],
        }
        if self._draw:
            out["figures"] = [self._figure(s) for s in self._states()]
        return out

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        data, meta = bundle if isinstance(bundle, tuple) else (bundle, {})
        payload = self.payload()
        blob = json.dumps(payload, separators=(",", ":")).replace("</", "<\\/")
        if len(blob) > MAX_BYTES:
            raise ValueError(f"{len(blob):,} bytes of states; a page takes {MAX_BYTES:,}: fewer values or smaller figures")
        rows = self._rows(self._start)
        at = ", ".join(f"{self._labels[k]} {_text(v)}" for k, v in self._start.items())
        figure = f'<div class="mm-figure">{self._figure(self._start)}</div>' if self._draw else ""
        data = dict(data or {})
        data["text/html"] = (
            f'<div class="mm-explore"><p class="mm-lead"><strong>{html.escape(self._title)}</strong> at {html.escape(at)}</p>'
            f'{_table(rows)}{figure}<script type="application/json">{blob}</script></div>'
        )
        data["text/plain"] = f"{self._title} at {at}: " + "; ".join(f"{k} {v}" for k, v in rows)
        return data, meta
