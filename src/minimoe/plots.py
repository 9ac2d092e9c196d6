"""Figures that read in print, in light and dark mode, and for colour-blind readers.

Figures have a white ground everywhere. The site's style sheet inverts them in dark mode and turns the hues back, so
that a blue line stays blue on a dark ground; nothing here needs to know which mode a reader has. Series differ by
marker and line as well as by colour. Saved files have no date and no random ids: the same figure is the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Okabe and Ito's colours without their yellow, which has 1.3:1 contrast on white.
COLORS = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "orange": "#E69F00",
    "black": "#000000",
}
GREY = "#595959"  # 7:1 on white, for bounds and notes


def rc() -> dict[str, Any]:
    """The matplotlib settings of the book."""
    from cycler import cycler

    names = ["blue", "vermillion", "green", "purple", "sky", "orange"]
    marks = cycler(color=[COLORS[n] for n in names], marker=["o", "s", "^", "D", "v", "P"]) + cycler(
        linestyle=["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1))]
    )
    return {
        "figure.figsize": (5.4, 3.2), "figure.dpi": 144, "figure.facecolor": "white", "savefig.facecolor": "white",
        "figure.constrained_layout.use": True, "font.size": 11, "font.family": "DejaVu Sans",
        "axes.prop_cycle": marks, "axes.facecolor": "white", "axes.edgecolor": GREY, "axes.titlesize": 11,
        "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "#d9d9d9", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.8,
        "lines.markersize": 4.5, "legend.frameon": False, "legend.fontsize": 10, "image.cmap": "Blues",
        "svg.hashsalt": "minimoe", "svg.fonttype": "none",
    }  # fmt: skip


def use() -> None:
    """Apply the book's style to the whole notebook. Call it once, in the first cell that plots."""
    import matplotlib as mpl

    mpl.rcParams.update(rc())


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The book's style for one block, for figures that are saved or shown inside it."""
    import matplotlib as mpl

    with mpl.rc_context(rc()):
        yield


def figure(xlabel: str, ylabel: str, *, title: str = "", xscale: str = "linear", yscale: str = "linear", **kwargs: Any):
    """``fig, ax`` with both axes labelled; put the unit into the label: "context [tokens]".

    ``xscale`` and ``yscale`` are matplotlib's, and "log2" for powers of two with plain numbers. ``kwargs`` go to
    ``plt.subplots``. Raises ValueError without labels.
    """
    import matplotlib.pyplot as plt

    if not xlabel.strip() or not ylabel.strip():
        raise ValueError("a figure needs both axes labelled, with the unit: xlabel='context [tokens]'")
    fig, ax = plt.subplots(**kwargs)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    for axis, scale in (("x", xscale), ("y", yscale)):
        if scale == "log2":
            getattr(ax, f"set_{axis}scale")("log", base=2)
            getattr(ax, f"{axis}axis").set_major_formatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}")
        else:
            getattr(ax, f"set_{axis}scale")(scale)
    return fig, ax


def spread(ax: Any, x: Sequence[float], runs: Any, label: str, **kwargs: Any) -> Any:
    """The median of several runs as a line, and from the least to the greatest as a band. ``runs``: [seeds, points]."""
    runs = np.atleast_2d(np.asarray(runs, dtype=float))
    if runs.shape[1] != len(x):
        raise ValueError(f"runs has {runs.shape[1]} points a run, x has {len(x)}")
    (line,) = ax.plot(x, np.median(runs, axis=0), label=label, **kwargs)
    ax.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0)
    return line


def bound(ax: Any, y: float | Sequence[float], label: str, x: Sequence[float] | None = None) -> Any:
    """A limit from arithmetic or physics, as a thin grey line without markers: flat, or over ``x``."""
    look = {"color": GREY, "linestyle": "--", "linewidth": 1.2, "marker": "", "label": label}
    return ax.axhline(y, **look) if x is None else ax.plot(x, y, **look)[0]


