"""HybridConfig: what it reads, and what it says about a config that cannot work."""

import json
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.config import PRESETS, ConfigError, HybridConfig

RELEASED = (
    "nemotron-3-nano-30b-a3b", "nemotron-3-nano-4b", "nemotron-3-super-120b-a12b",
    "nemotron-3-ultra-550b-a55b", "nemotron-nano-9b-v2",
)  # fmt: skip
KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}


def released(name):
    return json.loads(resources.files("minimoe.catalog").joinpath(f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("changes", "field", "value", "rule"),
    [
        ({"hybrid_override_pattern": "MXE"}, "hybrid_override_pattern", "MXE", "unknown letter 'X'"),
        ({"hybrid_override_pattern": ""}, "hybrid_override_pattern", "", "at least one layer"),
        ({"num_attention_heads": 5}, "num_attention_heads", 5, "divisible by num_key_value_heads=2"),
        ({"mamba_num_heads": 7}, "mamba_num_heads", 7, "divisible by n_groups=2"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok", 9, "at most n_routed_experts=8"),
        ({"moe_latent_size": 64}, "moe_latent_size", 64, "below hidden_size=64"),
        ({"moe_latent_size": 65}, "moe_latent_size", 65, "below hidden_size=64"),
        ({"moe_latent_size": 0}, "moe_latent_size", 0, "above 0"),
        ({"hidden_size": 0}, "hidden_size", 0, "above 0"),
        ({"hidden_size": 64.0}, "hidden_size", 64.0, "whole number"),
        ({"vocab_size": -1}, "vocab_size", -1, "above 0"),
        ({"vocab_size": True}, "vocab_size", True, "whole number"),
        ({"head_dim": 0}, "head_dim", 0, "above 0"),
        ({"conv_kernel": 1}, "conv_kernel", 1, "at least 2"),
        ({"n_shared_experts": 2}, "n_shared_experts", 2, "must be 1"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor", 0.0, "above 0"),
        ({"time_step_limit": (1.0, 0.5)}, "time_step_limit", (1.0, 0.5), "low < high"),
        ({"time_step_min": 0.5}, "time_step_min", 0.5, "at most time_step_max=0.1"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon", 0.0, "above 0"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers", 2, "0 or 1"),
        ({"mtp_hybrid_override_pattern": "M"}, "mtp_hybrid_override_pattern", "M", "'*E'"),
        ({"mtp_final_norm": "batchnorm"}, "mtp_final_norm", "batchnorm", "'rmsnorm' or 'layernorm'"),
        ({"hybrid_override_pattern": "M-", "intermediate_size": 0}, "intermediate_size", 0, "above 0"),
    ],
)
def test_refusal_names_field_value_and_rule(changes, field, value, rule):
    with pytest.raises(ConfigError) as caught:
        HybridConfig.preset("tiny", **changes)
    message = str(caught.value)
    assert message.startswith(f"{field}={value!r}: ")
    assert rule in message
    assert "\n" not in message


def test_fields_of_unused_kinds_are_not_checked():
    config = HybridConfig.preset(
        "tiny",
        hybrid_override_pattern="M*",
        num_nextn_predict_layers=0,
        n_routed_experts=0,
        intermediate_size=0,
    )
    assert config.num_hidden_layers == 2
    with pytest.raises(ConfigError, match="^n_routed_experts=0"):
        config.replace(hybrid_override_pattern="ME")


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_in_both_spellings(name):
    data = released(name)
    config = HybridConfig.from_dict(data)
    assert config.hybrid_override_pattern == data["hybrid_override_pattern"]
    assert config.num_hidden_layers == data["num_hidden_layers"]
    for field in ("hidden_size", "num_key_value_heads", "ssm_state_size", "chunk_size", "initializer_range"):
        if field in data:
            assert getattr(config, field) == data[field], field

    newer = {key: value for key, value in data.items() if key != "hybrid_override_pattern"}
    newer["layers_block_type"] = [KINDS[letter] for letter in data["hybrid_override_pattern"]]
    if newer.pop("mtp_hybrid_override_pattern", None):
        newer["mtp_layers_block_type"] = ["full_attention", "moe"]
    assert HybridConfig.from_dict(newer) == config
    assert config.layers_block_type == newer["layers_block_type"]


def test_older_words_for_kinds():
    data = released("nemotron-3-nano-30b-a3b")
    words = {"M": "mamba", "*": "attention", "E": "moe"}
    kinds = [words[letter] for letter in data.pop("hybrid_override_pattern")]
    assert (
        HybridConfig.from_dict(data | {"layers_block_type": kinds}).layers_block_type[0] == "linear_attention"
    )
    with pytest.raises(ConfigError, match="^layers_block_type='mamba3'"):
        HybridConfig.from_dict(data | {"layers_block_type": ["mamba3"]})


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name):
    config = HybridConfig.preset(name, eos_token_id=(2, 11))
    assert HybridConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(
    pattern=st.text("M*E-", min_size=1, max_size=12),
    heads=st.integers(1, 4),
    kv_heads=st.integers(1, 4),
    groups=st.integers(1, 4),
    mamba_heads=st.integers(1, 4),
    top_k=st.integers(1, 8),
    experts=st.integers(1, 8),
    latent=st.none() | st.integers(1, 63),
    mtp=st.integers(0, 1),
)
def test_any_config_that_keeps_the_rules_survives_a_round_trip(
    pattern, heads, kv_heads, groups, mamba_heads, top_k, experts, latent, mtp
):
    config = HybridConfig(
        vocab_size=32, hidden_size=64, hybrid_override_pattern=pattern, intermediate_size=48,
        num_attention_heads=heads * kv_heads, num_key_value_heads=kv_heads, head_dim=8,
        mamba_num_heads=mamba_heads * groups, mamba_head_dim=8, n_groups=groups, ssm_state_size=8,
        n_routed_experts=max(experts, top_k), num_experts_per_tok=top_k, moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16, moe_latent_size=latent, num_nextn_predict_layers=mtp,
    )  # fmt: skip
    assert HybridConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert len(config.layers_block_type) == len(pattern)
    assert config.conv_dim == 8 * mamba_heads * groups + 2 * groups * 8
    assert config.expert_input_size == (latent or 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "^model_type='llama': must be 'nemotron_h'"),
        ({"tie_word_embeddings": True}, "^tie_word_embeddings=True: must be False"),
        ({"mlp_hidden_act": "silu"}, "^mlp_hidden_act='silu': must be 'relu2'"),
        ({"attention_bias": True}, "^attention_bias=True: must be False"),
        ({"n_group": 4}, "^n_group=4: must be 1"),
        ({"sliding_window": 512}, "^sliding_window=512: must be None"),
        ({"num_hidden_layers": 51}, "^num_hidden_layers=51: the pattern has 52 letters"),
    ],
)
def test_other_architectures_are_refused_not_misread(changes, message):
    with pytest.raises(ConfigError, match=message):
        HybridConfig.from_dict(released("nemotron-3-nano-30b-a3b") | changes)


