"""Datasets as streams. With the package datasets, files on this machine are streamed as remote ones are; without it, the
reader is told how to get it."""

import gzip
import importlib.util
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from minimoe.data import CorpusError, StreamError, Tokenizer, documents, load_corpus, pack, stream_dataset
from minimoe.data.streaming import parse

INSTALLED = importlib.util.find_spec("datasets") is not None


@pytest.mark.parametrize("source, parts", [
    ("hf:roneneldan/TinyStories", ("roneneldan/TinyStories", None, None)), ("hf:wiki:20231101.de", ("wiki", "20231101.de", None)),
    ("hf:a/b:c:text", ("a/b", "c", "text")), ("hf:a/b::text", ("a/b", None, "text")), ("hf:./folder", ("./folder", None, None)),
])  # fmt: skip
def test_how_a_dataset_is_written(source, parts):
    assert parse(source) == parts


@pytest.mark.parametrize("source", ["hf:", "hf::c:t", "hf:a:b:c:d", "a/b"])
def test_other_spellings_are_one_line(source):
    with pytest.raises(StreamError, match="write hf:NAME") as error:
        parse(source)
    assert "\n" not in str(error.value) and isinstance(error.value, CorpusError)


def test_what_is_no_dataset_is_a_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "c.txt").write_text("three")
    assert list(documents(tmp_path)) == list(documents(str(tmp_path))) == ["one", "two", "three"]
    assert list(documents(tmp_path, limit_bytes=4)) == ["one", "two"] and list(documents(tmp_path, limit_bytes=0)) == []
    assert next(documents("stdlib")) == load_corpus("stdlib").texts[0]


def test_without_the_package_the_reader_is_told_how_to_get_it(monkeypatch):
    if INSTALLED:
        monkeypatch.setitem(sys.modules, "datasets", None)  # Python's own way to say that a module cannot be imported
    for make in (lambda: stream_dataset("roneneldan/TinyStories"), lambda: documents("hf:roneneldan/TinyStories")):
        with pytest.raises(StreamError, match="pip install datasets") as error:
            make()
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------ with the package
if INSTALLED:

    @pytest.fixture(params=["jsonl", "jsonl.gz", "parquet", "csv"])
    def folder(tmp_path, request):
        """A dataset of 1,000 rows in two files, a tenth of them empty."""
        import pandas

        for part in range(2):
            numbers = range(part * 500, part * 500 + 500)
            rows = [{"n": n, "text": f"document {n}\nünï 🙂" if n % 10 else "", "lang": "en"} for n in numbers]
            path = tmp_path / f"train-{part}.{request.param}"
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            if request.param == "jsonl":
                path.write_text(lines)
            elif request.param == "jsonl.gz":
                path.write_bytes(gzip.compress(lines.encode()))
            elif request.param == "parquet":
                pandas.DataFrame(rows).to_parquet(path)
            else:
                pandas.DataFrame(rows).to_csv(path, index=False)
        return tmp_path

    WANTED = [f"document {n}\nünï 🙂" for n in range(1000) if n % 10]

    def test_rows_come_in_order_and_empty_ones_not_at_all(folder):
        assert list(stream_dataset(str(folder))) == WANTED
        assert list(documents(f"hf:{folder}::text")) == WANTED
        assert set(documents(f"hf:{folder}:default:lang")) == {"en"}

    def test_a_limit_ends_with_the_document_that_reaches_it(folder):
        size = len(WANTED[0].encode()) * 3
        found = list(stream_dataset(str(folder), limit_bytes=size))
        assert found == WANTED[:3]
        assert list(stream_dataset(str(folder), limit_bytes=size + 1)) == WANTED[:4]

    def test_a_stream_is_packed(folder):
        tokenizer = Tokenizer.train(WANTED[:50], 280)
        tokens = pack(documents(f"hf:{folder}"), tokenizer, folder / "packed" / "t.bin")
        wanted = list(itertools.chain.from_iterable([*tokenizer.encode(text), tokenizer.eos_id] for text in WANTED))
        assert np.array_equal(tokens.ids, wanted) and tokens.bytes == sum(len(text.encode()) for text in WANTED)

    def test_plain_text_and_splits(tmp_path):
        (tmp_path / "train.txt").write_text("one\ntwo\n")
        (tmp_path / "test.txt").write_text("three\n")
        assert list(stream_dataset(str(tmp_path))) == ["one", "two"]
        assert list(documents(f"hf:{tmp_path}", "test")) == ["three"]

    @pytest.mark.parametrize("change, said", [
        (dict(column="body"), "no column 'body'; it has n, text, lang"), (dict(split="dev"), "train"), (dict(config="x"), "default"),
    ])  # fmt: skip
    def test_what_is_not_there_is_one_line_that_says_what_is(tmp_path, change, said):
        (tmp_path / "a.jsonl").write_text('{"n": 1, "text": "one", "lang": "en"}\n')
        with pytest.raises(StreamError, match=said) as error:
            stream_dataset(str(tmp_path), **change)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)

    def test_a_column_of_numbers_is_no_text(tmp_path):
        (tmp_path / "a.jsonl").write_text('{"n": 1, "text": "one"}\n')
        with pytest.raises(StreamError, match="'n' holds int"):
            list(stream_dataset(str(tmp_path), column="n"))

    def test_two_columns_of_text_must_be_chosen_from(tmp_path):
        (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}\n')
        with pytest.raises(StreamError, match="::COLUMN"):
            stream_dataset(str(tmp_path))
        assert list(documents(f"hf:{tmp_path}::answer")) == ["b"]

    def test_no_files_and_no_folder_are_one_line(tmp_path):
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(StreamError, match="cannot be streamed") as error:
                stream_dataset(str(folder))
            assert "\n" not in str(error.value)

    def test_a_file_that_breaks_off_is_one_line(tmp_path):
        (tmp_path / "train-0.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        (tmp_path / "train-1.jsonl").write_text('{"text": "bro')
        rows = stream_dataset(str(tmp_path))
        assert [next(rows), next(rows)] == ["one", "two"]
        with pytest.raises(StreamError, match="broke after 2 rows") as error:
            next(rows)
        assert "\n" not in str(error.value)

    def test_without_a_network_one_line_says_what_needs_none():
        code = ("from minimoe.data import StreamError, stream_dataset\n"
                "try: stream_dataset('roneneldan/TinyStories')\nexcept StreamError as error: print(error)")
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
        assert "no connection" in done.stdout and "'stdlib'" in done.stdout and done.stdout.count("\n") == 1, done
