"""tools/nb.py: what is stored, that it is the same bytes each time, and what is refused."""

import json
import pathlib

import nb
import nbformat
import pytest
from common import ROOT

v4 = nbformat.v4


def notebook(*cells) -> nbformat.NotebookNode:
    """Code cells from (source, metadata, outputs), all executed."""
    made = []
    for i, (source, meta, outputs) in enumerate(cells):
        made.append(v4.new_code_cell(source, metadata=meta, outputs=outputs, execution_count=i + 7, id=f"c{i}"))
    return v4.new_notebook(cells=[v4.new_markdown_cell("# Title", id="title"), *made])


def store(tmp_path: pathlib.Path, book, profile: str = "ci") -> str:
    book = nb.normalise(book)
    book.metadata["minimoe"] = {"digest": nb.digest(book), "profile": profile}
    path = tmp_path / "x.ipynb"
    nb.write(book, path)
    return str(path)


def text(s: str, name: str = "stdout"):
    return v4.new_output("stream", name=name, text=s)


def test_normalise_is_idempotent_and_keeps_only_what_a_page_shows():
    view = {nb.WIDGET_VIEW: {"model_id": "ab12"}, "text/plain": "w"}
    book = notebook(
        ("print(1); print(2)", {"tags": ["b", "a"], "collapsed": False, "execution": {"iopub": "now"}},
         [text("1\n"), text("noise", "stderr"), text("2\n")]),
        ("w", {}, [v4.new_output("display_data", data=view)]),
        ("e", {}, [v4.new_output("execute_result", data=view | {"text/html": "<p>e</p>"}, execution_count=99)]),
    )  # fmt: skip
    book.metadata["widgets"] = {"state": {}}
    once = nbformat.writes(nb.normalise(book))
    assert nbformat.writes(nb.normalise(nbformat.reads(once, 4))) == once
    first, second, third = book.cells[1:]
    assert [o.text for o in first.outputs] == ["1\n2\n"] and first.metadata == {"tags": ["a", "b"]}
    assert second.outputs == []
    assert set(third.outputs[0].data) == {"text/html", "text/plain"} and third.outputs[0].execution_count == 3
    assert "widgets" not in book.metadata and [c.execution_count for c in book.cells[1:]] == [1, 2, 3]


def test_volatile_outputs_are_replaced(tmp_path):
    book = nb.normalise(notebook(("t()", {"tags": ["volatile"]}, [text("0.123 s\n")])))
    cell = book.cells[1]
    assert "0.123" not in json.dumps(cell) and "run this cell" in cell.outputs[0].data["text/plain"]
    assert cell.metadata.tags == ["nbval-ignore-output", "volatile"]
    kept = nb.normalise(notebook(("t()", {"tags": ["volatile"]}, [text("0.123 s\n")])), keep_volatile=True)
    assert kept.cells[1].outputs[0].text == "0.123 s\n"


def test_card_shows_figures_and_machine(tmp_path):
    (tmp_path / "results").mkdir()
    record = {
        "machine": {"device_name": "A <card>", "threads": 1, "torch": "2.13.0"}, "commit": "0123456789abcdef",
        "numbers": {"seconds": 0.01234567, "sweep": [1, 2]},
    }  # fmt: skip
    (tmp_path / "results/02.json").write_text(json.dumps(record))
    data = nb.card("02.json", tmp_path)
    assert "0.01235" in data["text/html"] and "A &lt;card&gt;, 1 thread, torch 2.13.0, commit 0123456789ab" in data["text/html"]
    assert "sweep" not in data["text/plain"]
    with pytest.raises(SystemExit, match="results/03.json"):
        nb.card("03.json", tmp_path)


def test_a_fresh_store_passes(tmp_path):
    assert nb.check_one(store(tmp_path, notebook(("print(1)", {}, [text("1\n")])))) == []


def test_changed_cell_or_tag_is_stale(tmp_path):
    path = pathlib.Path(store(tmp_path, notebook(("print(1)", {}, [text("1\n")]))))
    whole = path.read_text()
    path.write_text(whole.replace("print(1)", "print(2)"))
    assert "stale" in nb.check_one(str(path))[0]
    assert nb.check_one(str(path), allow_stale=True) == []
    path.write_text(whole.replace('"metadata": {},\n   "outputs"', '"metadata": {"tags": ["x"]},\n   "outputs"'))
    assert "stale" in nb.check_one(str(path))[0]


