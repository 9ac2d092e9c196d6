"""Ceilings: the parts against each other and by hand, and the whole against speeds that others measured."""

import random
import subprocess
import sys

import pytest

from minimoe import HybridConfig, catalog
from minimoe.catalog import MLP, ArchitectureSpec, Attention, Mamba2, MoE
from minimoe.errors import MinimoeError
from minimoe.sizing import (
    Roof,
    block_work,
    count_parameters,
    decode_ceiling,
    expected_experts,
    flops_per_token,
    prefill_ceiling,
    ridge,
    state_bytes,
    step_flops,
    step_traffic,
    weight_bytes,
)

MIB = 1 << 20
NANO = catalog.model("nemotron-3-nano-30b-a3b").spec
NANO_4B = catalog.model("nemotron-3-nano-4b").spec
SUPER = catalog.model("nemotron-3-super-120b-a12b").spec


@pytest.mark.parametrize(("tokens", "experts"), [(0, 0), (1, 6), (8, 41), (32, 100), (128, 128)])
def test_expected_experts_of_nano(tokens, experts):
    assert round(expected_experts(128, 6, tokens)) == experts


def test_expected_experts_against_drawing_them():
    draw = random.Random(0)
    for experts, top_k, tokens in ((16, 2, 5), (128, 6, 20), (8, 8, 1)):
        seen = [len({e for _ in range(tokens) for e in draw.sample(range(experts), top_k)}) for _ in range(1500)]
        assert sum(seen) / len(seen) == pytest.approx(expected_experts(experts, top_k, tokens), rel=0.01)


def test_a_token_reads_what_it_passes_through():
    """At BF16, two bytes a parameter that count_parameters calls active; float32 for what llama.cpp keeps in it."""
    moved = step_traffic(NANO, "BF16").vram
    count = count_parameters(NANO)
    assert moved["routed_experts"] == pytest.approx(2 * count.by_kind["routed_experts"] * 6 / 128)
    assert moved["head"] == 2 * count.by_kind["head"] and moved["embedding"] == 2 * NANO.hidden_size
    weights = sum(size for kind, size in moved.items() if kind not in ("kv", "ssm", "conv", "embedding"))
    assert weights == pytest.approx(2 * count.active_with_head, rel=0.01)


def test_with_enough_tokens_everything_is_read_once():
    weights, state = weight_bytes(NANO, "Q4_K_M"), state_bytes(NANO, 0)
    traffic = step_traffic(NANO, weights, tokens=10**6)
    new = 10**6 * state.kv_per_token
    assert traffic.total == pytest.approx(weights.total + new + 2 * (state.ssm + state.conv))
    assert all(number == pytest.approx(128) for number in traffic.experts.values())


def test_states_are_a_sequence_s_own_and_weights_are_not():
    one, eight = (step_traffic(NANO, "Q4_0", context=4096, batch=batch).vram for batch in (1, 8))
    for kind in ("kv", "ssm", "conv", "embedding"):
        assert eight[kind] == pytest.approx(8 * one[kind])
    for kind in ("mamba2", "attention", "shared_experts", "head", "router", "norms"):
        assert eight[kind] == one[kind]
    assert eight["routed_experts"] / one["routed_experts"] == pytest.approx(expected_experts(128, 6, 8) / 6)
    assert one["kv"] == 4097 * 6144 and one["ssm"] == 2 * 46 * MIB


def test_sliding_windows_are_read_no_further():
    spec = catalog.model("step-3.7-flash").spec
    short, long = (step_traffic(spec, "Q4_0", context=tokens).vram["kv"] for tokens in (8_192, 16_384))
    assert long - short == 8_192 * 49_152  # the 12 full layers only


def test_blocks_in_ram():
    routed = [block for block, letter in enumerate("MEMEM*EMEMEM") if letter == "E"]
    whole, split = step_traffic(NANO, "Q4_0"), step_traffic(NANO, "Q4_0", ram_blocks=routed[:3])
    per_block = whole.vram["routed_experts"] / 23
    assert split.ram["routed_experts"] == pytest.approx(3 * per_block)
    assert split.vram["routed_experts"] == pytest.approx(20 * per_block)
    assert split.ram["embedding"] == whole.vram["embedding"] and "embedding" not in split.vram
    assert split.by_kind == pytest.approx(whole.by_kind) and split.total == pytest.approx(whole.total)
    assert sorted(whole.experts)[:3] == routed[:3] and len(whole.experts) == 23


def test_blocks_count_as_in_the_file():
    """A block of a classic transformer is attention and feed-forward in one, so Step's first experts are block 3's."""
    assert list(step_traffic(catalog.model("step-3.7-flash").spec, "Q4_0").experts) == list(range(3, 45))


