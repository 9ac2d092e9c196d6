"""Explore: the same numbers with and without a kernel, and its refusals."""

import itertools
import json
import re

import pytest

from minimoe import explore
from minimoe.explore import Explore


def product(a, b):
    return {"product": a * b, "fits": "yes" if a * b < 10 else "no"}


def make(**kw):
    return Explore(**{"fn": product, "title": "Products <a & b>", "dims": {"a": [1, 2, 3], "b": [2, 4000]}} | kw)


def test_grid_is_the_function():
    e = make(start={"a": 2})
    p = e.payload()
    assert p["rows"] == ["product", "fits"]
    states = list(itertools.product([1, 2, 3], [2, 4000]))
    assert p["cells"] == [[f"{a * b:,}", "yes" if a * b < 10 else "no"] for a, b in states]
    assert [d["start"] for d in p["dims"]] == [1, 0] and p["dims"][1]["values"] == ["2", "4,000"]


def test_sliders_drive_the_table():
    e = make()
    assert e.values == {"a": 1, "b": 2} and "<td>2</td>" in e._out.value
    e._sliders["b"].value = 4000
    assert e.values == {"a": 1, "b": 4000} and "<td>4,000</td>" in e._out.value and "no" in e._out.value


def test_output_has_a_static_twin():
    data, _ = make(labels={"a": "a [rows]"})._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    html = data["text/html"]
    assert "Products &lt;a &amp; b&gt;" in html and "at a [rows] 1, b 2" in html
    blob = re.search(r'<script type="application/json">(.*)</script>', html).group(1)
    assert json.loads(blob)["title"] == "Products <a & b>" and "</" not in blob
    assert data["text/plain"] == "Products <a & b> at a [rows] 1, b 2: product 2; fits yes"


def test_figures_are_labelled_and_the_same_bytes():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")

    def draw(a):
        fig, ax = plt.subplots(figsize=(2, 1))
        ax.plot([0, a])
        return fig

    def bundle():
        e = Explore(lambda a: {"a": a}, title="t", dims={"a": [1, 2]}, figure=draw, figure_alt=lambda a: f"A line to {a}")
        return e._repr_mimebundle_()[0]["text/html"]

    first = bundle()
    assert first == bundle() and first.count('role="img"') == 1
    assert 'aria-label="A line to 1"' in first and "A line to 2" in first and plt.get_fignums() == []


def wrong_rows(a, b):
    return {"x": 1} if a < 3 else {"y": 1}


@pytest.mark.parametrize(
    ("kw", "says"),
    [
        ({"start": {"a": 9}}, r"start\['a'\] = 9 is not in dims\['a'\]: 1, 2, 3"),
        ({"start": {"c": 1}}, r"start\['c'\] has no slider; dims has a, b"),
        ({"labels": {"c": "see"}}, r"labels\['c'\] has no slider"),
        ({"dims": {}}, "dims is empty"),
        ({"dims": {"a": [], "b": [1]}}, r"dims\['a'\] is empty"),
        ({"dims": {"a": [1, 1], "b": [1]}}, "two values that read alike"),
        ({"dims": {"a": range(65), "b": range(64)}}, "4,160 states; a page takes 4,096"),
        ({"dims": {"a": range(13), "b": range(5)}, "figure": product}, "65 states; a page takes 64 with figures"),
        ({"figure": product}, "figure needs figure_alt"),
        ({"fn": wrong_rows}, r"rows at a=3, b=2 are \['y'\], elsewhere \['x'\]"),
        ({"fn": lambda a, b: 3}, "the function returned int 3"),
    ],
)
def test_mistakes_are_one_line(kw, says):
    with pytest.raises(ValueError, match=says) as e:
        make(**kw)
    assert "\n" not in str(e.value)


def test_too_many_bytes(monkeypatch):
    monkeypatch.setattr(explore, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="a page takes 100"):
        make()._repr_mimebundle_()
