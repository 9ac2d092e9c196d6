"""Published GGUF files beside llama.cpp's own mixtures."""

import pytest

from minimoe import catalog
from minimoe.sizing.published import deviation, expected_bytes

HEADER = range(5_000_000, 8_000_000)  # vocabulary and merges; Step's has 128,896 tokens, Nemotron's 131,072

FILES = catalog.files()


def one(repo, quant):
    return next(f for f in FILES if f.repo.endswith(repo) and f.quant == quant)


@pytest.mark.parametrize("file", [f for f in FILES if f.recipe == "default" and f.size], ids=lambda f: f"{f.repo}-{f.quant}")
def test_default_files_are_within_one_percent(file):
    assert abs(deviation(file)) < 0.01
    if file.bytes:  # known exactly: equal, or a header apart
        rest = file.bytes - expected_bytes(file)
        assert rest == 0 if file.measures == "tensors" else rest in HEADER


def test_enough_default_files_are_known_exactly():
    exact = [f for f in FILES if f.recipe == "default" and f.bytes]
    assert len(exact) >= 6 and {f.measures for f in exact} == {"file", "tensors"}


def test_headers_of_one_vocabulary_are_alike():
    rest = [f.bytes - expected_bytes(f) for f in FILES if f.recipe == "default" and f.bytes and f.measures == "file" and not f.mtp]
    assert len(rest) >= 3 and max(rest) - min(rest) < 2_000


def test_lightning_to_the_byte():
    """Its BF16 and Q8_0 files hold an MTP block, whose router the converter leaves in 16 bits."""
    assert deviation(one("Lightning-30B-A3B-GGUF", "BF16")) == deviation(one("Lightning-30B-A3B-GGUF", "Q8_0")) == 0


@pytest.mark.parametrize("file", [f for f in FILES if f.recipe == "imatrix" and f.size], ids=lambda f: f"{f.repo}-{f.quant}")
def test_importance_matrix_files_are_near(file):
    assert abs(deviation(file)) < 0.015


def test_an_importance_matrix_explains_step():
    """104.99 GB were printed: with the matrix 104.988, without 105.48."""
    file = one("Step-3.7-Flash-GGUF", "IQ4_XS")
    assert f"{expected_bytes(file) / 1e9:.2f} GB" == file.printed


@pytest.mark.parametrize("file", [f for f in FILES if f.recipe in ("UD", "custom")], ids=lambda f: f"{f.repo}-{f.quant}")
def test_mixes_of_their_own_are_listed_with_their_deviation(file):
    assert file.nearest != file.quant or file.note
    assert -0.13 < deviation(file) < 0.02


def test_unknown_sizes_have_no_deviation():
    unknown = [f for f in FILES if f.size is None]
    assert unknown and all(deviation(f) is None and f.note for f in unknown)
