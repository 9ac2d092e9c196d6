"""What is not a GGUF file, and why llama.cpp would abort on one: a line each."""

import struct

import pytest
from llama_files import rewrite, same

from minimoe.ggml import LlamaError
from minimoe.ggml.header import check_magic, explain


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"GGU", "is not a GGUF file$"),
        (b"GGUF\3\0\0\0", "is truncated: 8 bytes"),
        (b"\0" * 1000, "is not a GGUF file$"),
        (b"PK\x03\x04" + b"\1" * 100, "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "a git-lfs pointer"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (struct.pack("<Q", 20) + b'{"a":{"dtype":"F32"}}', "a safetensors file"),
        (b"GGUF" + struct.pack("<I", 99) + b"\0" * 100, "GGUF version 99"),
        (b"GGUF" + struct.pack(">I", 3) + b"\0" * 100, "big-endian"),
    ],
)
def test_another_kind_of_file(content, words, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(LlamaError, match=words) as caught:
        check_magic(path)
    assert "model.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(LlamaError, match="is a directory; give the .gguf file in it"):
        check_magic(tmp_path)
    with pytest.raises(LlamaError, match="does not exist"):
        check_magic(tmp_path / "nothing.gguf")


def test_a_good_file(tiny_file):
    assert check_magic(tiny_file) == tiny_file
    assert explain(tiny_file) == ""


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokenizer.ggml.tokens": lambda t: [*t[:300], t[40], *t[301:]]}, "tokens 40 and 300 have the same text"),
        ({"expert_used_count": same(9)}, "expert_used_count is 9, and there are 8 experts"),
        ({"expert_used_count": same(0)}, "expert_used_count is 0"),
        ({"attention.head_count": same(5)}, "head_count 5 is not divisible by head_count_kv 2"),
    ],
    ids=["tokens", "experts", "no experts", "heads"],
)
def test_what_a_header_shows(fields, words, tiny_file, tmp_path):
    assert words in explain(rewrite(tiny_file, tmp_path / "bad.gguf", fields))


def test_a_header_that_nobody_can_read_explains_nothing(tiny_file, tmp_path):
    path = tmp_path / "cut.gguf"
    for length in (30, 500, 5000):
        path.write_bytes(tiny_file.read_bytes()[:length])
        assert explain(path) == ""
