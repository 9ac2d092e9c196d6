"""llama.cpp's quantizer: what it makes, what it says it would make, what it cannot, and nothing half-written."""

import collections
import re

import gguf
import pytest
from llama_files import header_size

from minimoe.ggml import LlamaError, library
from minimoe.ggml.library import log
from minimoe.ggml.quantizer import NEED_IMPORTANCE, QUANTS, check_quant, predict, quantize_file

GATE = ("Q8_0", "Q4_0", "Q4_K_M", "MXFP4_MOE")


def file_types():
    """llama.cpp's numbers, as the binding has them."""
    names = {name: getattr(library(), name) for name in dir(library()) if name.startswith("LLAMA_FTYPE_")}
    return {re.sub(r"^LLAMA_FTYPE_(MOSTLY_|ALL_)?", "", name): number for name, number in names.items()}


def test_every_quant_of_llama_cpp_is_made_or_refused_by_name():
    theirs = file_types()
    del theirs["GUESSED"]
    assert {name: theirs[name] for name in QUANTS} == QUANTS
    assert set(theirs) == set(QUANTS) | set(NEED_IMPORTANCE) | {"NVFP4"}


@pytest.mark.parametrize("name", [*NEED_IMPORTANCE, "NVFP4"])
def test_what_is_refused_llama_cpp_refuses_too(name, wide_file, tmp_path):
    with pytest.raises(LlamaError, match=f"quant {name}"):
        check_quant(name)
    api = library()
    settings = api.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = file_types()[name], 1
    with log.listen() as lines:
        assert api.llama_model_quantize(str(wide_file).encode(), str(tmp_path / "out.gguf").encode(), settings)
    said = " ".join(text for _, text in lines)
    assert ("invalid output file type" if name == "NVFP4" else "imatrix") in said


@pytest.mark.parametrize("quant", [*GATE, *(pytest.param(q, marks=pytest.mark.slow) for q in QUANTS if q not in GATE)])
def test_a_file_is_what_was_predicted(quant, wide_file, tmp_path):
    target = tmp_path / "out.gguf"
    expected, done = predict(wide_file, quant), quantize_file(wide_file, target, quant)
    assert expected.file_bytes is None and done.file_bytes == target.stat().st_size
    assert (expected.tensor_bytes, expected.types, expected.fallbacks) == (done.tensor_bytes, done.types, done.fallbacks)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    if quant == "Q2_0":  # the package gguf does not know this type
        return
    tensors = gguf.GGUFReader(target).tensors
    assert done.types == dict(collections.Counter(tensor.tensor_type.name for tensor in tensors))
    assert done.tensor_bytes == sum(int(tensor.n_bytes) for tensor in tensors)
    assert done.fallbacks == []
    if quant not in ("F32",):
        assert done.tensor_bytes < 0.6 * predict(wide_file, "F32").tensor_bytes


def test_q8_0_is_the_same_as_the_gguf_package_makes(wide_file, tmp_path):
    quantize_file(wide_file, tmp_path / "out.gguf", "Q8_0")
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(wide_file).tensors}
    compared = 0
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        if tensor.tensor_type.name == "Q8_0":
            compared += 1
            assert (gguf.quants.quantize(before[tensor.name].data, tensor.tensor_type) == tensor.data).all(), tensor.name
    assert compared > 20


def test_rows_that_no_block_divides_fall_back_and_it_says_so(tiny_file, tmp_path):
    target = tmp_path / "out.gguf"
    done = quantize_file(tiny_file, target, "q4_k_m")  # any case
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors}
    widths = {tensor.name: int(tensor.shape[0]) for tensor in gguf.GGUFReader(target).tensors}
    assert len(done.fallbacks) > 10
    for fallback in done.fallbacks:
        assert fallback.columns == widths[fallback.tensor] and fallback.columns % 256
        assert fallback.used == types[fallback.tensor]
        assert {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}[fallback.wanted] == fallback.used
    assert f"{len(done.fallbacks)} of {len(types)} tensors fell back: " in done.summary()
    assert "from Q4_K to Q5_0" in done.summary()
    assert "fell back" not in predict(tiny_file, "Q8_0").summary()


def test_types_for_single_tensors(wide_file, tmp_path):
    quantize_file(wide_file, tmp_path / "out.gguf", "Q8_0", tensor_types={"ffn_(up|down)_exps": "NVFP4", "attn_q": "f16"})
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    experts = {kind for name, kind in types.items() if "_exps.weight" in name}
    assert experts == {"NVFP4"} and types["blk.3.attn_q.weight"] == "F16" and types["blk.3.attn_k.weight"] == "Q8_0"


def test_quantising_twice_has_to_be_asked_for(wide_file, tmp_path):
    first = tmp_path / "first.gguf"
    quantize_file(wide_file, first, "Q8_0")
    with pytest.raises(LlamaError, match="first.gguf: cannot be quantised to Q4_0: requantizing.*or requantize=True"):
        quantize_file(first, tmp_path / "second.gguf", "Q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["first.gguf"]
    assert "Q4_0" in quantize_file(first, tmp_path / "second.gguf", "Q4_0", requantize=True).types


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"quant": "Q4"}, "quant 'Q4' is unknown; llama.cpp has F32, F16, Q4_0"),
        ({"quant": None}, "quant None is unknown"),
        ({"quant": "Q8_0", "threads": 0}, "threads=0"),
        ({"quant": "Q8_0", "tensor_types": {"x": "F17"}}, "'F17' is no type of ggml's"),
        ({"quant": "Q8_0", "tensor_types": {"(": "F16"}}, "regular expression"),
    ],
)
def test_wishes_that_cannot_be_granted(keywords, words, wide_file, tmp_path):
    with pytest.raises(LlamaError, match=re.escape(words)) as caught:
        quantize_file(wide_file, tmp_path / "out.gguf", **keywords)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file_alone(tiny_file, tmp_path):
    raw, header = tiny_file.read_bytes(), header_size(tiny_file)
    cut, target = tmp_path / "cut.gguf", tmp_path / "out.gguf"
    target.write_bytes(b"what was there")
    for length in (0, 20, 24, header // 2, header + 1000, len(raw) - 1):
        cut.write_bytes(raw[:length])
        with pytest.raises(LlamaError, match="cut.gguf.*again") as caught:
            quantize_file(cut, target, "Q8_0")
        assert "\n" not in str(caught.value)
    assert target.read_bytes() == b"what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf", "out.gguf"]


def test_targets_that_cannot_be(tiny_file, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny_file.read_bytes())
    with pytest.raises(LlamaError, match="is the file that is read"):
        quantize_file(copy, tmp_path / "." / "copy.gguf", "Q8_0")
    with pytest.raises(LlamaError, match="is no plain file"):
        quantize_file(copy, tmp_path, "Q8_0")
    with pytest.raises(LlamaError, match="nowhere.gguf does not exist"):
        quantize_file(tmp_path / "nowhere.gguf", copy, "Q8_0")