PNG, LARGE = {"image/png": "A" * 100}, {"image/png": "A" * 150_001}


@pytest.mark.parametrize(
    ("source", "meta", "outputs", "says"),
    [
        ("x" * 77, {}, [], "77 characters"),
        ("%time f()", {}, [], "magic"),
        ("!ls", {}, [], "magic"),
        ("f()", {}, [v4.new_output("display_data", data=PNG)], "alt"),
        ("f()", {"mystnb": {"image": {"alt": "a"}}}, [v4.new_output("display_data", data=LARGE)], "image of"),
        ("f()", {}, [v4.new_output("display_data", data={"text/html": "A" * 400_001})], "output of more"),
        ("f()", {}, [v4.new_output("error", ename="ValueError", evalue="no", traceback=[])], "stored ValueError"),
        ("f()", {"tags": ["volatile", "nbval-check-output"]}, [], "both"),
    ],
)
def test_refused(tmp_path, source, meta, outputs, says):
    found = nb.check_one(store(tmp_path, notebook((source, meta, outputs))))
    assert len(found) == 1 and says in found[0]


def test_refuses_what_normalise_would_remove(tmp_path):
    path = pathlib.Path(store(tmp_path, notebook(("f()", {}, [text("1\n")]))))
    book = nbformat.read(path, 4)
    book.cells[1].outputs.append(text("careful", "stderr"))
    book.cells[1].outputs.append(v4.new_output("display_data", data={nb.WIDGET_VIEW: {"model_id": "x"}}))
    nb.write(book, path)
    found = " ".join(nb.check_one(str(path)))
    assert "stderr" in found and "widget view" in found and "not normalised" in found


def test_refuses_an_unexecuted_cell_and_another_profile(tmp_path):
    book = notebook(("print(1)", {}, []))
    book.cells[1].execution_count = None
    found = nb.check_one(store(tmp_path, book, profile="gpu"))
    assert any("not executed" in f for f in found) and any("'gpu'" in f for f in found)


RUNNABLE = """\
import matplotlib.pyplot as plt
from minimoe import plots
from minimoe.explore import Explore
plots.use()
fig, ax = plots.figure("x [1]", "y [1]")
ax.plot([1, 2, 3]);"""


def test_running_twice_gives_the_same_bytes(tmp_path):
    alt = {"mystnb": {"image": {"alt": "A line"}}}
    explore = "Explore(lambda k: {'k': k}, title='t', dims={'k': [1, 2]})"
    cells = [(RUNNABLE, alt, []), (explore, {}, []), ("import os, random; print(os.environ['OMP_NUM_THREADS'])", {}, []),
             ("import time; print(time.time())", {"tags": ["volatile"]}, [])]  # fmt: skip
    path = tmp_path / "x.ipynb"
    nb.write(notebook(*cells), path)
    _, seconds, heard = nb.run_one(str(path), "ci", 120, False)
    first = path.read_bytes()
    assert heard == [] and nb.check_one(str(path)) == []
    nb.run_one(str(path), "ci", 120, False)
    assert path.read_bytes() == first
    assert b"image/png" in first and b"mm-explore" in first and list(tmp_path.iterdir()) == [path]


def test_a_failing_cell_leaves_the_file_alone(tmp_path, capsys):
    path = tmp_path / "x.ipynb"
    stored = notebook(("1", {}, []), ("raise ValueError('so')", {}, []), ("2", {}, []))
    stored.cells[-1].execution_count = 3  # of an earlier run
    nb.write(stored, path)
    before = path.read_bytes()
    assert nb.main(["run", str(path), "--jobs", "1"]) == 1
    assert "code cell 2: ValueError: so" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_broken_file_is_one_line(tmp_path, capsys):
    path = tmp_path / "x.ipynb"
    path.write_text("{")
    assert nb.main(["check", str(path)]) == 1
    assert nb.main(["check", str(tmp_path / "none.ipynb")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_the_repository_is_where_the_tools_think():
    assert (ROOT / "pyproject.toml").exists()
