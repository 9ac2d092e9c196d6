"""Sizes of GGUF files: tensor by tensor what llama.cpp's own quantiser decides, and the figures measured before."""

import functools
import random
import subprocess
import sys
import time

import pytest
import sparse_gguf

from minimoe import HybridConfig, catalog
from minimoe.catalog import MLP, MTP, ArchitectureSpec, Attention, Mamba2, MoE
from minimoe.sizing import count_parameters, weight_bytes
from minimoe.sizing.quants import QUANTS, QuantError
from minimoe.sizing.tensors import architecture

FIVE = ("nemotron-3-nano-30b-a3b", "nemotron-3-super-120b-a12b", "nemotron-3-ultra-550b-a55b", "nemotron-3-nano-4b",
        "nemotron-nano-9b-v2")  # fmt: skip
GATE = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "MXFP4_MOE", "Q3_K_M", "Q2_K", "IQ2_M", "Q2_0", "Q1_0")
# MiB of tensor data, measured with llama.cpp's quantiser in a dry run without importance matrix, before any of this.
MEASURED = {
    "nemotron-3-nano-30b-a3b": dict(
        BF16=60247, Q8_0=32022, Q6_K=31948, Q5_K_M=24826, Q4_K_M=23372, Q4_K_S=20898, IQ4_NL=17369, IQ4_XS=17359,
        MXFP4_MOE=17140, Q4_0=17137, Q3_K_M=18922, Q2_K=17072, IQ2_M=17070, IQ3_XXS=17240),
    "nemotron-nano-9b-v2": dict(
        BF16=16957, Q8_0=9012, Q6_K=8705, Q5_K_M=6735, Q4_K_M=6216, Q4_K_S=5916, IQ4_NL=5143, IQ4_XS=5104,
        MXFP4_MOE=9012, Q4_0=5055, Q3_K_M=5123, Q2_K=4767, IQ2_M=4758),
    "nemotron-3-nano-4b": dict(
        BF16=7581, Q8_0=4030, Q6_K=3744, Q5_K_M=2942, Q4_K_M=2698, Q4_K_S=2633, IQ4_NL=2355, IQ4_XS=2324,
        MXFP4_MOE=4030, Q4_0=2332, Q3_K_M=2279, Q2_K=2126, IQ2_M=2073),
    "nemotron-3-super-120b-a12b": dict(
        BF16=230323, Q8_0=122514, Q6_K=107683, Q5_K_M=91275, Q4_K_M=82057, Q4_K_S=72301, IQ4_NL=66421, IQ4_XS=64527,
        MXFP4_MOE=65394, Q4_0=65148, Q3_K_M=64106, Q2_K=51015, IQ2_M=50457, IQ3_XXS=55084),
    "nemotron-3-ultra-550b-a55b": dict(BF16=1048120, Q4_K_M=329135, IQ4_XS=284159, Q2_K=198553, IQ2_XXS=138872),
}  # fmt: skip


@functools.cache
def spec(name):
    return catalog.model(name).spec


@pytest.mark.parametrize("name", MEASURED)
def test_the_sizes_that_were_measured(name):
    for quant, mib in MEASURED[name].items():
        assert round(weight_bytes(spec(name), quant, importance=False).total / 2**20) == mib, quant


def check_against_llama_cpp(model, path, quants, mtp=False, importance=False):
    """Every tensor's type, every fallback, the sum of bytes, whether a matrix is needed, and what cannot be made."""
    theirs = sparse_gguf.in_child("dry_runs", sparse_gguf.write_sparse(model, path, mtp), list(quants), importance)
    for quant in quants:
        if "error" in theirs[quant]:
            assert "no tensor type fallback is defined" in theirs[quant]["error"]
            with pytest.raises(QuantError, match="llama.cpp has no type to put in its place"):
                weight_bytes(model, quant, mtp, importance)
            continue
        ours = weight_bytes(model, quant, mtp, importance)
        assert {t.name: t.type for t in ours.tensors} == theirs[quant]["types"], quant
        assert {t.name: t.type for t in ours.fallbacks} == theirs[quant]["fallbacks"], quant
        assert ours.total == theirs[quant]["bytes"], quant
        assert importance or ours.needs_importance == theirs[quant]["needs_importance"], quant
    path.unlink()  # a terabyte, for whoever counts by length


@pytest.mark.parametrize("name", FIVE)
def test_nemotron_shapes_to_the_byte(name, tmp_path):
    check_against_llama_cpp(spec(name), tmp_path / "sparse.gguf", GATE)


