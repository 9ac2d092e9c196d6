"""What a step moves and computes, against counts made another way."""

import json
from pathlib import Path

import gguf
import pytest

from minimoe import HybridConfig
from minimoe.bench import choose
from minimoe.bench.bounds import demand, share
from minimoe.bench.variants import Task, Variant
from minimoe.errors import MinimoeError
from minimoe.ggml.amx import write_trial
from minimoe.sizing import count_parameters, state_bytes

SMALL = Path(__file__).parents[2] / "checkpoints" / "small"
TG, PP = Task("tg", 1), Task("pp", 512)


def variant(path, runtime="llama.cpp", format_="Q8_0"):
    return Variant(runtime, str(path), "x", format_, "cpu", 1, 1)


def at(rate):
    return lambda size: rate


def test_a_file_is_counted_tensor_by_tensor():
    """One token from an empty context: a quarter of the experts, a row of the table, all else but the MTP block."""
    path = SMALL / "small-Q8_0.gguf"
    config = HybridConfig.from_dict(json.loads((SMALL / "config.json").read_text()))
    expected, last = 0.0, config.num_hidden_layers  # the MTP block comes after the trunk's
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.startswith(f"blk.{last}."):
            continue
        part = {"token_embd.weight": 1 / config.vocab_size}.get(tensor.name, 0.25 if "_exps" in tensor.name else 1.0)
        expected += part * int(tensor.n_bytes)
    state = state_bytes(config, 0)
    expected += 2 * (state.ssm + state.conv) + state.kv_per_token
    moved, passes = demand(variant(path)).traffic(TG)
    assert passes == 1 and moved == pytest.approx(expected, rel=1e-9)
    bound = demand(variant(path)).bound(TG, at(2e9), None)
    assert bound["ceiling"] == pytest.approx(2e9 / expected) and bound["bound"] == "memory"


def test_a_directory_is_counted_in_its_dtype(tiny_folder):
    config = HybridConfig.from_dict(json.loads((tiny_folder / "config.json").read_text()))
    found = demand(variant(tiny_folder, "minimoe", "float32"))
    state = state_bytes(config, 0, kv_dtype="float32")
    weights = 4 * (count_parameters(config).active_with_head + config.hidden_size)
    assert found.traffic(TG)[0] == pytest.approx(weights + 2 * (state.ssm + state.conv) + state.kv_per_token, rel=1e-9)
    half = demand(variant(tiny_folder, "transformers", "bfloat16"))
    assert half.traffic(TG)[0] < 0.7 * found.traffic(TG)[0]


def test_depth_and_batch_add_what_they_must(tiny_folder):
    found = demand(variant(tiny_folder, "minimoe", "float32"))
    config = HybridConfig.from_dict(json.loads((tiny_folder / "config.json").read_text()))
    deep = found.traffic(Task("tg", 1, depth=1000))[0] - found.traffic(TG)[0]
    assert deep == state_bytes(config, 1000, kv_dtype="float32").kv
    two = found.bound(Task("tg", 1, batch=2), at(1e9), None)["ceiling"]
    one = found.bound(TG, at(1e9), None)["ceiling"]
    assert one < two < 2 * one  # weights are shared, experts partly, states not


def test_products_bound_a_prompt(tiny_folder):
    found = demand(variant(tiny_folder, "minimoe", "float32"))
    slow, fast = (found.bound(PP, at(1e12), rate) for rate in (1e9, 2e9))
    assert slow["bound"] == "compute" and fast["ceiling"] == pytest.approx(2 * slow["ceiling"])
    assert slow["ceiling"] == pytest.approx(512 * 1e9 / slow["flops"])
    assert found.bound(Task("pp", 512, batch=4), at(1e12), 1e9)["ceiling"] == pytest.approx(slow["ceiling"])


def test_another_family_is_counted_by_its_weights(tmp_path):
    """llama.cpp runs any; what is not described here has a looser ceiling, of its weights alone."""
    path = tmp_path / "llama.gguf"
    write_trial(path, "Q8_0")
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    table = tensors.pop("token_embd.weight")
    weights = sum(int(t.n_bytes) for t in tensors.values())
    found = demand(variant(path))
    assert found.traffic(TG)[0] == pytest.approx(weights + int(table.n_bytes) / 64)
    numbers = sum(int(t.n_elements) for t in tensors.values() if len(t.shape) > 1)
    assert found.bound(TG, at(1e15), 1e6)["flops"] == 2 * numbers


def test_experts_of_another_family_are_counted_once_a_token(tmp_path):
    path, width, experts, used = tmp_path / "moe.gguf", 32, 8, 2
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(2)
    writer.add_embedding_length(width)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(used)
    import numpy as np

    shapes = {"token_embd.weight": (50, width), "output.weight": (50, width), "blk.0.attn_q.weight": (width, width),
              "blk.1.ffn_up_exps.weight": (experts, 64, width)}  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    moved = demand(variant(path)).traffic(TG)[0]
    assert moved == 4 * (width + 50 * width + width * width + used * 64 * width)


def test_what_cannot_be_counted_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MinimoeError, match="model_type 'llama' are not counted"):
        demand(variant(tmp_path, "transformers", "float32"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MinimoeError, match="not JSON"):
        demand(variant(tmp_path, "minimoe", "float32"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(MinimoeError, match="broken.gguf cannot be read"):
        demand(variant(broken))


def test_the_share_is_refused_above_one_only():
    assert share(10.0, 20.0, "memory") == (0.5, None)
    part, why = share(21.0, 20.0, "compute")
    assert part > 1 and "matrix product rate" in why


def test_a_file_in_parts(tmp_path):
    for n in (1, 2):
        writer = gguf.GGUFWriter(tmp_path / f"x[1]-{n:05}-of-00002.gguf", "llama")
        writer.add_uint16("split.count", 2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    one = tmp_path / "x[1]-00001-of-00002.gguf"
    assert choose.file_bytes(one) == 2 * one.stat().st_size
    with pytest.raises(MinimoeError, match="in several parts are not counted"):
        demand(variant(one))
