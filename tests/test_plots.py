"""plots: labels are not optional, colours are told apart, bytes repeat."""

import io
import itertools

import numpy as np
import pytest

from minimoe import plots

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def style():
    plt.switch_backend("agg")
    with plots.style():
        yield
    plt.close("all")


def luminance(rgb) -> float:
    rgb = np.asarray(rgb)
    rgb = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(rgb @ [0.2126, 0.7152, 0.0722])


def contrast(a, b) -> float:
    a, b = sorted((luminance(a), luminance(b)), reverse=True)
    return (a + 0.05) / (b + 0.05)


def in_dark_mode(rgb, amount=0.92):
    """What mm.css does to a figure: invert(amount), then hue-rotate(180deg), by the matrices of the filter standard."""
    rgb = np.asarray(rgb) * (1 - 2 * amount) + amount
    lum = np.array([0.213, 0.715, 0.072])
    return np.clip(2 * (lum @ rgb) - rgb, 0, 1)


def rgb(name):
    from matplotlib.colors import to_rgb

    return to_rgb(name)


@pytest.mark.parametrize("view", [np.asarray, in_dark_mode], ids=["light", "dark"])
def test_text_and_series_read_in_both_modes(view):
    ground = view(rgb("white"))
    assert contrast(view(rgb("black")), ground) > 12
    assert contrast(view(rgb(plots.GREY)), ground) > 4.5
    for name, colour in plots.COLORS.items():
        assert contrast(view(rgb(colour)), ground) > 2, name
    for name in ("blue", "vermillion", "green"):  # the first three series, and bars
        assert contrast(view(rgb(plots.COLORS[name])), ground) > 3, name


def test_series_differ_without_colour():
    cycle = list(plt.rcParams["axes.prop_cycle"])
    for key in ("color", "marker"):
        assert len({str(c[key]) for c in cycle}) == len(cycle)
    assert len(list(itertools.groupby(cycle, key=lambda c: str(c["linestyle"])))) == len(cycle)


def test_labels_are_required():
    with pytest.raises(ValueError, match="both axes labelled"):
        plots.figure("", "y")
    with pytest.raises(ValueError, match="unit"):
        plots.bars({"a": 1}, "")


def test_figure_and_scales():
    fig, ax = plots.figure("context [tokens]", "cache [MiB]", title="T", xscale="log2", yscale="log")
    ax.plot([1024, 2048], [1, 10])
    fig.canvas.draw()
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title("left")) == ("context [tokens]", "cache [MiB]", "T")
    assert "1,024" in [t.get_text() for t in ax.get_xticklabels()]


def test_spread_is_median_and_range():
    _, ax = plots.figure("x", "y")
    line = plots.spread(ax, [1, 2], [[1, 2], [3, 4], [9, 9]], "runs")
    assert list(line.get_ydata()) == [3, 4] and line.get_label() == "runs"
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 1 and band[:, 1].max() == 9
    with pytest.raises(ValueError, match="3 points a run, x has 2"):
        plots.spread(ax, [1, 2], [[1, 2, 3]], "runs")


def test_bound_bars_heat():
    _, ax = plots.figure("x", "y")
    assert plots.bound(ax, 3, "limit").get_label() == "limit"
    assert list(plots.bound(ax, [1, 2], "slope", x=[0, 1]).get_ydata()) == [1, 2]
    _, ax = plots.bars({"a": 1, "b": 2.5}, "size [GiB]", marks={"b": 2})
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"] and "2.5" in [t.get_text() for t in ax.texts]
    fig, ax = plots.heat(np.eye(3), "key", "query", value="weight [1]")
    assert fig.axes[1].get_ylabel() == "weight [1]"


def test_strips_draw_every_block_in_order():
    rows = {"one": [("a", 0.9), ("b", 0.3), ("a", 0.9)], "two": [("b", 0.6)]}
    fig, ax = plots.strips(rows, {"a": "blue", "b": "orange", "c": "sky"}, "block", "model")
    found = sorted((round(b.get_x() + b.get_width() / 2), b.get_y(), b.get_height()) for b in ax.patches)
    assert [(x, round(y + h / 2), round(h, 6)) for x, y, h in found] == [(0, 0, 0.9), (0, 1, 0.6), (1, 0, 0.3), (2, 0, 0.9)]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["one", "two"]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["a", "b"]  # only what is drawn


def test_stacked_shares_fill_a_row_and_are_written_where_they_fit():
    _, ax = plots.figure("share [%]", "model")
    plots.stacked(ax, {"x": {"a": 30, "b": 10}, "y": {"b": 1, "a": 19}}, {"a": "blue", "b": "sky"})
    widths = [round(b.get_width(), 6) for b in ax.patches]
    assert widths == [75, 25, 95, 5]
    assert [b.get_x() for b in ax.patches] == [0, 75, 0, 95]
    assert [t.get_text() for t in ax.texts] == ["75", "25", "95"]
    assert ax.get_legend_handles_labels()[1] == ["a", "b"]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_same_bytes(kind):
    def draw() -> bytes:
        fig, ax = plots.figure("x", "y")
        plots.spread(ax, [1, 2], [[1, 2], [2, 3]], "a")
        ax.legend()
        out = io.BytesIO()
        fig.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else None)
        return out.getvalue()

    assert draw() == draw()


def test_use_applies_everywhere():
    import matplotlib as mpl

    with mpl.rc_context():
        plots.use()
        assert mpl.rcParams["figure.dpi"] == 144
