"""Documents: the fixed list of the standard library, and folders."""

import os
import pathlib
import sys
import sysconfig

import pytest

from minimoe.data import CorpusError, load_corpus
from minimoe.data.corpus import _stdlib


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus()


def test_this_python_has_every_listed_file(stdlib):
    assert stdlib.missing == () and len(stdlib.names) == len(set(stdlib.names)) > 300


def test_the_list_has_no_tests_and_no_tables(stdlib):
    wrong = [n for n in stdlib.names if n.startswith(("test/", "idlelib/", "encodings/", "lib2to3/", "pydoc_data/"))]
    assert not wrong and "argparse.py" in stdlib.names and "asyncio/tasks.py" in stdlib.names


def test_texts_are_the_installed_files(stdlib):
    file = pathlib.Path(sysconfig.get_path("stdlib"), "argparse.py")
    assert stdlib.texts[stdlib.names.index("argparse.py")] == file.read_text(encoding="utf-8")
    assert stdlib.bytes > 5_000_000


def test_a_hash_tells_corpora_apart(stdlib, tmp_path):
    assert stdlib.sha256 == _stdlib().sha256 and len(stdlib.sha256) == 64
    (tmp_path / "a.txt").write_text("x")
    one = load_corpus(tmp_path).sha256
    (tmp_path / "a.txt").write_text("y")
    assert load_corpus(tmp_path).sha256 != one
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert load_corpus(tmp_path).sha256 != one


def test_split_holds_out_whole_documents_by_name(stdlib):
    training, validation = stdlib.split()
    assert not set(training.names) & set(validation.names)
    assert sorted(training.names + validation.names) == sorted(stdlib.names)
    assert 0.02 < len(validation.names) / len(stdlib.names) < 0.1


def test_adding_a_document_moves_no_other(tmp_path):
    for n in range(200):
        (tmp_path / f"{n}.txt").write_text(f"text {n}")
    before = load_corpus(tmp_path).split()[1].names
    (tmp_path / "extra.txt").write_text("more")
    after = load_corpus(tmp_path).split()[1].names
    assert before and set(before) == set(after) - {"extra.txt"}


def test_a_folder_gives_its_text_and_nothing_else(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("no")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "a.md").write_bytes(b"one\r\ntwo\r\n")
    (tmp_path / "b" / "c" / "d.py").write_text("ü", encoding="utf-8")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfx")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "data.bin").write_bytes(b"\x00\x01text")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.md")
    corpus = load_corpus(tmp_path)
    assert dict(zip(corpus.names, corpus.texts)) == {"a.md": "one\ntwo\n", "b/c/d.py": "ü", "bom.txt": "x"}
    assert corpus.bytes == 8 + 2 + 1


@pytest.mark.parametrize("make", [lambda p: p / "nowhere", lambda p: p])
def test_no_folder_and_no_text_are_one_line(tmp_path, make):
    with pytest.raises(CorpusError) as error:
        load_corpus(make(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_one_document_cannot_be_split(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(CorpusError, match="too few"):
        load_corpus(tmp_path).split()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names and pipes")
def test_pipes_are_passed_over_and_names_need_not_be_utf8(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("x")
    corpus = load_corpus(tmp_path)
    assert corpus.texts == ("x",) and len(corpus.sha256) == 64