WITH_MTP = [name for name in catalog.models() if catalog.model(name).spec.mtp]


@pytest.mark.slow
@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize(("name", "mtp"), [*((n, False) for n in catalog.models()), *((n, True) for n in WITH_MTP)])
def test_every_model_in_every_quant_to_the_byte(name, mtp, importance, tmp_path):
    check_against_llama_cpp(spec(name), tmp_path / "sparse.gguf", QUANTS, mtp, importance)


@pytest.mark.parametrize(
    "preset", ["tiny", "awkward", *(pytest.param(p, marks=pytest.mark.slow) for p in ("small", "base-12gb"))]
)
def test_our_own_presets_to_the_byte(preset, tmp_path):
    """tiny has eight experts, for which llama.cpp has rules of its own; awkward has rows of 672 and 336."""
    model = catalog.as_spec(HybridConfig.preset(preset))
    check_against_llama_cpp(model, tmp_path / "sparse.gguf", QUANTS, mtp=True)


def random_spec(seed):
    """A hybrid or a transformer of any shape that the quantiser opens, with what its rules ask about drawn often."""
    r = random.Random(seed)
    experts = r.choice([2, 4, 8, 8, 16])
    heads, kv_heads = r.choice([(8, 1), (8, 2), (4, 4), (12, 4)])
    d, width = (r.choice([256, 512, 288, 336, 200, 96]) for _ in range(2))
    gated = r.random() < 0.5
    attention = Attention(heads, kv_heads, 32, qk_norm=gated and r.random() < 0.5)
    moe = MoE(experts, 2, width, gated=gated, latent=None if gated else r.choice([None, 64]),
              shared_width=0 if gated else r.choice([256, 144]), router_bias=not gated)  # fmt: skip
    vocabulary, tied, depth = r.choice([320, 1024]), r.random() < 0.3, r.randint(3, 40)
    dense = MLP(width, gated=gated)
    if gated:  # as Qwen3, Llama, Mixtral: grouped or not is asked of block 0, here attention
        return ArchitectureSpec("random", vocabulary, d, (attention, r.choice([moe, dense])) * depth, tied)
    mamba = Mamba2(8, 32, r.choice([1, 2]), 16)
    forward = r.choice([moe, dense])
    blocks = [mamba, attention, forward, *r.choices([mamba, attention, forward], k=depth)]
    r.shuffle(blocks)
    mtp = (MTP((attention, moe)),) if forward is moe and r.random() < 0.5 else ()
    return ArchitectureSpec("random", vocabulary, d, tuple(blocks), tied, mtp)


@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 4), (8, 2)])
def test_grouped_begins_at_four_queries_a_key(heads, kv_heads, tmp_path):
    model = ArchitectureSpec("pairs", 320, 256, (Attention(heads, kv_heads, 32), MLP(512, gated=True)) * 3)
    check_against_llama_cpp(model, tmp_path / "sparse.gguf", ("Q2_K", "IQ4_XS", "IQ3_S", "IQ2_M"))
    value = next(t for t in weight_bytes(model, "Q2_K").tensors if t.name == "blk.0.attn_v.weight")
    assert value.type == ("Q4_K" if heads // kv_heads >= 4 else "Q3_K")


SEEDS = 40


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, SEEDS))])
def test_random_shapes_to_the_byte(seed, tmp_path):
    model = random_spec(seed)
    for importance in (False, True):
        check_against_llama_cpp(model, tmp_path / "sparse.gguf", QUANTS, bool(model.mtp), importance)


def test_random_shapes_reach_every_rule():
    """Eight experts, a grouped block 0, an ungrouped one, tied embeddings, rows of no block, MTP: among the first 40."""
    specs = [random_spec(seed) for seed in range(SEEDS)]
    experts = [{b.experts for b in s.blocks if isinstance(b, MoE)} for s in specs]
    grouped = [isinstance(s.blocks[0], Attention) and s.blocks[0].heads >= 4 * s.blocks[0].kv_heads for s in specs]
    assert {8} in experts and set() in experts and {True, False} == set(grouped)
    assert any(s.tied_embeddings for s in specs) and any(s.mtp for s in specs)
    assert {architecture(s) for s in specs} == {"nemotron_h", "nemotron_h_moe", "qwen3moe", "qwen3", "llama"}
    assert any(t.type == "F16" for s in specs for t in weight_bytes(s, "Q4_K_M").tensors)


