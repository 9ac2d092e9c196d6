"""The list of published files: what it holds, and a reader's own entries with their mistakes."""

import json

import pytest

from minimoe import catalog
from minimoe.catalog import CatalogError
from minimoe.catalog.gguf_files import read_size

GOOD = {"model": "nemotron-3-nano-4b", "repo": "me/mine", "quant": "Q4_K_M", "bytes": 2_000_000_000, "recipe": "custom",
        "source": "here"}  # fmt: skip


@pytest.fixture
def own(tmp_path, monkeypatch):
    def write(files, **sections):
        path = tmp_path / "own.json"
        path.write_text(json.dumps({"files": files, **sections}), encoding="utf-8")
        monkeypatch.setenv("MINIMOE_CATALOG", str(path))

    return write


def test_what_is_listed():
    everything = catalog.files()
    assert len(everything) >= 24 and {f.model for f in everything} <= set(catalog.models())
    assert catalog.files("nemotron-3-nano-4b") == tuple(f for f in everything if f.model == "nemotron-3-nano-4b")
    assert catalog.files("qwen3-30b-a3b") == ()
    for file in everything:
        assert file.source not in ("hub", "step", "dgx", "ollama")  # written out
        assert file.bytes is None or file.bytes > 1e9
        assert file.size is not None or file.note


def test_every_figure_of_the_fact_sheet():
    exact = {f.bytes for f in catalog.files()}
    assert {24_655_899_872, 18_890_809_584, 34_996_745_984, 65_844_287_744, 2_837_072_896, 6_525_629_280, 3_707_276_416} <= exact
    printed = {f.printed for f in catalog.files()}
    assert {"16.8 GiB", "22.8 GB", "24 GB", "1.16 GB", "3.94 GiB", "65.10 GiB", "111.5 GB", "104.99 GB", "102.5 GB", "88.8 GiB",
            "394 GB", "2.8 GB"} <= printed  # fmt: skip


def test_a_readers_own_file_adds(own):
    before = catalog.files("nemotron-3-nano-4b")
    own([GOOD, GOOD | {"source": "s", "mtp": "only"}], sources={"s": "a page"})
    *old, plain, other = catalog.files("nemotron-3-nano-4b")
    assert tuple(old) == before
    assert (plain.nearest, plain.mtp, plain.measures, plain.size) == ("Q4_K_M", False, "file", 2e9)
    assert (other.source, other.mtp) == ("a page", "only")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bites": 3}, "unknown key 'bites'; did you mean bytes?"),
        ({"bytes": "2 GB"}, 'bytes must be a whole number, not "2 GB"'),
        ({"bytes": -1}, "bytes must be a number above 0, not -1"),
        ({"recipe": "mine"}, 'recipe must be one of "default", "imatrix", "UD", "custom", not "mine"'),
        ({"measures": "all"}, 'measures must be one of "file", "tensors", not "all"'),
        ({"mtp": "yes"}, 'mtp must be one of true, false, "only", not "yes"'),
        ({"printed": "2 gigs"}, "printed: '2 gigs' is no size such as '22.8 GB' (decimal) or '16.8 GiB' (binary)"),
        ({"repo": None}, "repo must be a text, not null"),
    ],
)
def test_a_mistake_names_file_and_key(own, tmp_path, change, said):
    own([GOOD | change])
    with pytest.raises(CatalogError) as error:
        catalog.files()
    assert str(error.value) == f"{tmp_path / 'own.json'}: files[0]: {said}"


def test_a_missing_key(own, tmp_path):
    own([GOOD, {"model": "nemotron-3-nano-4b"}])
    with pytest.raises(CatalogError, match=r"own.json: files\[1\]: repo is missing"):
        catalog.files()


@pytest.mark.parametrize(
    ("text", "size"), [("22.8 GB", 22.8e9), ("16.8 GiB", 16.8 * 2**30), ("512 MB", 512e6), ("1.2TB", 1.2e12)]
)
def test_sizes_are_decimal_or_binary(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["22.8", "22.8 Gb", "GB", "-1 GB", "2 KB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is no size such as"):
        read_size(text)