# VRAM before overhead, RAM, ceilings with DDR4-3200 and with DDR5-6000, by N of --n-cpu-moe: figures worked out before
# this module was, with Q4_0 and 8k of context, 360 GB/s and 51.2 or 96 GB/s.
EARLIER = {
    22: (10_876, 6_355, 96, 130), 24: (10_191, 7_040, 91, 126), 26: (9_506, 7_725, 86, 122),
    28: (8_820, 8_410, 82, 118), 30: (8_135, 9_096, 79, 115), 52: (1_284, 15_947, 54, 89),
}  # fmt: skip


@pytest.mark.parametrize("n", EARLIER)
def test_the_split_of_nano_on_a_3060(n):
    vram_mib, ram_mib, *ceilings = EARLIER[n]
    weights, state = weight_bytes(NANO, "Q4_0"), state_bytes(NANO, 8192)
    blocks = [block for block in step_traffic(NANO, weights).experts if block < n]
    in_ram = [t for t in weights.tensors if t.kind == "embedding" or t.kind == "routed_experts" and t.block in blocks]
    ram = sum(tensor.bytes for tensor in in_ram)
    assert round(ram / MIB) == ram_mib
    assert (weights.total - ram + state.kv + state.ssm) / MIB == pytest.approx(vram_mib, abs=1)
    for rate, earlier in zip((51.2e9, 96e9), ceilings, strict=True):
        ours = decode_ceiling(NANO, 360e9, weights, 8192, ram_blocks=blocks, ram=rate)
        assert 0.91 < ours.tokens_per_second / earlier < 1
        # What the earlier ones left out is what is missing: the head is in Q8_0, not Q4_0, since its rows are 2,688 wide,
        # and keys and values are read.
        head = ours.traffic.vram["head"] * (1 - 4.5 / 8.5)
        assert 1 / (ours.seconds - (head + ours.traffic.vram["kv"]) / 360e9) == pytest.approx(earlier, abs=1)


# llama.cpp's own benchmark on a DGX Spark (benches/nemotron/nemotron-dgx-spark.md at 0c1e570): tokens a second, by depth
# at batch 1, and by batch at 512 tokens.
SPARK_4B_DEPTH = {0: 52.85, 4096: 52.32, 8192: 51.27, 16_384: 49.71, 32_768: 46.71}
SPARK_SUPER_DEPTH = {0: 19.94, 4096: 19.95, 8192: 19.83, 16_384: 19.84, 32_768: 19.45}
SPARK_SUPER_BATCH = {1: 19.74, 2: 26.26, 4: 31.66, 8: 41.62, 16: 49.30, 32: 56.16}


def shares(spec, quant, measured, by):
    spark, weights = catalog.device("dgx-spark"), weight_bytes(spec, quant)
    asked = {number: {"context": number} if by == "context" else {"context": 512, "batch": number} for number in measured}
    return [measured[n] / decode_ceiling(spec, spark, weights, **asked[n]).tokens_per_second for n in measured]


def test_measured_decoding_of_nano_4b_is_the_same_share_at_every_depth():
    """So the bytes that a longer context adds are the right ones: 16 KiB a token."""
    found = shares(NANO_4B, "Q8_0", SPARK_4B_DEPTH, "context")
    assert all(0.76 < share < 0.78 for share in found) and max(found) - min(found) < 0.01


def test_counting_all_weights_overstates_the_share():
    """52.85 t/s times the whole file is 82 % of 273 GB/s; the embedding is not read, and states are written."""
    assert 52.85 * weight_bytes(NANO_4B, "Q8_0").total / 273e9 == pytest.approx(0.82, abs=0.005)
    assert shares(NANO_4B, "Q8_0", {0: 52.85}, "context")[0] == pytest.approx(0.766, abs=0.005)


def test_measured_decoding_of_super_by_depth_and_batch():
    """Its file is a mixture of its own of 65.10 GiB; Q4_0 has 63.6, so these shares are 2 % low."""
    by_depth = shares(SUPER, "Q4_0", SPARK_SUPER_DEPTH, "context")
    assert all(0.5 < share < 0.65 for share in by_depth) and max(by_depth) - min(by_depth) < 0.02
    by_batch = shares(SUPER, "Q4_0", SPARK_SUPER_BATCH, "batch")
    assert all(0.4 < share < 0.6 for share in by_batch)  # while the speed grows from 20 to 56
    # without the experts that further tokens add, 32 tokens would seem to reach a tenth of what is possible
    one = decode_ceiling(SUPER, 273e9, "Q4_0", 512)
    assert SPARK_SUPER_BATCH[32] / (32 * one.tokens_per_second) < 0.06


