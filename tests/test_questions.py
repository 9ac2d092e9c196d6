"""The questions of the chapters, and which of them are still open."""

import json

import pytest
from common import ROOT

from minimoe import predictions, questions


@pytest.fixture(autouse=True)
def on_disk(monkeypatch):
    monkeypatch.setenv("MINIMOE_PROFILE", "cpu")


def notebook(folder, name, *cells):
    cells = [{"cell_type": kind, "source": text.splitlines(keepends=True)} for kind, text in cells]
    (folder / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))


def test_what_the_chapters_ask(tmp_path):
    notebook(tmp_path, "02_b", ("markdown", "intro\n# 02 <B>\n# not this"), ("code", 'predict("02-y", 1)'))
    asks = 'x = 3\npredictions.predict("01-z", x, "s")\npredict("01-a", 2)'
    again = 'predict(x)\npredict("01-z", 4)\nother("01-no", 1)'
    text = ("markdown", 'predict("01-text", 1)')
    notebook(tmp_path, "01_a", ("code", "%matplotlib inline"), ("code", asks), ("code", again), text)
    found = questions.unanswered(tmp_path)
    assert [(q.key, q.file, q.title) for q in found] == [
        ("01-z", "01_a.ipynb", "01_a"), ("01-a", "01_a.ipynb", "01_a"), ("02-y", "02_b.ipynb", "02 <B>"),
    ]  # fmt: skip
    assert '<th scope="row">02-y</th><td><a href="02_b.ipynb">02 &lt;B&gt;</a></td>' in found._repr_html_()
    assert repr(found).splitlines()[2] == "02-y | 02 <B> (02_b.ipynb)"


def test_an_answered_question_is_gone(tmp_path):
    notebook(tmp_path, "01_a", ("code", 'predict("a", 1); predict("b", 1)'))
    predictions.predict("a", 7)
    assert [q.key for q in questions.unanswered(tmp_path)] == ["b"]
    predictions.predict("b", 7)
    found = questions.unanswered(tmp_path)
    assert found == [] and "every question" in repr(found) and "every question" in found._repr_html_()


def test_a_broken_notebook_is_one_line(tmp_path):
    for text in ("{", "[]", "{}", '{"cells": [{}]}'):
        (tmp_path / "01_a.ipynb").write_text(text)
        with pytest.raises(ValueError, match="01_a.ipynb cannot be read as a notebook"):
            questions.unanswered(tmp_path)


def test_every_chapter_is_asked(monkeypatch):
    """The book's own chapters: each of them asks, and keys begin with the chapter's number."""
    monkeypatch.setattr(predictions, "_memory", {})
    monkeypatch.setenv("MINIMOE_PROFILE", "ci")
    found = questions.unanswered(ROOT / "notebooks")
    asking = {q.file for q in found}
    chapters = {path.name for path in (ROOT / "notebooks").glob("[0-8]*.ipynb")}
    assert asking == chapters
    assert all(q.key[:2] == q.file[:2] == q.title[:2] for q in found)
