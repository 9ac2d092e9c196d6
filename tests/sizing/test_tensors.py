"""The tensors of a GGUF file from a model's shape: against the parameter count, our own export, and llama.cpp's loader."""

from collections import Counter

import gguf
import pytest
import sparse_gguf
from gguf_helpers import model_of, tokenizer

from minimoe import HybridConfig, catalog
from minimoe.sizing import count_parameters
from minimoe.sizing.tensors import architecture, block_count, gguf_tensors

PRESETS = ("tiny", "small", "awkward", "base-12gb")
DENSE = dict(hybrid_override_pattern="M-M*-", num_nextn_predict_layers=0, intermediate_size=96)
# Of Step's tensors these are no parameters, or none that the count has.
NOT_COUNTED = {"rope_freqs.weight", *(f"blk.{n}.nextn.shared_head_head.weight" for n in (45, 46, 47))}


def configs():
    return [HybridConfig.preset(name) for name in PRESETS] + [HybridConfig.preset("tiny", **DENSE)]


@pytest.mark.parametrize("model", [*catalog.models(), *PRESETS])
def test_numbers_add_up_to_the_parameter_count(model):
    spec = catalog.model(model).spec if model in catalog.models() else HybridConfig.preset(model)
    kinds = Counter()
    for tensor in gguf_tensors(spec):
        if tensor.name not in NOT_COUNTED:
            kinds[tensor.kind] += tensor.numbers
    count = count_parameters(spec)
    assert dict(kinds) == count.by_kind and kinds.total() == count.total
    with_mtp = [t for t in gguf_tensors(spec, mtp=True) if t.name not in NOT_COUNTED]
    mtp = sum(tensor.numbers for tensor in with_mtp if tensor.kind == "mtp")
    # the converter drops the MTP block of Puzzle, whose experts differ from block to block
    assert mtp == (0 if model == "nemotron-labs-3-puzzle-75b-a9b" else count.mtp)
    assert sum(t.numbers for t in with_mtp) == count.total + mtp


def test_the_exceptions_of_step_are_what_they_are_said_to_be():
    spec = catalog.model("step-3.7-flash").spec
    odd = {t.name: t for t in gguf_tensors(spec, mtp=True) if t.name in NOT_COUNTED}
    assert odd.keys() == NOT_COUNTED
    assert odd.pop("rope_freqs.weight").dims == (64,)
    assert {t.dims for t in odd.values()} == {(4096, 128_896)}


def test_published_tensor_counts():
    """Nano-4B: Megatron-Bridge's card, 263 tensors there and here; Step's sidecar: 55, as those who opened it say."""
    assert len(gguf_tensors(catalog.model("nemotron-3-nano-4b").spec)) == 263
    assert len(gguf_tensors(catalog.model("step-3.7-flash").spec, mtp="only")) == 55


def test_a_sidecar_has_the_ends_and_the_mtp_blocks():
    spec = catalog.model("nemotron-3.5-lightning-30b-a3b").spec
    whole, trunk, side = (gguf_tensors(spec, mtp) for mtp in (True, False, "only"))
    ends = {t for t in trunk if t.block is None}
    assert set(side) == ends | {t for t in whole if t.kind == "mtp"}
    assert set(whole) == set(trunk) | set(side) and {t.block for t in side} == {None, 52}
    assert [block_count(spec, mtp) for mtp in (False, True, "only")] == [52, 53, 53]


@pytest.mark.parametrize("config", configs(), ids=[*PRESETS, "dense"])
def test_names_and_shapes_are_those_of_our_own_export(config):
    import torch

    from minimoe import HybridLM
    from minimoe.interop.gguf_names import file_shape, is_quantised, places

    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in HybridLM(config).state_dict().items()}
    ours = {t.name: t for t in gguf_tensors(config, mtp=True)}
    assert len(ours) == len(list(places(config)))
    for place in places(config):
        there, tensor = file_shape(place, shapes[place.ours], config), ours[place.theirs]
        assert tensor.dims == there[::-1] and tensor.block == place.layer, place
        assert tensor.untouched is not is_quantised(place.theirs, there), place


