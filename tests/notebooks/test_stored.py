"""Chapters, and pages that are notebooks, as committed. That their cells run and give the stored outputs is nbval's part."""

import pathlib

import nb
import pytest
from common import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb")) + sorted((ROOT / "book").glob("*.ipynb"))
ids = [p.relative_to(ROOT).as_posix() for p in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_stored_as_tools_nb_stores_it(path: pathlib.Path):
    """Executed throughout (nbval passes a cell that never ran), normalised, alt texts, sizes, line lengths."""
    assert nb.check_one(str(path), allow_stale=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_outputs_are_not_stale(path: pathlib.Path):
    assert nb.check_one(str(path)) == []


def test_every_notebook_is_in_the_contents():
    toc = (ROOT / "book/_toc.yml").read_text(encoding="utf-8")
    pages = [p.relative_to(ROOT).with_suffix("").as_posix() for p in NOTEBOOKS if p.parent.name in ("notebooks", "book")]
    missing = [page for page in pages if f"{page}\n" not in toc + "\n"]
    assert missing == []
