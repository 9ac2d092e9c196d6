"""The chapters as they are committed. That their cells run and give the stored outputs is nbval's part."""

import pathlib

import nb
import pytest
from common import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
ids = [p.relative_to(ROOT / "notebooks").as_posix() for p in NOTEBOOKS]


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
    missing = [p.stem for p in NOTEBOOKS if p.parent.name == "notebooks" and f"notebooks/{p.stem}\n" not in toc + "\n"]
    assert missing == []