def test_an_exported_file_has_these_tensors(tmp_path):
    from minimoe.interop import save_gguf

    model = model_of("MEM*E")
    save_gguf(model, tmp_path / "model.gguf", tokenizer(), quant="BF16")
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    expected = gguf_tensors(model.config, mtp=True)
    assert found.keys() == {t.name for t in expected}
    for tensor in expected:
        assert tuple(found[tensor.name].shape) == tensor.dims
        # the router of the MTP block: float32 from us, 16 bits from llama.cpp's converter
        if not (tensor.untouched and not tensor.always_f32):
            assert (found[tensor.name].tensor_type.name == "F32") == tensor.always_f32, tensor.name
    assert [t.name for t in expected if t.untouched and not t.always_f32] == ["blk.5.ffn_gate_inp.weight"]


def test_architectures():
    names = {name: architecture(catalog.model(name).spec) for name in catalog.models()}
    dense, other = {"nemotron-3-nano-4b", "nemotron-nano-9b-v2"}, {"step-3.7-flash": "step35"}
    other |= dict.fromkeys(("qwen3-30b-a3b", "qwen3-nemotron-235b-a22b-genrm"), "qwen3moe")
    assert names == {n: other.get(n, "nemotron_h" if n in dense else "nemotron_h_moe") for n in names}
    plain, normed, mlp = catalog.Attention(4, 2, 16), catalog.Attention(4, 2, 16, qk_norm=True), catalog.MLP(64, gated=True)
    mixtral, deepseek = catalog.MoE(8, 2, 64, gated=True), catalog.MoE(8, 2, 64, gated=True, shared_width=64)
    for attention, forward, name in (
        (plain, mlp, "llama"), (normed, mlp, "qwen3"), (plain, mixtral, "llama"), (normed, mixtral, "qwen3moe"),
        (plain, deepseek, "transformer"),
    ):  # fmt: skip
        assert architecture(catalog.ArchitectureSpec("any", 100, 64, (attention, forward) * 2)) == name


GATE = [("nemotron-nano-9b-v2", False), ("nemotron-3.5-lightning-30b-a3b", True), ("step-3.7-flash", False)]
ALL = [(name, mtp) for name in catalog.models() for mtp in (False, True) if not mtp or catalog.model(name).spec.mtp]


@pytest.mark.parametrize(
    ("model", "mtp"), [*GATE, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in GATE)]
)
def test_llama_cpp_loads_a_file_of_these_names_and_shapes(model, mtp, tmp_path):
    """Its loader asks for every tensor of an architecture by name and shape, and complains of any left over."""
    spec = catalog.model(model).spec
    path = sparse_gguf.write_sparse(spec, tmp_path / "sparse.gguf", mtp)
    found = sparse_gguf.in_child("loads", path, mtp)
    tensors = gguf_tensors(spec, mtp)
    assert found == {
        "parameters": sum(t.numbers for t in tensors),
        "bytes": sum(t.numbers * (4 if t.always_f32 else 2) for t in tensors),
        "errors": [],
    }


def test_llama_cpp_refuses_a_wrong_shape(tmp_path, monkeypatch):
    """The test above can fail: one row less in one tensor, and the loader says so."""
    spec = catalog.model("nemotron-nano-9b-v2").spec
    tensors = list(gguf_tensors(spec))
    at = next(n for n, t in enumerate(tensors) if t.name == "blk.0.ssm_out.weight")
    tensors[at] = type(tensors[at])(**{**vars(tensors[at]), "dims": (tensors[at].dims[0], tensors[at].dims[1] - 1)})
    monkeypatch.setattr(sparse_gguf, "gguf_tensors", lambda spec, mtp: tensors)
    path = sparse_gguf.write_sparse(spec, tmp_path / "sparse.gguf")
    assert "blk.0.ssm_out.weight" in sparse_gguf.in_child("loads", path)["error"]


def test_only_shapes_are_taken():
    with pytest.raises(TypeError, match="ArchitectureSpec or a HybridConfig"):
        gguf_tensors("nemotron-3-nano-4b")
    with pytest.raises(ValueError, match="mtp='yes': must be True, False or 'only'"):
        gguf_tensors(catalog.model("nemotron-3-nano-4b").spec, mtp="yes")
