"""Plans: the fewest blocks in RAM, nothing forgotten in VRAM, and llama.cpp's own allocations beside them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sparse_gguf import write_sparse

from minimoe import HybridConfig, catalog
from minimoe.catalog import Device
from minimoe.errors import MinimoeError
from minimoe.sizing import plan, weight_bytes
from minimoe.sizing.fit import COMPARED, HOST_RESERVE, NO_GPU, choose, fallback, plans
from minimoe.sizing.placement import Placement, compute_bytes

GIB, MIB = 1 << 30, 1 << 20
NANO = catalog.model("nemotron-3-nano-30b-a3b").spec
NANO_4B = catalog.model("nemotron-3-nano-4b").spec
NANO_9B = catalog.model("nemotron-nano-9b-v2").spec
SUPER = catalog.model("nemotron-3-super-120b-a12b").spec
ULTRA = catalog.model("nemotron-3-ultra-550b-a55b").spec
STEP = catalog.model("step-3.7-flash").spec
PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
DDR4 = catalog.host_memory("ddr4-3200")


def card(gib, rate=360e9):
    return Device(f"{gib} GiB", int(gib * GIB), rate, "a test")


# What llama.cpp says that it allocates for a context: a process of its own, because a mistake here aborts it.
CHILD = """
import json, os, sys
from minimoe.ggml.library import library, log
path, contexts, sequences = json.loads(sys.argv[1])
api = library()
settings = api.llama_model_default_params()
settings.no_alloc, settings.load_mode = True, api.LLAMA_LOAD_MODE_NONE
model = api.llama_model_load_from_file(os.fsencode(path), settings)
found = []
for context in contexts:
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max, settings.swa_full = context * sequences, sequences, False
    with log.listen() as lines:
        api.llama_init_from_model(model, settings)
    found.append([text for _, text in lines])
