"""Parameter totals: to the digit for the released models, and against transformers for random shapes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimoe import HybridConfig, catalog
from minimoe.catalog import MLP, ArchitectureSpec, Attention, MoE
from minimoe.sizing import count_parameters

# total, active, with head, with embeddings, MTP; three sources count the MTP block in, hence the differences
KNOWN = {
    "nemotron-3-nano-30b-a3b": (31_577_940_288, 2_875_433_280, 3_227_754_816, 3_580_076_352, 0),
    "nemotron-3-super-120b-a12b": (
        120_668_707_840, 11_696_495_616, 12_233_366_528, 12_770_237_440, 123_611_033_088 - 120_668_707_840),
    "nemotron-3-ultra-550b-a55b": (
        549_308_993_536, 53_911_359_488, 54_985_101_312, 56_058_843_136, 560_524_603_904 - 549_308_993_536),
    "nemotron-3-nano-4b": (3_973_556_832, 3_151_473_248, 3_562_515_040, 3_973_556_832, 0),
    "nemotron-nano-9b-v2": (8_888_227_328, 7_713_822_208, 8_301_024_768, 8_888_227_328, 0),
    "nemotron-3.5-lightning-30b-a3b": (
        31_577_940_288, 2_875_433_280, 3_227_754_816, 3_580_076_352, 32_913_266_240 - 31_577_940_288),
    "nemotron-labs-3-puzzle-75b-a9b": (
        75_353_345_024, 8_263_355_392, 8_800_226_304, 9_337_097_216, 123_611_033_088 - 120_668_707_840),
    "qwen3-30b-a3b": (61_064_245_248 // 2, 2_730_702_848, 3_041_867_776, 3_353_032_704, 0),
    "qwen3-nemotron-235b-a22b-genrm": (235_093_634_560, 20_946_103_808, 21_568_433_664, 22_190_763_520, 0),
    "step-3.7-flash": (
        196_956_130_368, 10_931_407_936, 11_459_365_952, 11_987_323_968, 197_800_427_328 - 196_956_130_368),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_totals_to_the_digit(name):
    entry = catalog.model(name)
    count = count_parameters(entry.spec)
    assert (
        count.total,
        count.active,
        count.active_with_head,
        count.active_with_embeddings,
        count.mtp,
    ) == KNOWN[name]
    assert sum(count.by_kind.values()) == count.total
    if entry.config is not None:
        assert count_parameters(entry.config) == count


def test_routed_experts_dominate():
    count = count_parameters(catalog.model("nemotron-3-super-120b-a12b").spec)
    assert count.by_kind["routed_experts"] == 112_742_891_520
    assert count.by_kind["latent"] == 40 * 2 * 4096 * 1024
    assert count.by_kind["router"] == 40 * 512 * (4096 + 1)


def test_step_flash_against_the_bytes_of_its_checkpoint():
    """801 tensors that hold trunk and MTP without their heads: bfloat16, with float32 router biases."""
    count = count_parameters(catalog.model("step-3.7-flash").spec)
    assert 2 * (count.total + count.mtp) + 2 * 42 * 288 == 395_600_878_848


def test_step_and_qwen_against_transformers():
    """Built without weights: the same numbers of tensors' elements, from code that shares nothing with ours."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

    kinds = ["sliding_attention" if layer % 4 else "full_attention" for layer in range(45)]
    step = transformers.Step3p7TextConfig(
        vocab_size=128_896, layer_types=kinds, sliding_window=512, num_sliding_attention_heads=96
    )
    qwen = transformers.Qwen3MoeConfig(
        vocab_size=151_936, hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, head_dim=128,
        num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536,
    )  # fmt: skip
    with torch.device("meta"):
        trunk, model = Step3p7TextModel(step), transformers.Qwen3MoeForCausalLM(qwen)
    sizes = [sum(t.numel() for t in m.state_dict().values()) for m in (trunk, model)]
    head = 128_896 * 4096  # Step's text model has none, its multimodal wrapper does
    found = [count_parameters(catalog.model(n).spec) for n in ("step-3.7-flash", "qwen3-nemotron-235b-a22b-genrm")]
    assert [count.total for count in found] == [sizes[0] + head, sizes[1]]


def test_tied_embeddings_count_once():
    blocks = (Attention(4, 2, 16), MLP(128, gated=True))
    tied, untied = (ArchitectureSpec("x", 100, 64, blocks, tied_embeddings=tied) for tied in (True, False))
    small, large = count_parameters(tied), count_parameters(untied)
    assert large.total - small.total == 100 * 64
    assert small.active == large.active
    assert small.active_with_head == small.active_with_embeddings == large.active_with_head
    assert "head" not in small.by_kind


def test_every_layer_can_have_its_own_width():
    def of(*experts):
        return count_parameters(ArchitectureSpec("x", 100, 64, experts))

    wide, narrow = MoE(16, 8, 32, latent=16), MoE(16, 2, 8, latent=16)
    both = of(wide, narrow)
    assert both.total == of(wide).total + of(narrow).total - of(narrow).by_kind["embedding"] * 2 - 64
    assert both.total - both.active - 2 * 6400 == 2 * 16 * (8 * 32 + 14 * 8)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="got dict"):
        count_parameters({"hidden_size": 8})


shapes = st.fixed_dictionaries({
    "hybrid_override_pattern": st.text("M*E-", min_size=1, max_size=6),
    "hidden_size": st.sampled_from([32, 40]),
    "num_key_value_heads": st.sampled_from([1, 2]),
    "mamba_num_heads": st.sampled_from([4, 8]),
    "n_groups": st.sampled_from([1, 2, 4]),
    "ssm_state_size": st.sampled_from([8, 12]),
    "conv_kernel": st.integers(2, 4),
    "n_routed_experts": st.integers(4, 6),
    "moe_intermediate_size": st.integers(8, 20),
    "moe_latent_size": st.none() | st.integers(8, 24),
})  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(shapes)
def test_random_shapes_against_transformers(shape):
    """transformers builds the tensors; here nobody multiplies sizes by hand."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = HybridConfig(
        vocab_size=50, num_attention_heads=4, head_dim=8, mamba_head_dim=8, intermediate_size=24,
        num_experts_per_tok=2, moe_shared_expert_intermediate_size=28, **shape,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**config.to_dict()))
    tensors = model.state_dict()  # also the correction bias, which is a buffer there
    assert count_parameters(config).total == sum(tensor.numel() for tensor in tensors.values())
