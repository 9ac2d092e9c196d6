"""What makes stored outputs stale, and what does not."""

import pathlib

import digest as dg
import pytest


@pytest.fixture
def repo(tmp_path: pathlib.Path) -> pathlib.Path:
    files = {
        "constraints.txt": "torch==2\nruff==1\nnumpy==2\nllama-cpp-python==3\n",
        "src/minimoe/__init__.py": '_WHERE = {"f": "alpha", "g": "beta"}\n'
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .beta import g\n",
        "src/minimoe/alpha.py": '"""Doc."""\nimport torch\nfrom .inner import helper\n'
        '\ndef f(x):\n    """Doc."""\n    return x + 1\n',
        "src/minimoe/beta.py": "import llama_cpp\nY = 1\n",
        "src/minimoe/gamma.py": "from . import beta\n",
        "src/minimoe/inner/__init__.py": "",
        "src/minimoe/inner/helper.py": "from ..delta import Z\n",
        "src/minimoe/delta.py": "Z = 1\n",
        "src/minimoe/catalog/__init__.py": "",
        "src/minimoe/catalog/models.json": "{}",
        "results/02.json": "{}",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def nb(*sources: str, **meta) -> dict:
    return {"cells": [{"cell_type": "code", "source": s, "metadata": meta} for s in sources]}


def modules(repo: pathlib.Path, source: str) -> set[str]:
    walker = dg.Walker(repo / "src")
    walker.scan(dg.parse_cell(source))
    return {m.removeprefix("minimoe.") for m in walker.modules} - {"minimoe"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import minimoe", set()),
        ("from minimoe import f", {"alpha", "inner", "inner.helper", "delta"}),
        ("from minimoe import g", {"beta"}),
        ("import minimoe as mm\nmm.g(1)", {"beta"}),
        ("from minimoe import gamma", {"gamma", "beta"}),
        ("import minimoe.delta", {"delta"}),
        ("%matplotlib inline\ndef later():\n    from minimoe.delta import Z", {"delta"}),
        ("import torch", set()),
    ],
)
def test_modules_that_a_cell_reaches(repo, source, expected):
    assert modules(repo, source) == expected


def changes(repo: pathlib.Path, book: dict, file: str, text: str) -> bool:
    before = dg.digest(book, repo)
    (repo / file).write_text(text)
    return dg.digest(book, repo) != before


def test_code_behind_an_import_counts_but_not_its_prose(repo):
    book = nb("from minimoe import f")
    same = '"""Other."""\nimport torch\nfrom .inner import helper\n\n\ndef f(x):  # why\n    """Other."""\n    return (x + 1)\n'
    assert not changes(repo, book, "src/minimoe/alpha.py", same)
    assert changes(repo, book, "src/minimoe/alpha.py", same.replace("+ 1", "+ 2"))
    assert changes(repo, book, "src/minimoe/delta.py", "Z = 2\n")
    assert not changes(repo, book, "src/minimoe/beta.py", "Y = 2\n")


def test_pins_of_the_packages_involved_count(repo):
    book, pins = nb("from minimoe import f"), "torch==2\nruff==2\nnumpy==3\nllama-cpp-python==4\n"
    assert not changes(repo, book, "constraints.txt", pins)
    assert changes(repo, book, "constraints.txt", pins.replace("torch==2", "torch==3"))
    assert changes(repo, nb("from minimoe import g"), "constraints.txt", pins.replace("==4", "==5"))


def test_data_and_results_count(repo):
    assert changes(repo, nb("from minimoe import catalog"), "src/minimoe/catalog/models.json", "[]")
    assert changes(repo, nb("load('results/02.json')"), "results/02.json", "[]")
    assert changes(repo, nb("1", minimoe={"card": "02.json"}), "results/02.json", "{ }")
    assert not changes(repo, nb("1"), "results/02.json", "[1]")


def test_the_weights_count_where_a_cell_speaks_of_them(repo):
    (repo / "checkpoints/small").mkdir(parents=True)
    (repo / "checkpoints/small/model.safetensors").write_text("1")
    assert changes(repo, nb("load('checkpoints/small')"), "checkpoints/small/model.safetensors", "2")
    assert not changes(repo, nb("1"), "checkpoints/small/model.safetensors", "3")
    assert not changes(repo, nb("load('checkpoints/small')"), "checkpoints/small/README.md", "words")


def test_other_data_files_count(repo):
    (repo / "src/minimoe/catalog/words.txt").write_text("a")
    assert changes(repo, nb("from minimoe import catalog"), "src/minimoe/catalog/words.txt", "b")


def test_cells_and_tags_count(repo):
    a = dg.digest(nb("1", "2"), repo)
    assert len({a, dg.digest(nb("12"), repo), dg.digest(nb("1", "3"), repo), dg.digest(nb("1", "2", tags=["x"]), repo)}) == 4
    prose = {"cells": [*nb("1", "2")["cells"], {"cell_type": "markdown", "source": "text"}]}
    assert dg.digest(prose, repo) == a


def test_a_cell_that_does_not_parse_still_has_a_digest(repo):
    assert dg.digest(nb("def ("), repo) != dg.digest(nb("def (("), repo)