def test_missing_sizes():
    data = released("nemotron-3-nano-30b-a3b")
    with pytest.raises(ConfigError, match="lacks hidden_size"):
        HybridConfig.from_dict({key: value for key, value in data.items() if key != "hidden_size"})
    with pytest.raises(ConfigError, match="neither hybrid_override_pattern nor layers_block_type"):
        HybridConfig.from_dict(
            {key: value for key, value in data.items() if key != "hybrid_override_pattern"}
        )


def test_transformers_spellings_of_sizes():
    config = HybridConfig.from_dict({
        "vocab_size": 32, "hidden_size": 64, "hybrid_override_pattern": "ME", "mamba_n_groups": 2,
        "mamba_d_conv": 3, "mamba_chunk_size": 16, "mamba_dt_min": 0.002, "num_local_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8,
    })  # fmt: skip
    assert (config.n_groups, config.conv_kernel, config.chunk_size) == (2, 3, 16)
    assert (config.time_step_min, config.n_routed_experts) == (0.002, 4)


def test_unknown_preset_lists_the_presets():
    with pytest.raises(ConfigError, match="tiny, small, awkward, base-12gb"):
        HybridConfig.preset("large")


def test_end_of_text_ids_are_a_tuple():
    assert HybridConfig.preset("tiny", eos_token_id=7).eos_token_ids == (7,)
    assert HybridConfig.preset("tiny", eos_token_id=[7, 8]).eos_token_ids == (7, 8)
    assert HybridConfig.preset("tiny", eos_token_id=None).eos_token_ids == ()
