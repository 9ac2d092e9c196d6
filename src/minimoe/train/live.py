"""Watching a run from a notebook: one small figure that redraws itself, and stays on the page as it was in the end."""
from __future__ import annotations

import html
import io
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

from .. import plots
from .options import Step

POINTS = 300  # of a curve, at most: more than a small figure can show


def smoothed(losses: Sequence[float], memory: float = 10) -> list[float]:
    """The running geometric mean: an average of log losses in which a step counts 1/e after ``memory`` more steps.

    Divided by the sum of its weights, so that it does not start from zero. In logs, because a loss falls by factors.
    """
    keep, total, weight, means = math.exp(-1 / memory), 0.0, 0.0, []
    for loss in losses:
        total, weight = keep * total + math.log(max(loss, 1e-9)), keep * weight + 1
        means.append(math.exp(total / weight))
    return means


class LivePlot:
    """Loss and MTP loss against tokens, and the learning rate below, while a run goes on:

        with LivePlot() as plot:
            train(model, tokens, options, on_step=plot)

    It redraws at most every ``seconds``, and never for more than a tenth of the time. Leaving the block draws the
    last state, whatever the clock says: the stored figure depends on the steps alone. Thin lines are single steps,
    thick ones :func:`smoothed`. Outside of a notebook it does nothing.
    """

    def __init__(self, seconds: float = 2.0, memory: float = 10) -> None:
        self.seconds, self.memory = seconds, memory
        self.steps: list[Step] = []
        self._active, self._handle, self._due, self._drawn = in_notebook(), None, 0.0, 0

    def __call__(self, step: Step) -> None:
        if not self._active:
            return
        self.steps.append(step)
        start = time.monotonic()
        if start >= self._due:
            self._show()
            end = time.monotonic()
            self._due = end + max(self.seconds, 9 * (end - start))

    def __enter__(self) -> LivePlot:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Draw what came since the last time."""
        if self._drawn < len(self.steps):
            self._show()

    def _show(self) -> None:
        from IPython.display import display

        self._drawn, alt = len(self.steps), describe(self.steps, self.memory)
        data = {"text/html": _svg(draw(self.steps, self.memory), alt), "text/plain": alt}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel, whose page can show figures."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


def draw(steps: Sequence[Step], memory: float = 10) -> Any:
    """The matplotlib figure of these steps; at least one."""
    from matplotlib.figure import Figure  # not pyplot's, which the notebook would show a second time
    from matplotlib.ticker import AutoLocator, EngFormatter, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    with plots.style():
        fig = Figure(figsize=(5.4, 3.6))
        top, below = fig.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        every = max(1, math.ceil(len(steps) / POINTS))
        chosen = sorted({*range(0, len(steps), every), len(steps) - 1})
        tokens = [steps[i].tokens for i in chosen]
        lowest, highest = math.inf, 0.0
        for label, color, line, losses in _curves(steps):
            mean = smoothed(losses, memory)
            look = {"color": plots.COLORS[color], "marker": "o" if len(steps) == 1 else ""}
            top.plot(tokens, [losses[i] for i in chosen], linestyle="-", linewidth=0.7, alpha=0.35, **look)
            top.plot(tokens, [mean[i] for i in chosen], linestyle=line, label=label, **look)
            lowest, highest = min(lowest, *losses), max(highest, *losses)
        top.set(ylabel="loss [nats a token]", yscale="log")
        # a log axis names powers of ten only, and most runs stay within one
        top.yaxis.set_major_locator(AutoLocator() if highest < 10 * lowest else LogLocator(subs=(1, 2, 5)))
        top.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        top.yaxis.set_minor_locator(NullLocator())
        top.yaxis.set_minor_formatter(NullFormatter())
        top.legend()
        below.plot(tokens, [steps[i].lr for i in chosen], color=plots.GREY, linestyle="-", marker="")
        below.set(xlabel="tokens", ylabel="lr", ylim=(0, None))
        below.xaxis.set_major_formatter(EngFormatter())
        below.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return fig


def describe(steps: Sequence[Step], memory: float = 10) -> str:
    """The figure in words."""
    parts = []
    for label, _, _, losses in _curves(steps):
        mean = smoothed(losses, memory)
        parts.append(f"{label} from {mean[0]:.2f} to {mean[-1]:.2f}")
    return (f"Loss in nats a token against tokens, smoothed, over {len(steps):,} steps and {steps[-1].tokens:,} tokens: "
            f"{'; '.join(parts)}. Below it the learning rate, at most {max(step.lr for step in steps):.3g}.")


def _curves(steps: Sequence[Step]) -> list[tuple[str, str, Any, list[float]]]:
    """Label, colour, line and losses; the MTP loss only where every step has one."""
    curves = [("trunk", "blue", "-", [step.loss for step in steps])]
    if all(step.mtp_loss is not None for step in steps):
        curves.append(("MTP block", "vermillion", (0, (4, 1.5)), [step.mtp_loss for step in steps]))
    return curves


def _svg(fig: Any, alt: str) -> str:
    out = io.StringIO()
    with plots.style():
        fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    # a class for the site's dark mode, a style for narrow screens
    look = 'class="mm-live" style="max-width: 100%; height: auto"'
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" {look} aria-label="{html.escape(alt, quote=True)}"', 1)
