"""The live figure: in a real kernel it redraws in place and leaves one output; elsewhere it does nothing."""

import math
import re
import xml.etree.ElementTree as ET

import nbformat
import pytest
from nbclient import NotebookClient

from minimoe.train import LivePlot, Step, live

PROGRAM = """\
from minimoe.train import LivePlot, Step

def run(plot, always):
    seen, real = [], plot._show
    plot._show = lambda: (seen.append(len(plot.steps)), real())
    with plot:
        for n in range(5):
            if always:
                plot._due = 0.0
            plot(Step(n, 5.0 / (n + 1), 100 * (n + 1), 0.1 * n, 1e-3 * (5 - n), 1.0, 6.0 / (n + 1)))
    print(*seen)"""


def steps(count, mtp=True):
    return [Step(n, 5.0 / (n + 1), 100 * (n + 1), 0.1 * n, 1e-3, 1.0, 6.0 / (n + 1) if mtp else None) for n in range(count)]


def test_a_page_keeps_the_last_state_whatever_the_clock_said():
    cells = [PROGRAM, "run(LivePlot(), always=True)", "run(LivePlot(seconds=1e6), always=False)"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    drawn = [[o.text.split() for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"] for cell in book.cells]
    assert drawn == [[], [[str(n) for n in range(1, 6)]], [["1", "5"]]]
    (often,), (seldom,) = ([o for o in cell.outputs if o.output_type == "display_data"] for cell in book.cells[1:])
    assert often.data == seldom.data  # one output each, and the same bytes
    svg = often.data["text/html"]
    assert 'role="img"' in svg and "5 steps and 500 tokens" in svg
    ET.fromstring(svg)


def test_outside_of_a_notebook_nothing_happens(capsys):
    with LivePlot(seconds=0) as plot:
        for step in steps(3):
            plot(step)
    assert capsys.readouterr() == ("", "") and plot.steps == []


def test_an_error_in_the_block_is_passed_on_and_what_was_done_is_shown(monkeypatch):
    monkeypatch.setattr(live, "in_notebook", lambda: True)
    shown = []
    monkeypatch.setattr(LivePlot, "_show", lambda plot: shown.append(len(plot.steps)))
    with pytest.raises(KeyboardInterrupt):
        with LivePlot(seconds=1000) as plot:
            for step in steps(5):
                plot(step)
            raise KeyboardInterrupt
    assert shown == [1, 5]


def test_drawing_takes_a_tenth_of_the_time_at_most(monkeypatch):
    """A clock on which every drawing lasts three seconds and every step one."""
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(live, "in_notebook", lambda: True)
    monkeypatch.setattr(LivePlot, "_show", lambda plot: now.__setitem__(0, now[0] + 3.0))
    plot = LivePlot(seconds=2.0)
    for step in steps(600):
        now[0] += 1.0
        plot(step)
    drawing = now[0] - 600
    assert 0.05 < drawing / now[0] <= 0.11


def test_the_mean_is_geometric_and_does_not_start_from_zero():
    assert live.smoothed([8.0]) == pytest.approx([8.0])
    assert live.smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    # with no memory to speak of it is the last step, with a long one the mean of the logs
    assert live.smoothed([1.0, 4.0], memory=0.01)[-1] == pytest.approx(4.0)
    assert live.smoothed([1.0, 4.0, 16.0], memory=1e9)[-1] == pytest.approx(4.0)
    # a step counts 1/e after `memory` more of them
    old, new = live.smoothed([math.e] + [1.0] * 20, memory=20), sum(math.exp(-n / 20) for n in range(21))
    assert math.log(old[-1]) == pytest.approx(math.exp(-1) / new)
    assert live.smoothed([0.0, 1.0])[0] > 0  # a loss of nothing has a log here


def test_the_figure_shows_what_the_steps_say():
    fig = live.draw(steps(40))
    top, below = fig.axes
    assert top.get_ylabel() == "loss [nats a token]" and below.get_xlabel() == "tokens"
    assert [text.get_text() for text in top.get_legend().get_texts()] == ["trunk", "MTP block"]
    thin, thick = top.get_lines()[:2]
    assert list(thin.get_xdata()) == [100 * n for n in range(1, 41)]
    assert list(thin.get_ydata()) == [5.0 / n for n in range(1, 41)]
    assert list(thick.get_ydata()) == live.smoothed(list(thin.get_ydata()), 10)
    assert set(below.get_lines()[0].get_ydata()) == {1e-3}


def test_without_mtp_there_is_one_curve():
    fig = live.draw(steps(5, mtp=False))
    assert [text.get_text() for text in fig.axes[0].get_legend().get_texts()] == ["trunk"]
    assert "MTP" not in live.describe(steps(5, mtp=False))


@pytest.mark.parametrize("count", [1, 2, 5000])
def test_any_number_of_steps_draws_and_stays_small(count):
    some = steps(count)
    fig = live.draw(some)
    fig.canvas.draw()
    for line in fig.axes[0].get_lines():
        assert len(line.get_xdata()) <= live.POINTS + 1 and line.get_xdata()[-1] == 100 * count
    labels = [text.get_text() for text in fig.axes[0].get_yticklabels()]
    assert len(labels) >= 2 and not any(re.search("[${]", label) for label in labels)
    svg = live._svg(fig, live.describe(some))
    ET.fromstring(svg)
    assert len(svg) < 60_000 and svg == live._svg(live.draw(some), live.describe(some))


def test_the_words_give_the_ends():
    text = live.describe([Step(0, 8.0, 10, 0.1, 2e-3, 1.0), Step(1, 2.0, 1234, 0.2, 1e-3, 1.0)], memory=1e-3)
    assert "2 steps and 1,234 tokens" in text and "trunk from 8.00 to 2.00" in text and "at most 0.002" in text