print(json.dumps(found))
"""


def allocated(spec, folder: Path, contexts, sequences=1):
    """Bytes of KV, of recurrent state and of the compute buffer, by context."""
    path = write_sparse(spec, folder / "shape.gguf")
    arguments = json.dumps([str(path), contexts, sequences])
    child = subprocess.run([sys.executable, "-c", CHILD, arguments], capture_output=True, text=True, env=os.environ.copy())
    assert child.returncode == 0, child.stderr[-2000:]

    def mib(lines, pattern):
        return sum(float(match.group(1)) for line in lines if (match := re.search(pattern, line))) * MIB

    patterns = (r"llama_kv_cache: size = +([\d.]+) MiB", r"llama_memory_recurrent: size = +([\d.]+) MiB",
                r"compute buffer size = +([\d.]+) MiB")  # fmt: skip
    return [tuple(mib(lines, pattern) for pattern in patterns) for lines in json.loads(child.stdout)]


@pytest.mark.parametrize(
    ("spec", "sequences"), [(NANO, 1), (NANO, 3), (NANO_4B, 1), (SUPER, 1), (STEP, 2)], ids=lambda x: getattr(x, "name", x)
)
def test_states_and_compute_buffer_against_llama_cpp(spec, sequences, tmp_path):
    """To the hundredth of a MiB that its log prints; the compute buffer is an estimate, and on the safe side."""
    contexts = [1000, 8192, 131_072, 1_000_000]
    place = Placement(spec, weight_bytes(spec, "Q4_0"), sequences, "f16", False, 0)
    for context, (kv, recurrent, compute) in zip(contexts, allocated(spec, tmp_path, contexts, sequences), strict=True):
        ours = place.device(context)
        assert ours["kv"] == pytest.approx(kv, abs=0.02 * MIB)
        assert ours["ssm"] + ours["conv"] == pytest.approx(recurrent, abs=0.01 * MIB)
        assert 0.6 < compute / ours["compute"] <= 1


def test_the_estimate_grows_with_the_micro_batch():
    assert compute_bytes(NANO, 8192, 2048) == 4 * compute_bytes(NANO, 8192, 512)
    assert compute_bytes(NANO, 1_000_000) - compute_bytes(NANO, 0) == 512 * 2 * 1_000_192


@pytest.mark.parametrize("quant", ["Q4_0", "IQ4_XS", "Q4_K_M", "Q8_0"])
def test_the_fewest_blocks_that_make_room(quant):
    one = plan(NANO, quant, 8192, "rtx-3060", ram_memory=DDR4)
    owners = tuple(block for block, letter in enumerate(PATTERN) if letter == "E")
    assert one.fits == "split" and one.expert_blocks == owners
    assert one.ram_blocks == owners[: len(one.ram_blocks)] and one.n_cpu_moe == one.ram_blocks[-1] + 1
    assert sum(one.vram.values()) + one.headroom == 12 * GIB and one.headroom >= 0
    # one block fewer would not do
    place = Placement(NANO, one.weights, 1, "f16", False, one.vram["reserve"])
    assert place.needs(8192, one.ram_blocks[:-1]) > 12 * GIB >= place.needs(8192, one.ram_blocks)


def test_nothing_is_lost_between_the_memories():
    for one in plans(NANO, 8192, "rtx-3060"):
        assert one.vram["weights"] + sum(one.ram.values()) == one.weights.total
        assert one.ram["embedding"] == one.weights.by_kind["embedding"]
    one = plan(NANO, "Q4_0", 8192, "rtx-3060")
    assert one.ram["experts"] == 9 * one.weights.by_kind["routed_experts"] // 23
    assert one.vram["weights"] + one.vram["kv"] + one.vram["ssm"] == pytest.approx(10_876 * MIB, abs=MIB)


@pytest.mark.parametrize("name", [n for n in catalog.models() if catalog.model(n).spec.count("moe")])
def test_the_flag_moves_the_blocks_that_the_plan_says(name):
    """llama.cpp's --n-cpu-moe N takes the tensors that match this, for i from 0 to N - 1 (common/common.h)."""
    moved = 0
    for one in plans(catalog.model(name).spec, 8192, "rtx-3060", ["Q2_K", "Q4_0", "Q8_0"]):
        n = 10**6 if "--cpu-moe" in one.flags else one.n_cpu_moe
        matched = [re.match(r"blk\.(\d+)\.ffn_(up|down|gate|gate_up)_(ch|)exps", tensor.name) for tensor in one.weights.tensors]
        taken = {int(match.group(1)) for match in matched if match and int(match.group(1)) < n}
        assert taken == set(one.ram_blocks)
        moved += len(taken)
    assert moved


def test_flags():
    split = plan(NANO, "Q4_0", 8000, "rtx-3060")
    assert " ".join(split.flags) == "-ngl 99 --n-cpu-moe 21 -c 8192 -np 1 --jinja"
    assert plan(NANO, "Q4_0", 8192, card(3)).flags[:3] == ("-ngl", "99", "--cpu-moe")
    whole = plan(NANO_4B, "Q4_K_M", 32_768, "rtx-3060", batch=4, kv_dtype="q8_0")
    assert " ".join(whole.flags) == "-ngl 99 -c 131072 -np 4 -fa on -ctk q8_0 -ctv q8_0 --jinja"
    bare = Device(NO_GPU, 32 * GIB, 50e9, "a test", unified=True)
    assert plan(NANO, "Q4_0", 8192, bare).flags[:2] == ("-ngl", "0")


def test_what_fits_whole_on_12_gib():
    """Nano-4B in any quant, 9B-v2 up to Q8_0, none of the larger ones."""
    assert {one.fits for one in plans(NANO_4B, 8192, "rtx-3060")} == {"whole"}
    nine = {one.quant: one for one in plans(NANO_9B, 8192, "rtx-3060")}
    assert nine["Q8_0"].fits == "whole" and 2 * GIB < nine["Q8_0"].headroom < 3 * GIB
    assert nine["BF16"].fits == "no" and "a smaller quant" in nine["BF16"].why[-1]
    assert plan(NANO_9B, "Q4_K_M", 131_072, "rtx-3060").fits == "whole"
    for spec in (NANO, SUPER, ULTRA, STEP):
        assert "whole" not in {one.fits for one in plans(spec, 8192, "rtx-3060")}


