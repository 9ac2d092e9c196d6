"""Packed tokens: the same ids as in memory, and no file that is damaged, half-written or another's is ever read."""

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from minimoe.data import (
    Batches,
    CorpusError,
    PackedError,
    Tokenizer,
    encode_corpus,
    load_corpus,
    open_packed,
    pack,
    pack_once,
)
from minimoe.data import packed as packing
from minimoe.data.bpe import SPECIAL, byte_letters
from minimoe.data.corpus import Corpus
from minimoe.data.packed import HEADER, header_path

TEXTS = ("def f(x):\n    return x\n", "", "ünï → 🙂 code\n" * 20, "the end <|im_end|> is <|endoftext|> text\n" * 9, "a\0b\r\n")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["def f(x):\n    return x\n", "some text and code to learn from\n"] * 3, 300)


@pytest.fixture
def corpus():
    return Corpus("some", tuple(f"{n}.txt" for n in range(len(TEXTS))), TEXTS)


@pytest.fixture
def packed(tmp_path, tokenizer):
    pack(TEXTS, tokenizer, tmp_path / "tokens.bin")
    return tmp_path / "tokens.bin"


def change(path, **fields):
    header = json.loads(header_path(path).read_text())
    header_path(path).write_text(json.dumps(header | fields))


# ------------------------------------------------------------------ the ids
def test_ids_are_those_of_encode_corpus(packed, corpus, tokenizer):
    tokens, wanted = open_packed(packed, tokenizer), encode_corpus(corpus, tokenizer)
    assert tokens.ids.dtype == wanted.ids.dtype == np.uint16 and isinstance(tokens.ids, np.memmap)
    assert np.array_equal(tokens.ids, wanted.ids) and tokens.bytes == wanted.bytes == corpus.bytes
    assert packed.read_bytes() == wanted.ids.tobytes()
    assert not set(tokens.ids[:-1]) & {tokenizer.special["<|im_end|>"]}


def test_ids_of_real_text_are_those_of_encode_corpus(tmp_path, tokenizer):
    held_out = load_corpus().split()[1]
    tokens = pack(held_out.texts, tokenizer, tmp_path / "t.bin", total=held_out.bytes)
    assert np.array_equal(tokens.ids, encode_corpus(held_out, tokenizer).ids)


def test_portions_change_no_id(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "AT_ONCE", 10_000)
    long = "code and text\n" * 500  # three documents in two portions
    tokens = pack([long, long, "short"], tokenizer, tmp_path / "t.bin")
    wanted = encode_corpus(Corpus("", ("a", "b", "c"), (long, long, "short")), tokenizer)
    assert np.array_equal(tokens.ids, wanted.ids)


def test_more_than_65536_tokens_take_four_bytes(tmp_path):
    letters = sorted(byte_letters())
    pairs = sorted(((a, b) for a in letters for b in letters), key=("t", "h").__eq__)  # "th" has the last id of all
    names = [*SPECIAL, *letters, *(a + b for a, b in pairs)]
    large = Tokenizer.from_parts(names, [f"{a} {b}" for a, b in pairs], range(len(SPECIAL)), "qwen2")
    tokens = pack(["th"], large, tmp_path / "t.bin")
    wanted = encode_corpus(Corpus("", ("a",), ("th",)), large)
    assert wanted.ids.max() > 1 << 16 and tokens.ids.dtype == np.uint32 and np.array_equal(tokens.ids, wanted.ids)
    assert (tmp_path / "t.bin").stat().st_size == 4 * len(tokens)


def test_ids_are_read_only_and_batches_draw_from_them(packed, corpus, tokenizer):
    tokens = open_packed(packed, tokenizer)
    with pytest.raises(ValueError):
        tokens.ids[0] = 1
    ours, theirs = (Batches(t, 2, 8, seed=3)(5) for t in (tokens, encode_corpus(corpus, tokenizer)))
    assert all((a == b).all() for a, b in zip(ours, theirs))


def test_the_json_says_what_the_file_is(packed, tokenizer):
    header = json.loads(header_path(packed).read_text())
    assert set(header) == set(HEADER) and header["documents"] == len(TEXTS) and header["dtype"] == "uint16"
    assert header["count"] == len(open_packed(packed, tokenizer)) and header["tokenizer"] == tokenizer.fingerprint
    assert header["bytes"] == sum(len(text.encode()) for text in TEXTS) and header["corpus"] != header["sha256"]


def test_documents_are_read_one_portion_at_a_time(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "AT_ONCE", 10_000)
    folder, seen = tmp_path / "new" / "folder", []

    def documents():
        for _ in range(5):
            seen.append(sum(file.stat().st_size for file in folder.glob(".*")) if folder.exists() else 0)
            yield "text " * 3_000

    tokens = pack(documents(), tokenizer, folder / "t.bin")
    assert 0 < seen[1] < seen[2] < seen[4] < 2 * len(tokens)
    assert sorted(os.listdir(folder)) == ["t.bin", "t.bin.json"]


