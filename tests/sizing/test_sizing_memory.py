"""State bytes, against the figures that are known for the released models and against the definition."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe import HybridConfig, catalog
from minimoe.catalog import MLP, MTP, ArchitectureSpec, Attention, Mamba2
from minimoe.sizing import state_bytes

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# KV bytes a token in f16, KV at 8k, 32k and 128k tokens, SSM state in f32
KNOWN = {
    "nemotron-3-nano-30b-a3b": (6_144, 48 * MIB, 192 * MIB, 768 * MIB, 46 * MIB),
    "nemotron-3-super-120b-a12b": (8_192, 64 * MIB, 256 * MIB, 1 * GIB, 160 * MIB),
    "nemotron-3-ultra-550b-a55b": (12_288, 96 * MIB, 384 * MIB, 1536 * MIB, 384 * MIB),
    "nemotron-3-nano-4b": (16_384, 128 * MIB, 512 * MIB, 2 * GIB, 315 * MIB // 4),
    "nemotron-nano-9b-v2": (16_384, 128 * MIB, 512 * MIB, 2 * GIB, 135 * MIB),
    "nemotron-3.5-lightning-30b-a3b": (6_144, 48 * MIB, 192 * MIB, 768 * MIB, 46 * MIB),
    "nemotron-labs-3-puzzle-75b-a9b": (8_192, 64 * MIB, 256 * MIB, 1 * GIB, 120 * MIB),
    "qwen3-30b-a3b": (98_304, 768 * MIB, 3 * GIB, 12 * GIB, 0),
    "qwen3-nemotron-235b-a22b-genrm": (192_512, 1504 * MIB, 6016 * MIB, 24_064 * MIB, 0),
    "step-3.7-flash": (49_152, 450 * MIB, 1602 * MIB, 6210 * MIB, 0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_released_models(name):
    per_token, *kv, ssm = KNOWN[name]
    spec = catalog.model(name).spec
    for tokens, expected in zip((8_192, 32_768, 131_072), kv, strict=True):
        state = state_bytes(spec, tokens)
        assert (state.kv_per_token, state.kv, state.ssm) == (per_token, expected, ssm)
        assert state.total == state.kv + state.ssm + state.conv


def test_ultra_keeps_as_much_ssm_as_fp8_kv_at_65536_tokens():
    """Its report: the 32-bit Mamba cache is larger than the FP8 KV cache up to 64k tokens."""
    state = state_bytes(catalog.model("nemotron-3-ultra-550b-a55b").spec, 65_536, kv_dtype="fp8")
    assert state.kv == state.ssm == 384 * MIB


def test_convolution_windows_of_nano():
    state = state_bytes(catalog.model("nemotron-3-nano-30b-a3b").spec, 0)
    assert state.conv == 23 * 3 * (4096 + 2 * 8 * 128) * 4
    assert (state.kv, state.kv_per_token) == (0, 6_144)


def test_full_attention_of_an_older_model():
    """Llama-2-13B, 40 layers with 40 KV heads: 800 KiB a token."""
    spec = ArchitectureSpec(
        "llama-2-13b", 32_000, 5120, (Attention(40, 40, 128), MLP(13_824, gated=True)) * 40
    )
    assert state_bytes(spec, 1).kv_per_token == 819_200
    assert state_bytes(spec, 8_192).kv == 6.25 * GIB


def test_tokens_beyond_a_window_cost_nothing():
    """Step-3.7-Flash: 12 full layers, 33 with a window of 512."""
    spec = catalog.model("step-3.7-flash").spec
    at = {tokens: state_bytes(spec, tokens) for tokens in (511, 512, 513, 8_192)}
    assert at[511].kv_per_token == 45 * 4_096
    assert at[512].kv_per_token == at[8_192].kv_per_token == 49_152
    assert at[512].kv - at[511].kv == 45 * 4_096
    assert at[513].kv - at[512].kv == 49_152
    assert at[8_192].kv == 8_192 * 49_152 + 66 * MIB


@pytest.mark.parametrize(
    ("dtype", "ratio"),
    [("float32", 2), ("f16", 1), ("bfloat16", 1), ("fp8", 0.5), ("q8_0", 8.5 / 16), ("q4_0", 4.5 / 16)],
)
def test_dtypes(dtype, ratio):
    spec = catalog.model("nemotron-3-nano-30b-a3b").spec
    assert state_bytes(spec, 1024, kv_dtype=dtype).kv == ratio * state_bytes(spec, 1024).kv


def test_torch_dtypes():
    torch = pytest.importorskip("torch")
    spec = catalog.model("nemotron-3-nano-30b-a3b").spec
    assert state_bytes(
        spec, 7, kv_dtype=torch.float32, ssm_dtype=torch.bfloat16, conv_dtype=torch.float16
    ) == (state_bytes(spec, 7, kv_dtype="float32", ssm_dtype="bfloat16", conv_dtype="float16"))


@given(tokens=st.integers(0, 100_000), batch=st.integers(1, 64))
def test_only_kv_grows_with_tokens_and_everything_with_the_batch(tokens, batch):
    spec = catalog.model("nemotron-3-super-120b-a12b").spec
    one, many, empty = state_bytes(spec, tokens), state_bytes(spec, tokens, batch), state_bytes(spec, 0)
    assert many.total == batch * one.total
    assert many.kv_per_token == one.kv_per_token
    assert (one.ssm, one.conv) == (empty.ssm, empty.conv)
    assert one.kv == tokens * one.kv_per_token


def test_drafting_adds_the_mtp_blocks():
    spec = ArchitectureSpec("x", 8, 32, (Mamba2(4, 8, 2, 16),), mtp=(MTP((Attention(4, 2, 8),)),) * 2)
    assert state_bytes(spec, 10).kv == 0
    assert state_bytes(spec, 10, mtp=True).kv == 2 * 10 * (2 * 2 * 8) * 2


def test_a_config_is_as_good_as_a_spec():
    config = HybridConfig.preset("tiny")
    assert state_bytes(config, 5).kv == 5 * 2 * 2 * 16 * 2
    assert state_bytes(config, 5).ssm == 2 * 8 * 16 * 16 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": -1}, "tokens=-1"),
        ({"tokens": 1, "batch": 0}, "batch=0"),
        ({"tokens": 1, "kv_dtype": "int7"}, "dtype 'int7' is unknown; use one of .*float16"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        state_bytes(HybridConfig.preset("tiny"), **arguments)