def test_super_and_step_need_the_ram_of_a_workstation_and_ultra_more():
    def splits(spec, gib):
        return {one.quant for one in plans(spec, 8192, "rtx-3060", ram=gib * GIB) if one.fits == "split"}

    assert splits(NANO, 32) >= {"Q4_K_M", "IQ4_XS", "Q4_0", "MXFP4_MOE"} and "Q8_0" in splits(NANO, 32)
    assert not splits(SUPER, 32) and splits(SUPER, 96) >= {"IQ4_XS", "Q4_0", "Q4_K_M"}
    assert not splits(STEP, 24) and splits(STEP, 128) >= {"IQ4_XS", "Q3_K_L", "Q4_K_S"}
    assert not splits(ULTRA, 96) and not splits(ULTRA, 128) & {"IQ2_XXS", "Q2_K", "IQ4_XS"}


def test_what_is_missing_is_said():
    short = plan(SUPER, "IQ4_XS", 8192, "rtx-3060", ram=32 * GIB)
    assert short.fits == "no" and short.headroom >= 0
    assert f"{(sum(short.ram.values()) + HOST_RESERVE) / 1e9:.1f} GB, and there are 34.4 GB" in " ".join(short.why)
    dense = plan(ULTRA, "Q4_0", 8192, "rtx-3060")
    assert dense.fits == "no" and dense.ram_blocks == dense.expert_blocks and dense.headroom < 0 and dense.max_context == 0
    assert "Even with all routed experts in RAM" in " ".join(dense.why)


def test_the_longest_context():
    for spec, quant in ((NANO, "Q4_0"), (NANO_9B, "Q4_K_M"), (STEP, "IQ4_XS")):
        one = plan(spec, quant, 8192, "rtx-3060")
        place = Placement(spec, one.weights, 1, "f16", False, one.vram["reserve"])
        assert one.max_context % 256 == 0 and one.context <= one.max_context <= one.longest_context
        assert place.needs(one.max_context, one.ram_blocks) <= 12 * GIB < place.needs(one.max_context + 1, one.ram_blocks)
        assert place.needs(one.longest_context, one.expert_blocks) <= 12 * GIB
    assert plan(NANO_9B, "Q4_K_M", 8192, "rtx-3060", kv_dtype="q8_0").max_context > 300_000


def test_a_context_beyond_the_model_is_said_and_computed():
    one = plan(NANO, "Q4_0", 500_000, "rtx-3060")
    assert one.fits == "split" and one.vram["kv"] == 500_224 * 6144
    assert "A context of 500,000 is beyond the 262,144" in one.why[0]
    assert not any("beyond" in why for why in plan(NANO, "Q4_0", 262_144, "rtx-3060").why)


def test_one_memory_for_all_is_not_split():
    spark = plan(SUPER, "Q4_0", 8192, "dgx-spark")
    assert spark.fits == "whole" and not spark.ram and spark.vram["weights"] == spark.weights.total
    assert spark.n_cpu_moe is None and spark.vram["reserve"] == HOST_RESERVE
    assert plan(ULTRA, "Q4_0", 8192, "dgx-spark").fits == "no"
    assert plan(ULTRA, "Q4_0", 8192, "m3-ultra").fits == "whole"


def test_the_ceiling_of_a_plan():
    fast, slow = (plan(NANO, "Q4_0", 8192, "rtx-3060", ram_memory=rate) for rate in (96e9, 51.2e9))
    assert fast.ceiling.tokens_per_second > 1.2 * slow.ceiling.tokens_per_second
    assert slow.ceiling.tokens_per_second == pytest.approx(90, abs=0.5) and slow.ceiling.origin["vram"] == "published peak"
    assert plan(NANO, "Q4_0", 8192, "rtx-3060").ceiling is None  # of a split, without the RAM's bandwidth
    assert plan(NANO_4B, "Q4_0", 8192, "rtx-3060").ceiling is not None
    assert plan(NANO_4B, "Q4_0", 8192, card(12, None)).ceiling is None