def test_times_of_two_memories_add():
    blocks = [1, 3, 6]
    split = decode_ceiling(NANO, 360e9, "Q4_0", 8192, ram_blocks=blocks, ram=50e9)
    traffic = step_traffic(NANO, "Q4_0", 8192, ram_blocks=blocks)
    assert split.seconds == pytest.approx(sum(traffic.vram.values()) / 360e9 + sum(traffic.ram.values()) / 50e9)
    assert split.tokens_per_second == pytest.approx(1 / split.seconds) and split.bound == "vram"
    assert decode_ceiling(NANO, 360e9, "Q4_0", ram_blocks=blocks, ram=5e9).bound == "ram"
    same = decode_ceiling(NANO, 360e9, "Q4_0", 8192, ram_blocks=blocks, ram=360e9)
    assert same.seconds == pytest.approx(decode_ceiling(NANO, 360e9, "Q4_0", 8192).seconds)


def test_arithmetic_decides_at_large_batches():
    rate = 12e12
    small, large = (decode_ceiling(NANO_4B, 360e9, "Q8_0", batch=batch, flop_per_second=rate) for batch in (1, 512))
    assert small.bound == "vram" and large.bound == "compute"
    assert large.tokens_per_second == pytest.approx(512 * rate / step_flops(NANO_4B, 0, 512))
    assert large.seconds == max(large.parts.values())


def test_what_a_bandwidth_is_is_said():
    from minimoe.bench.device import Bandwidth

    card, measured = catalog.device("rtx-3060"), Bandwidth(300e9, "sum", 1 << 30, {"sum": 300e9})
    origins = [decode_ceiling(NANO_4B, memory, "Q8_0").origin["vram"] for memory in (card, measured, 300e9)]
    assert origins == ["published peak", "measured", "given"]
    assert decode_ceiling(NANO_4B, measured, "Q8_0").seconds == decode_ceiling(NANO_4B, 300e9, "Q8_0").seconds


def test_prefill_by_hand():
    """One micro-batch: the longer of arithmetic and traffic. Several: their sum."""
    rate, memory = 20e12, 360e9
    one = prefill_ceiling(NANO, memory, rate, 512, "Q4_0")
    assert one.bound == "compute" and one.seconds == pytest.approx(step_flops(NANO, 0, 1, 512) / rate)
    moved = prefill_ceiling(NANO, memory, None, 512, "Q4_0")
    assert moved.bound == "vram" and moved.seconds == pytest.approx(step_traffic(NANO, "Q4_0", tokens=512).total / memory)
    steps = [step_traffic(NANO, "Q4_0", start, 1, new).total / memory for start, new in ((100, 512), (612, 512), (1124, 76))]
    several = prefill_ceiling(NANO, memory, None, 1100, "Q4_0", context=100)
    assert several.seconds == pytest.approx(sum(steps)) and several.tokens_per_second == pytest.approx(1100 / sum(steps))
    assert prefill_ceiling(NANO, memory, None, 1100, "Q4_0", ubatch=2048).seconds < several.seconds / 2


def test_prefill_from_ram_waits_for_ram():
    blocks = list(step_traffic(NANO, "Q4_0").experts)
    ceiling = prefill_ceiling(NANO, 360e9, 20e12, 512, "Q4_0", ram_blocks=blocks, ram=25e9)
    experts = weight_bytes(NANO, "Q4_0").by_kind["routed_experts"]
    assert ceiling.bound == "ram" and ceiling.parts["ram"] == pytest.approx(experts / 25e9, rel=0.01)


def test_measured_prefill_of_nano_4b_needs_no_more_than_a_spark_can():
    """pp2048 at 2,762 t/s: 18 TFLOP/s, and far from what its memory allows."""
    assert 2762 / prefill_ceiling(NANO_4B, 273e9, None, 2048, "Q8_0", ubatch=2048).tokens_per_second < 0.25
    assert 17e12 < 2762 / 2048 * step_flops(NANO_4B, 0, 1, 2048) < 19e12


@pytest.mark.parametrize(
    "block", [Attention(8, 2, 16), Attention(8, 2, 16, sliding_window=3), MLP(96), MoE(8, 2, 32, shared_width=64)]
)
def test_token_by_token_is_the_same_work(block):
    """Without chunks, n steps of one token multiply what one step of n tokens does, but for the heads."""
    spec = ArchitectureSpec("x", 50, 64, (block,))
    steps = sum(step_flops(spec, context) for context in range(9))
    assert steps == pytest.approx(step_flops(spec, 0, 1, 9) + 8 * 2 * 64 * 50)
    assert step_flops(spec, 4, 3, 5) == pytest.approx(3 * step_flops(spec, 4, 1, 5))