def bars(
    values: Mapping[str, float],
    xlabel: str,
    *,
    title: str = "",
    fmt: str = "{:.3g}",
    marks: Mapping[str, float] | None = None,
):
    """``fig, ax`` of horizontal bars in the given order, each with its value; ``marks`` draws a bound across a bar."""
    import matplotlib.pyplot as plt

    if not xlabel.strip():
        raise ValueError("bars need a label with the unit: xlabel='weights [GiB]'")
    fig, ax = plt.subplots(figsize=(5.4, 0.7 + 0.4 * len(values)))
    ax.set(xlabel=xlabel, title=title)
    names = list(values)
    drawn = ax.barh(range(len(names)), list(values.values()), color=COLORS["blue"], height=0.62)
    ax.bar_label(drawn, labels=[fmt.format(v) for v in values.values()], padding=3, fontsize=9)
    for name, at in (marks or {}).items():
        i = names.index(name)
        ax.plot([at, at], [i - 0.4, i + 0.4], color=COLORS["vermillion"], linestyle="-", marker="", linewidth=2.2)
    _named_rows(ax, values)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.12)
    return fig, ax


def heat(matrix: Any, xlabel: str, ylabel: str, *, value: str, title: str = "", **kwargs: Any):
    """``fig, ax`` of a matrix as colours, with a bar that says what they mean; ``value`` is its label, with unit.

    Zero is the ground's colour in both modes (white, inverted to dark), so that more ink is more value.
    """
    fig, ax = figure(xlabel, ylabel, title=title)
    image = ax.imshow(np.asarray(matrix), aspect="auto", interpolation="nearest", **kwargs)
    fig.colorbar(image, ax=ax, label=value)
    ax.grid(False)
    return fig, ax


def strips(rows: Mapping[str, Sequence[tuple[str, float]]], colors: Mapping[str, str], xlabel: str, ylabel: str, **kwargs: Any):
    """``fig, ax`` with a row for each name: a thin upright bar for each ``(kind, height)``, in order.

    ``height`` is a part of the row, 0 to 1. ``colors`` maps each kind to a name of :data:`COLORS` and gives the
    legend's order. ``kwargs`` go to :func:`figure`.
    """
    from matplotlib.patches import Patch

    fig, ax = figure(xlabel, ylabel, **kwargs)
    for row, bars in enumerate(rows.values()):
        for kind in dict.fromkeys(kind for kind, _ in bars):
            at, heights = zip(*((i, height) for i, (k, height) in enumerate(bars) if k == kind))
            ax.bar(at, heights, 0.8, [row - height / 2 for height in heights], color=COLORS[colors[kind]])
    _named_rows(ax, rows)
    ax.grid(False)
    used = {kind for bars in rows.values() for kind, _ in bars}
    handles = [Patch(color=COLORS[color], label=kind) for kind, color in colors.items() if kind in used]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=1, columnspacing=1.2)
    return fig, ax


def stacked(ax: Any, rows: Mapping[str, Mapping[str, float]], colors: Mapping[str, str], *, least: float = 0.09) -> None:
    """Horizontal bars of shares in percent, a row for each name, its parts side by side in the order of ``colors``.

    ``colors`` maps each part to a name of :data:`COLORS`. Parts from ``least`` of a row on have their percent inside.
    """
    for row, parts in enumerate(rows.values()):
        left, total = 0.0, sum(parts.values())
        for part, color in colors.items():
            share = 100 * parts.get(part, 0) / total
            ax.barh(row, share, 0.66, left, color=COLORS[color], edgecolor="white", linewidth=0.8, label="" if row else part)
            if share >= 100 * least:
                ink = "black" if color in ("orange", "sky", "purple") else "white"
                ax.text(left + share / 2, row, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=9)
            left += share
    _named_rows(ax, rows)
    ax.set_xlim(0, 100)
    ax.grid(axis="y", visible=False)


def _named_rows(ax: Any, rows: Mapping[str, Any]) -> None:
    """Names at the left, the first row on top."""
    ax.set_yticks(range(len(rows)), list(rows))
    ax.invert_yaxis()