def test_a_sum_by_kind_and_by_type():
    sized = weight_bytes(spec("nemotron-3-super-120b-a12b"), "Q4_K_M", mtp=True)
    assert sum(sized.by_kind.values()) == sum(sized.by_type.values()) == sized.total == sum(t.bytes for t in sized.tensors)
    count = count_parameters(spec("nemotron-3-super-120b-a12b"))
    assert set(sized.by_kind) == {*count.by_kind, "mtp"}
    assert sized.bits_per_weight == 8 * sized.total / (count.total + count.mtp)
    assert sized.padded == sized.total  # every tensor's size is a multiple of 32 bytes
    assert list(sized.by_type.values()) == sorted(sized.by_type.values(), reverse=True)


def test_plain_types_cost_what_they_say():
    model = spec("nemotron-3-nano-4b")
    numbers = count_parameters(model).total
    assert weight_bytes(model, "F32").total == 4 * numbers
    assert weight_bytes(model, "F16").total == weight_bytes(model).total == 2 * numbers + 2 * sum(
        t.numbers for t in weight_bytes(model).tensors if t.type == "F32"
    )


def test_importance_is_assumed_only_where_it_is_demanded():
    model = spec("nemotron-3-super-120b-a12b")
    for quant in ("Q4_0", "IQ4_XS"):
        assert weight_bytes(model, quant) == weight_bytes(model, quant, importance=False)
        assert weight_bytes(model, quant) != weight_bytes(model, quant, importance=True)
        assert not weight_bytes(model, quant).importance
    low = weight_bytes(model, "IQ3_XXS")
    assert low.needs_importance and low.importance
    assert low.total == weight_bytes(model, "IQ3_XXS", importance=True).total
    assert low.total < weight_bytes(model, "IQ3_XXS", importance=False).total


def test_one_line_says_what_fell_back():
    said = weight_bytes(spec("nemotron-3-nano-30b-a3b"), "q2_k").summary()
    assert said == (
        "nemotron-3-nano-30b-a3b Q2_K: 17.90 GB (16.67 GiB), 4.54 bits a weight; "
        "134 of 401 tensors fell back: 82 from Q2_K to Q4_0, 52 from Q3_K to Q4_0"
    )
    assert "fell back" not in weight_bytes(spec("qwen3-30b-a3b"), "Q2_K").summary()
    assert weight_bytes(spec("qwen3-30b-a3b"), "IQ2_M").summary().endswith("; needs an importance matrix")


def test_no_quant_of_nano_30b_is_small_but_one():
    """Rows of 2,688 and 1,856 fit no block of 256, so every mixture of such types is about 4.5 bits wide. Q2_0 has
    blocks of 64."""
    sizes = {}
    for quant in QUANTS:
        if quant != "Q1_0":  # cannot be made
            sizes[quant] = weight_bytes(spec("nemotron-3-nano-30b-a3b"), quant)
    small = [quant for quant, sized in sizes.items() if sized.bits_per_weight < 4.5]
    assert small == ["Q2_0"] and min(s.total for q, s in sizes.items() if q != "Q2_0") > 17.8e9


def test_what_cannot_be_made_is_said_in_one_line():
    with pytest.raises(QuantError) as error:
        weight_bytes(spec("nemotron-3-nano-30b-a3b"), "Q1_0")
    assert str(error.value) == (
        "nemotron-3-nano-30b-a3b cannot be made Q1_0: blk.1.ffn_down_exps.weight: Q1_0 needs rows of a multiple of 128, "
        "this one has 1,856, and llama.cpp has no type to put in its place"
    )
    with pytest.raises(ValueError, match="unknown quant 'Q4_K_X'; did you mean Q4_K_"):
        weight_bytes(spec("nemotron-3-nano-4b"), "Q4_K_X")
    with pytest.raises(TypeError, match="ArchitectureSpec or a HybridConfig"):
        weight_bytes("nemotron-3-nano-4b")


def test_it_takes_milliseconds_and_no_torch():
    code = (
        "import sys, time\nfrom minimoe import catalog\nfrom minimoe.sizing import weight_bytes\n"
        "spec = catalog.model('nemotron-3-ultra-550b-a55b').spec\nstart = time.process_time()\n"
        "weight_bytes(spec, 'Q4_K_M')\nprint(time.process_time() - start)\n"
        "print(sorted({'torch', 'numpy', 'gguf'} & set(sys.modules)))"
    )
    seconds, loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")[:2]
    assert loaded == "[]" and float(seconds) < 0.2
    start = time.process_time()
    for quant in QUANTS:
        weight_bytes(spec("nemotron-3-ultra-550b-a55b"), quant)
    assert time.process_time() - start < 2