def test_flops_of_a_prompt_are_those_of_flops_per_token():
    kinds = flops_per_token(NANO, 300, mtp=False).by_kind
    assert step_flops(NANO, 0, 1, 300) == pytest.approx(300 * (sum(kinds.values()) - kinds["head"]) + kinds["head"])


def test_the_roof():
    roof = Roof(10e12, 200e9)
    assert roof.ridge == ridge(10e12, 200e9) == 50
    assert roof.attainable(5) == 1e12 and roof.attainable(50) == roof.attainable(1000) == 10e12
    assert roof.seconds(10e12, 1) == 1 and roof.seconds(1, 200e9) == 1


def test_work_of_a_block_by_hand():
    one, many = (block_work(MLP(256), 64, tokens) for tokens in (1, 512))
    weights = 2 * 64 * 256 + 64  # and the norm
    assert one.flops == 2 * 2 * 64 * 256 and one.bytes == 4 * (weights + 2 * 64)
    assert many.flops == 512 * one.flops and many.bytes == 4 * (weights + 512 * 2 * 64)
    assert 0.49 < one.intensity < 0.5 < many.intensity == many.flops / many.bytes
    half = block_work(MLP(256), 64, bytes_per_number=2)
    assert half.bytes == one.bytes / 2


@pytest.mark.parametrize(("tokens", "context"), [(1, 0), (1, 300), (64, 100)])
def test_blocks_add_up_to_the_model(tokens, context):
    """Two ways to the same bytes: GGUF tensors in float32, and parameters of one block after the other."""
    config = HybridConfig.preset("small", num_nextn_predict_layers=0)
    spec, d = catalog.as_spec(config), config.hidden_size
    works = [block_work(block, d, tokens, context) for block in spec.blocks]
    head, norm = 4 * config.vocab_size * d, 4 * d
    activations = len(works) * 2 * 4 * tokens * d
    moved = sum(work.bytes for work in works) - activations + head + norm + 4 * tokens * d
    assert moved == pytest.approx(step_traffic(config, "F32", context, 1, tokens, "f32").total, rel=1e-9)
    assert sum(work.flops for work in works) + 2 * config.vocab_size * d == pytest.approx(step_flops(spec, context, 1, tokens))


def test_a_mamba_block_moves_its_state_twice():
    block = Mamba2(8, 16, 2, 16)
    near, far = (block_work(block, 64, context=context) for context in (0, 10_000))
    assert near == far
    parameters = count_parameters(ArchitectureSpec("x", 1, 64, (block,))).by_kind
    state = 2 * (8 * 16 * 16 + 3 * block.conv_dim)
    assert near.bytes == 4 * (parameters["mamba2"] + 64 + state + 2 * 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_experts(8, 9, 1), "top_k=9: must be from 1 to experts=8"),
        (lambda: expected_experts(8, 2, -1), "tokens=-1"),
        (lambda: step_traffic(NANO, "Q4_0", context=-1), "context=-1: must be 0 or more"),
        (lambda: step_traffic(NANO, "Q4_0", batch=0), "batch=0: must be 1 or more"),
        (lambda: step_traffic(NANO, "Q4_0", ram_blocks=[0, 1]), "block 0 has no routed experts; those that have: 1, 3, 6"),
        (lambda: step_traffic(NANO_4B, "Q4_0", ram_blocks=[1]), "those that have: none"),
        (lambda: decode_ceiling(NANO, 0, "Q4_0"), "vram: the rate must be above 0"),
        (lambda: decode_ceiling(NANO, float("nan"), "Q4_0"), "vram: the rate must be above 0"),
        (lambda: decode_ceiling(NANO, 1e9, "Q4_0", ram_blocks=[1]), "ram: give the bandwidth"),
        (lambda: decode_ceiling(NANO, catalog.Device("my card", 1, None, "x"), "Q4_0"), "the bandwidth of my card is not known"),
        (lambda: decode_ceiling(NANO, 1e9, "Q4_Q"), "did you mean Q4_1 or Q4_0"),
        (lambda: prefill_ceiling(NANO, 1e9, tokens=0), "tokens=0: must be 1 or more"),
        (lambda: prefill_ceiling(NANO, 1e9, ubatch=0), "ubatch=0: must be 1 or more"),
    ],
)
def test_wrong_questions_are_refused(call, message):
    with pytest.raises(MinimoeError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_no_torch_and_little_else():
    code = (
        "import sys, minimoe.sizing as s; from minimoe import catalog; s.decode_ceiling(catalog.model('nemotron-3-nano-4b').spec, "
        "catalog.device('rtx-3060'), 'Q8_0'); print({'torch', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