def test_a_bar_counts_bytes(tmp_path, tokenizer, capsys):
    pack(TEXTS, tokenizer, tmp_path / "t.bin", progress=True, total=1000)
    assert "packing" in capsys.readouterr().err
    pack(TEXTS, tokenizer, tmp_path / "t.bin")
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------ what must not be read
def one_line(error):
    text = str(error.value)
    assert "\n" not in text and isinstance(error.value, CorpusError)
    return text


def test_another_tokenizer_is_refused(packed):
    other = Tokenizer.train(["quite other text, and more of it"] * 3, 280)
    with pytest.raises(PackedError, match=other.fingerprint) as error:
        open_packed(packed, other)
    assert "tokens.bin" in one_line(error)


@pytest.mark.parametrize("damage, said", [
    (lambda b: b[:-2], "bytes, and its JSON says"), (lambda b: b + b"xx", "bytes, and its JSON says"), (lambda b: b"", "0 bytes"),
    (lambda b: b[:10] + bytes([b[10] ^ 1]) + b[11:], "have changed"),
])  # fmt: skip
def test_a_damaged_file_is_refused(packed, tokenizer, damage, said):
    packed.write_bytes(damage(packed.read_bytes()))
    with pytest.raises(PackedError, match=said) as error:
        open_packed(packed, tokenizer)
    assert "pack the text again" in one_line(error)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"null", b"{}", b"[" * 100_000])
def test_damaged_json_is_refused(packed, tokenizer, content):
    header_path(packed).write_bytes(content)
    with pytest.raises(PackedError, match="tokens.bin.json") as error:
        open_packed(packed, tokenizer)
    assert "pack the text again" in one_line(error)


@pytest.mark.parametrize("key, value", [("format", 2), ("format", None), ("count", "5"), ("count", -1), ("count", True), ("count", 0),
                                        ("bytes", -1), ("dtype", "int8"), ("dtype", None), ("tokenizer", 3), ("sha256", [])])
def test_a_wrong_field_is_named(packed, tokenizer, key, value):
    change(packed, **{key: value})
    with pytest.raises(PackedError, match=key) as error:
        open_packed(packed, tokenizer)
    one_line(error)


@pytest.mark.parametrize("gone", ["tokens.bin", "tokens.bin.json"])
def test_half_of_it_is_refused(packed, tokenizer, gone):
    (packed.parent / gone).unlink()
    with pytest.raises(PackedError, match=gone) as error:
        open_packed(packed, tokenizer)
    one_line(error)


def test_the_old_json_does_not_fit_new_tokens(packed, tokenizer, tmp_path):
    """What is there if the power fails between the two renamings: new ids, as many as before, beside the old JSON."""
    other = tmp_path / "other.bin"
    pack(TEXTS[::-1], tokenizer, other)
    assert other.stat().st_size == packed.stat().st_size
    os.replace(other, packed)
    with pytest.raises(PackedError, match="have changed"):
        open_packed(packed, tokenizer)