def test_which_one_to_begin_with():
    nine, nano = plans(NANO_9B, 8192, "rtx-3060"), plans(NANO, 8192, "rtx-3060", ram_memory=DDR4)
    assert choose(nine).quant == "Q8_0"
    four = {one.quant: one for one in nano}
    best = choose(nano)
    assert best.fits == "split" and best.quant in ("Q4_0", "IQ4_XS", "IQ4_NL")
    assert all(best.ceiling.tokens_per_second >= four[q].ceiling.tokens_per_second for q in ("Q4_K_M", "Q4_K_S", "MXFP4_MOE"))
    assert choose(nano, ["Q4_K_M", "Q8_0"]).quant == "Q4_K_M"  # the only one of four bits that can be downloaded
    assert choose(plans(ULTRA, 8192, "rtx-3060", ram=64 * GIB)) is None
    assert choose(plans(NANO, 8192, card(2.5), ram=64 * GIB)).fits == "split"


def test_no_small_quant_of_nano_exists():
    found = {one.quant: one.fallback for one in plans(NANO, 8192, "rtx-3060")}
    smallest = min(found.values(), key=lambda fell: fell.bytes)
    assert smallest.bytes > 17.8e9 and smallest.intended_bytes < 7e9
    assert smallest.share > 0.95 and set(smallest.columns) == {1856, 2688, 3712}
    assert found["Q3_K_M"].bytes > found["Q4_0"].bytes  # three bits, and larger than four
    assert found["Q8_0"].share == 0 and found["Q8_0"].intended_bytes == found["Q8_0"].bytes


def test_fallback_of_other_shapes():
    assert fallback(weight_bytes(ULTRA, "IQ2_XXS")).share == 0
    assert set(fallback(weight_bytes(SUPER, "Q4_K_M")).columns) == {2688}
    awkward = fallback(weight_bytes(HybridConfig.preset("awkward"), "Q4_K_M"))
    assert awkward.share > 0.9 and not fallback(weight_bytes(HybridConfig.preset("small"), "Q4_K_M")).share


def test_plans_leave_out_what_cannot_be():
    assert [one.quant for one in plans(NANO, 8192, "rtx-3060")] == sorted(
        COMPARED, key=lambda quant: -weight_bytes(NANO, quant).total
    )
    assert "MXFP4_MOE" not in {one.quant for one in plans(NANO_4B, 8192, "rtx-3060")}  # no experts to put in MXFP4
    assert [one.quant for one in plans(NANO_4B, 8192, "rtx-3060", ["MXFP4_MOE"])] == ["MXFP4_MOE"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "rtx 3061"}, "unknown GPU 'rtx 3061'; the nearest are rtx-3060"),
        ({"quant": "Q4_KM"}, "unknown quant 'Q4_KM'; did you mean Q4_K_M"),
        ({"context": 0}, "context=0: must be 1 or more"),
        ({"batch": 0}, "batch=0: must be 1 or more"),
        ({"reserve": -1}, "reserve=-1: must be 0 or more"),
        ({"ram": -1.0}, "ram=-1.0: must be 0 or more"),
    ],
)
def test_wrong_questions_are_refused(change, message):
    asked = {"quant": "Q4_0", "context": 8192, "device": "rtx-3060"} | change
    with pytest.raises(MinimoeError, match=re.escape(message)) as refused:
        plan(NANO, **asked)
    assert "\n" not in str(refused.value)


def test_an_unknown_kv_type_is_refused():
    with pytest.raises(ValueError, match="dtype 'q3_0' is unknown"):
        plan(NANO, "Q4_0", 8192, "rtx-3060", kv_dtype="q3_0")