# ------------------------------------------------------------------ writing
def left(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_a_source_that_breaks_leaves_nothing_and_keeps_its_error(tmp_path, tokenizer):
    def documents():
        yield "text " * (packing.AT_ONCE // 4)
        raise ConnectionError("the network is gone")  # an OSError, and not the disk's

    with pytest.raises(ConnectionError, match="the network is gone"):
        pack(documents(), tokenizer, tmp_path / "t.bin")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("documents, said", [([], "no document"), ("text", "a single str"), (["a", 3], "int"),
                                             (["a", "b\ud800"], "document 1: .*surrogate")])
def test_bad_documents_are_one_line_and_leave_the_old_file(packed, tokenizer, documents, said):
    before = left(packed.parent)
    with pytest.raises(PackedError, match=said) as error:
        pack(documents, tokenizer, packed)
    one_line(error)
    assert left(packed.parent) == before


def test_a_folder_that_is_a_file_is_one_line(tmp_path, tokenizer):
    (tmp_path / "file").write_text("x")
    with pytest.raises(PackedError, match="cannot be written") as error:
        pack(TEXTS, tokenizer, tmp_path / "file" / "t.bin")
    one_line(error)


FULL_DISK = """
import resource, sys
from minimoe.data import Tokenizer, PackedError, pack
tokenizer = Tokenizer.load(sys.argv[1])
texts = ["some text and code to learn from " * 1000] * 100
for limit, total in (0, 3_300_000), (100_000, 3_300_000), (100_000, None), (1_100_000, 3_300_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        pack(texts, tokenizer, sys.argv[2], total=total)
    except PackedError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file's size")
def test_no_room_is_one_line_that_says_how_much_is_needed(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    folder = tmp_path / "folder"
    path = folder / "t.bin"
    older = pack(["older text"], tokenizer, path)
    before = left(folder)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "tokenizer"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert left(folder) == before and np.array_equal(open_packed(path, tokenizer).ids, older.ids)

    said = done.stdout.splitlines()
    assert len(said) == 4 and all(line.startswith(f"{path}: no room") and "Make room" in line for line in said)
    needed = pack(["some text and code to learn from " * 1000] * 100, tokenizer, path).ids.nbytes / 1e6
    assert needed > 1.1
    assert [f"about {needed:,.1f} MB are needed" in line for line in said] == [True, True, False, True]
    assert 0 < float(said[2].split("more than ")[1].split()[0]) <= needed


# ------------------------------------------------------------------ the cache
def test_a_corpus_is_packed_once(tmp_path, corpus, tokenizer):
    first = pack_once(corpus, tokenizer, tmp_path / "cache")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(before) == 2 and corpus.sha256 in min(before) and tokenizer.fingerprint in min(before)
    with warnings.catch_warnings(action="error"):
        again = pack_once(corpus, tokenizer, tmp_path / "cache")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before
    assert np.array_equal(first.ids, again.ids) and np.array_equal(again.ids, encode_corpus(corpus, tokenizer).ids)


def test_other_texts_and_other_tokenizers_have_files_of_their_own(tmp_path, corpus, tokenizer):
    other = Tokenizer.train(["quite other text, and more of it"] * 3, 280)
    pack_once(corpus, tokenizer, tmp_path)
    pack_once(corpus, other, tmp_path)
    pack_once(Corpus("some", corpus.names, (*TEXTS[:-1], "changed")), tokenizer, tmp_path)
    assert len(list(tmp_path.glob("*.bin"))) == 3


@pytest.mark.parametrize("damage", [
    lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.write_bytes(b"\xff" * p.stat().st_size), lambda p: p.unlink(),
    lambda p: header_path(p).write_text("{"), lambda p: change(p, format=99), lambda p: change(p, tokenizer="0" * 32),
])  # fmt: skip
def test_a_damaged_file_is_packed_again_with_a_message(tmp_path, corpus, tokenizer, damage):
    wanted = encode_corpus(corpus, tokenizer).ids
    pack_once(corpus, tokenizer, tmp_path)
    damage(next(tmp_path.glob("*.bin")))
    with pytest.warns(UserWarning, match="packing the text again") as said:
        assert np.array_equal(pack_once(corpus, tokenizer, tmp_path).ids, wanted)
    assert len(said) == 1 and "\n" not in str(said[0].message) and "pack the text again" not in str(said[0].message)
    with warnings.catch_warnings(action="error"):
        assert np.array_equal(pack_once(corpus, tokenizer, tmp_path).ids, wanted)


BUILD = """
import sys
from pathlib import Path
from minimoe.data import Tokenizer, load_corpus, pack_once
tokenizer, corpus = Tokenizer.load(sys.argv[1]), load_corpus(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(int(pack_once(corpus, tokenizer, sys.argv[3]).ids.sum()))
"""


def test_two_processes_that_build_at_once_do_no_harm(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    for n in range(40):
        (tmp_path / "text" / f"{n}.txt").write_text(f"the text of number {n}, some code and more\n" * 1000)
    command = [sys.executable, "-c", BUILD, *(str(tmp_path / name) for name in ("tokenizer", "text", "cache"))]
    children = [subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    answers = [child.communicate(timeout=120) for child in children]
    assert all(child.returncode == 0 for child in children), answers
    wanted = int(encode_corpus(load_corpus(tmp_path / "text"), tokenizer).ids.sum())
    assert [int(out) for out, _ in answers] == [wanted] * 2
    assert len(os.listdir(tmp_path / "cache")) == 2  # and nothing half-written


def test_a_file_in_use_elsewhere_is_not_replaced_but_read(tmp_path, corpus, tokenizer, monkeypatch):
    """As on Windows: another process has mapped the file, and its JSON comes while we encode."""
    pack_once(corpus, tokenizer, tmp_path)
    notes = header_path(next(tmp_path.glob("*.bin")))
    content = notes.read_bytes()
    notes.unlink()

    def replace(source, target):
        notes.write_bytes(content)
        raise PermissionError(13, "the file is in use")

    monkeypatch.setattr(os, "replace", replace)
    assert np.array_equal(pack_once(corpus, tokenizer, tmp_path).ids, encode_corpus(corpus, tokenizer).ids)
    assert len(os.listdir(tmp_path)) == 2
    content = b"{}"
    notes.unlink()
    with pytest.raises(PackedError, match="in use"):
        pack_once(corpus, tokenizer, tmp_path)
