"""GGUF files there and back: bits, casts, keys, and what a file of somebody else's looks like."""

import json
import re

import gguf
import numpy as np
import pytest
import torch
from core_helpers import random_ids, scramble
from gguf_helpers import keys, model_of, random_config, random_model, rewrite, same_data, tensors, tokenizer

from minimoe import HybridConfig, HybridLM, catalog
from minimoe.config import PRESETS
from minimoe.ggml.quantizer import quantize_file
from minimoe.interop import gguf as module
from minimoe.interop import load_gguf, save_gguf
from minimoe.interop.gguf_keys import Keys, architecture, check_config, read_config, write_config
from minimoe.interop.gguf_names import places

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16}
BIG = [name if name != "base-12gb" else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]


def same_weights(ours, theirs):
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        other = theirs.state_dict()[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name


def marked(model):
    """The config as it comes back: with the tokenizer's fingerprint."""
    return model.config.replace(tokenizer_fingerprint=tokenizer().fingerprint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", BIG)
def test_f32_comes_back_bit_for_bit(tmp_path, preset, dtype):
    room = {"vocab_size": 320} if preset == "tiny" else {}  # 256 bytes and the special tokens have to fit
    model = HybridLM(HybridConfig.preset(preset, **room), device="meta", dtype=dtype)
    scramble(model.to_empty(device="cpu"))
    save_gguf(model, tmp_path / "model.gguf", tokenizer())
    back, its_tokenizer = load_gguf(tmp_path / "model.gguf", dtype=dtype)
    same_weights(model, back)
    assert back.config == marked(model)
    assert its_tokenizer.fingerprint == tokenizer().fingerprint


@pytest.mark.parametrize("seed", range(6))
def test_any_shape_comes_back_bit_for_bit(tmp_path, seed):
    model = random_model(seed)
    save_gguf(model, tmp_path / "model.gguf", tokenizer(280))
    back, _ = load_gguf(tmp_path / "model.gguf")
    same_weights(model, back)
    ids = random_ids(model.config.vocab_size, 2, 9)
    assert torch.equal(back.eval()(ids).logits, model(ids).logits)


def test_log_of_exp_would_not_have_come_back(tmp_path):
    model = model_of()
    A_log = model.model.layers[0].mixer.A_log.data.uniform_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(A_log.exp().log(), A_log), "these weights cannot tell"
    save_gguf(model, tmp_path / "model.gguf", None)
    same_weights(model, load_gguf(tmp_path / "model.gguf")[0])
    stored = torch.from_numpy(tensors(tmp_path / "model.gguf")["blk.0.ssm_a"].data.copy())
    assert torch.equal(stored.flatten(), -A_log.exp())


def test_an_A_that_somebody_changed_counts(tmp_path):
    model, path = model_of(), tmp_path / "model.gguf"
    save_gguf(model, path, None)
    reader = gguf.GGUFReader(path, "r+")
    A = next(tensor for tensor in reader.tensors if tensor.name == "blk.2.ssm_a").data
    A[3] = -2.0
    A.base.flush() if hasattr(A.base, "flush") else reader.data.flush()
    del reader
    back = load_gguf(path)[0].model.layers[2].mixer.A_log
    expected = model.model.layers[2].mixer.A_log.detach().clone()
    expected[3] = torch.tensor(2.0).log()
    assert torch.equal(back, expected)


@pytest.mark.parametrize("quant", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_is_what_a_cast_gives(tmp_path, quant, dtype):
    model = model_of("MEM*E", dtype=dtype)
    save_gguf(model, tmp_path / "model.gguf", None, quant)
    back, _ = load_gguf(tmp_path / "model.gguf")
    same_weights(model.to(FLOATS[quant]), back)


def test_f16_keeps_vectors_norms_routers_and_convolutions_whole(tmp_path):
    model = model_of("MEM*E")
    save_gguf(model, tmp_path / "model.gguf", None, "F16")
    back, _ = load_gguf(tmp_path / "model.gguf", dtype=torch.float32)
    whole = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, back.state_dict()[name])}
    ends = ("norm.weight", "A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias", "gate.weight", "correction_bias",
            "norm_f.weight", "enorm.weight", "hnorm.weight", "final_layernorm.weight")  # fmt: skip
    assert whole == {name for name in model.state_dict() if name.endswith(ends)}


SHAPES = {
    "experts": ("MEM*E", {}),
    "dense": ("M-*", {}),
    "no latent": ("ME*", {"moe_latent_size": None, "hidden_size": 64}),
    "blocks fit": ("ME*", {"hidden_size": 64, "moe_latent_size": 32, "moe_intermediate_size": 96, "mamba_head_dim": 8}),
    "one expert": ("ME*", {"n_routed_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 32}),
    "one wide": ("ME*", {"moe_intermediate_size": 1, "moe_shared_expert_intermediate_size": 1, "moe_latent_size": 1}),
}  # fmt: skip


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_we_write_is_what_llama_cpps_quantiser_writes(tmp_path, shape, quant):
    """Byte for byte, with its fallbacks and its exceptions; small and subnormal numbers are among the weights."""
    pattern, changes = SHAPES[shape]
    model = model_of(pattern, **changes)
    with torch.no_grad():
        model.lm_head.weight[:40] *= torch.logspace(0, -44, 40)[:, None]
        model.lm_head.weight[40] = 0
    ours, whole, theirs = (tmp_path / f"{name}.gguf" for name in ("ours", "whole", "theirs"))
    said = save_gguf(model, ours, None, quant)
    save_gguf(model, whole, None)
    made = quantize_file(whole, theirs, quant)
    same_data(ours, theirs)
    assert {k: v for k, v in keys(ours).items() if k != "general.name"} == {
        k: v for k, v in keys(theirs).items() if k != "general.name"
    } | {k: v for k, v in keys(ours).items() if k.startswith("GGUF.")}
    assert (said.types, said.tensor_bytes) == (made.types, made.tensor_bytes)
    assert sorted(map(repr, said.fallbacks)) == sorted(map(repr, made.fallbacks))


MORE = [pytest.param(quant, marks=pytest.mark.slow) for quant in ("Q5_1", "Q6_K", "IQ4_NL", "Q5_0", "Q3_K_M", "IQ4_XS")]


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q4_0", "MXFP4_MOE", "q5_k_s", *MORE])
def test_other_names_mean_llama_cpps_recipe(tmp_path, quant):
    model = scramble(HybridLM(HybridConfig.preset("tiny", vocab_size=320, hidden_size=256)))
    said = save_gguf(model, tmp_path / "made.gguf", tokenizer(), quant)
    save_gguf(model, tmp_path / "whole.gguf", tokenizer())
    made = quantize_file(tmp_path / "whole.gguf", tmp_path / "theirs.gguf", quant)
    same_data(tmp_path / "made.gguf", tmp_path / "theirs.gguf")
    assert said.types == made.types and said.quant == quant.upper()
    stored = tensors(tmp_path / "made.gguf")
    if quant == "Q4_0":
        assert stored["output.weight"].tensor_type.name == "Q6_K"
    back, its_tokenizer = load_gguf(tmp_path / "made.gguf")
    assert back.config == marked(model) and its_tokenizer.fingerprint == tokenizer().fingerprint
    assert back.lm_head.weight.dtype == torch.float32
    ours, theirs = model.state_dict(), back.state_dict()
    for name in ours:
        error = (ours[name] - theirs[name]).norm() / ours[name].norm()
        assert error < 0.25, name
    assert torch.equal(ours["model.layers.0.mixer.A_log"], theirs["model.layers.0.mixer.A_log"])


def test_quantised_from_bfloat16_without_a_detour(tmp_path):
    """bfloat16 weights pass through a BF16 file; F32 would have given the same."""
    model = scramble(HybridLM(HybridConfig.preset("tiny", vocab_size=320, hidden_size=256), dtype=torch.bfloat16))
    save_gguf(model, tmp_path / "half.gguf", None, "Q4_K_M")
    save_gguf(model.float(), tmp_path / "whole.gguf", None, "Q4_K_M")
    same_data(tmp_path / "half.gguf", tmp_path / "whole.gguf")


@pytest.mark.parametrize("changes", [
    {"eos_token_id": 0},
    {"eos_token_id": (3, 0)},
    {"bos_token_id": None},
    {"pad_token_id": None},
    {"norm_topk_prob": False},
    {"rescale_prenorm_residual": False},
    {"time_step_floor": 0.0},
    {"time_step_min": 0.02},
    {"num_nextn_predict_layers": 0},
    {"mtp_final_norm": "layernorm"},
    {"moe_latent_size": None},
    {"initializer_range": 0.5},
    {"intermediate_size": 0},
    {"chunk_size": 7},
    {"layer_norm_epsilon": 1.2345678901e-5},
    {"routed_scaling_factor": 2.3456789012},
    {"n_routed_experts": 1, "num_experts_per_tok": 1},
    {"tokenizer_fingerprint": "0123"},
], ids=str)  # fmt: skip
def test_every_field_of_the_config_comes_back(tmp_path, changes):
    model = model_of(**changes)
    save_gguf(model, tmp_path / "model.gguf", None)
    back, its_tokenizer = load_gguf(tmp_path / "model.gguf")
    assert back.config == model.config and its_tokenizer is None


def test_where_llama_cpp_has_a_key_it_counts(tmp_path):
    save_gguf(model_of(), tmp_path / "model.gguf", None)
    changed = {"nemotron_h_moe.context_length": 77, "nemotron_h_moe.expert_weights_scale": 1.5,
               "nemotron_h_moe.attention.layer_norm_rms_epsilon": 1e-3}  # fmt: skip
    rewrite(tmp_path / "model.gguf", tmp_path / "other.gguf", change=lambda name, value: changed.get(name, value))
    config = load_gguf(tmp_path / "other.gguf")[0].config
    assert (config.max_position_embeddings, config.routed_scaling_factor, config.layer_norm_epsilon) == (77, 1.5, 1e-3)


def test_keys_of_the_vocabulary(tmp_path):
    """Filled up with unused tokens; nothing is added to a text; the template is there."""
    save_gguf(model_of(), tmp_path / "model.gguf", tokenizer(), about={"license": "apache-2.0", "author": "us"})
    found = keys(tmp_path / "model.gguf")
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    n = tokenizer().vocab_size
    assert tokens[:n] == tokenizer().tokens and tokens[n:] == [f"[PAD{i}]" for i in range(n, 310)]
    assert {i for i, kind in enumerate(kinds) if kind == 3} == set(tokenizer().special.values())
    assert kinds[n:] == [5] * (310 - n) and set(kinds[:n]) == {1, 3}
    assert found["tokenizer.ggml.merges"] == tokenizer().merges
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert found["tokenizer.ggml.add_bos_token"] is False and found["tokenizer.ggml.add_eos_token"] is False
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("padding", "bos", "eos", "eot")] == [0, 1, 2, 4]
    assert "<|im_start|>" in found["tokenizer.chat_template"]
    assert found["minimoe.tokenizer.fingerprint"] == tokenizer().fingerprint
    assert [found[f"general.{name}"] for name in ("name", "license", "author")] == ["model", "apache-2.0", "us"]


def test_a_tokenizer_without_merges(tmp_path):
    from minimoe.data import Tokenizer

    bytes_only = Tokenizer.train(["a"], 263)
    assert not bytes_only.merges
    save_gguf(model_of(), tmp_path / "model.gguf", bytes_only)
    assert load_gguf(tmp_path / "model.gguf")[1].fingerprint == bytes_only.fingerprint


@pytest.mark.parametrize("layers", [2, [3, 0], [4], (1, 1)], ids=str)
def test_some_layers_only(tmp_path, layers, monkeypatch):
    model = model_of()
    save_gguf(model, tmp_path / "model.gguf", tokenizer())
    read, real = [], module.decode
    monkeypatch.setattr(module, "decode", lambda tensor, *rest: read.append(tensor.name) or real(tensor, *rest))
    back, _ = load_gguf(tmp_path / "model.gguf", layers=layers)
    picked = list(range(layers)) if isinstance(layers, int) else list(layers)
    assert back.config.hybrid_override_pattern == "".join("MEM*E"[i] for i in picked) and back.mtp is None
    for at, i in enumerate(picked):
        for name, tensor in model.model.layers[i].state_dict().items():
            assert torch.equal(back.model.layers[at].state_dict()[name], tensor)
    assert {int(name.split(".")[1]) for name in read if name.startswith("blk.")} == set(picked)


def test_big_tensors_are_converted_in_pieces(tmp_path, monkeypatch):
    from minimoe.interop import gguf_tensors

    model = model_of()
    save_gguf(model, tmp_path / "model.gguf", None, "Q8_0")
    whole, _ = load_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(gguf_tensors, "SLAB", 100)
    same_weights(whole, load_gguf(tmp_path / "model.gguf")[0])


def as_nvidia(name, value):
    """Without what only our files have, and with another vocabulary."""
    if name.startswith("minimoe.") or name.endswith(("rms_epsilon", "vocab_size", "expert_feed_forward_length")):
        return None
    if name == "tokenizer.ggml.tokens":
        return [f"token{i}" for i in range(len(value))]
    return "pixtral" if name == "tokenizer.ggml.pre" else value


@pytest.mark.parametrize("pattern, architecture", [("MEM*E", "nemotron_h_moe"), ("M*-", "nemotron_h")])
def test_files_of_others(tmp_path, pattern, architecture):
    """Old keys only, A and no A_log, somebody's vocabulary: numbers as llama.cpp reads them, our defaults else."""
    model = model_of(pattern, num_experts_per_tok=1)
    save_gguf(model, tmp_path / "ours.gguf", tokenizer(), "F16")
    assert keys(tmp_path / "ours.gguf")["general.architecture"] == architecture
    rewrite(tmp_path / "ours.gguf", tmp_path / "theirs.gguf", change=as_nvidia)
    with pytest.warns(UserWarning, match="read without its tokenizer.*pixtral"):
        back, its_tokenizer = load_gguf(tmp_path / "theirs.gguf", dtype=torch.float32)
    assert its_tokenizer is None
    defaults = {"chunk_size": 128, "eos_token_id": 2}
    unused = {"E": ["intermediate_size"], "-": ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
              "moe_shared_expert_intermediate_size", "moe_latent_size", "routed_scaling_factor"]}[pattern.strip("M*")[-1]]
    fresh = {field.name: field.default for field in HybridConfig.__dataclass_fields__.values() if field.name in unused}
    assert back.config == model.config.replace(**defaults, **fresh)
    with_ours, _ = load_gguf(tmp_path / "ours.gguf", dtype=torch.float32)
    for name, tensor in back.state_dict().items():
        expected = with_ours.state_dict()[name]
        assert torch.allclose(tensor, expected, rtol=1e-6, atol=1e-6) and (name.endswith("A_log") or torch.equal(tensor, expected))


RELEASED = [name for name in catalog.models() if catalog.model(name).config is not None]


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_models_have_a_place_for_every_tensor(name):
    """Under names that llama.cpp has, each once."""
    config = catalog.model(name).config
    check_config(config)
    table = list(places(config))
    assert {place.ours for place in table} == HybridLM(config, device="meta").state_dict().keys()
    names = [place.theirs for place in table]
    assert len(set(names)) == len(names)
    kind = gguf.MODEL_ARCH.NEMOTRON_H_MOE if "E" in config.hybrid_override_pattern else gguf.MODEL_ARCH.NEMOTRON_H
    known = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "N") for tensor in gguf.MODEL_TENSORS[kind]}
    known |= {f"blk.N.{part}" for part in ("ssm_a", "ssm_d")}
    stems = {re.sub(r"^blk\.\d+\.", "blk.N.", n).removesuffix(".weight").removesuffix(".bias") for n in names}
    mtp = {stem for stem in stems if ".nextn." in stem or stem.endswith("post_attention_norm")}
    assert stems - mtp <= known and len(mtp) == 5 * config.num_nextn_predict_layers


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_models_configs_in_keys_alone(tmp_path, name):
    """Without our JSON: what llama.cpp's keys have comes back, the rest is as we have it by default."""
    config = catalog.model(name).config
    writer = gguf.GGUFWriter(tmp_path / "keys.gguf", architecture(config))
    write_config(writer, config)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_ids[0])
    writer.add_pad_token_id(config.pad_token_id)
    del writer.kv_data[0]["minimoe.config"]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    back = read_config(Keys(gguf.GGUFReader(tmp_path / "keys.gguf")), config.vocab_size, None)
    unsaid = ("chunk_size", "time_step_min", "time_step_max", "time_step_floor", "initializer_range", "mtp_hybrid_override_pattern",
              "rescale_prenorm_residual", "eos_token_id")  # fmt: skip
    moe = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
           "moe_latent_size", "routed_scaling_factor", "norm_topk_prob", "n_shared_experts")  # fmt: skip
    unused = moe if "-" in config.hybrid_override_pattern else ("intermediate_size",)
    ours = config.to_dict()
    assert back.to_dict() == ours | {field: getattr(back, field) for field in unsaid + unused}
    assert back.eos_token_id == config.eos_token_ids[0]


def test_one_expert_more_is_one_group_less(tmp_path):
    """llama.cpp aborts on as many groups as experts, and NVIDIA's files say one group."""
    for experts, said in ((1, False), (2, True)):
        model = model_of(n_routed_experts=experts, num_experts_per_tok=1)
        save_gguf(model, tmp_path / "model.gguf", None)
        assert ("nemotron_h_moe.expert_group_count" in keys(tmp_path / "model.gguf")) == said


def test_nothing_else_is_left_and_the_old_file_stays_until_the_end(tmp_path):
    model, path = model_of(), tmp_path / "deep" / "model.gguf"
    save_gguf(model, path, None)
    before = path.read_bytes()
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    for quant in ("F32", "Q4_K_M"):
        with pytest.raises(module.GGUFError, match="lm_head.weight"):
            save_gguf(model, path, None, quant)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["model.gguf"]
    with torch.no_grad():
        model.lm_head.weight[5, 5] = 0
    save_gguf(model, path, None, "Q4_K_M")
    assert path.read_bytes() != before and [p.name for p in path.parent.iterdir()] == ["model.gguf"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_the_stored_config_is_the_whole_config(tmp_path):
    model = HybridLM(random_config(3))
    save_gguf(model, tmp_path / "model.gguf", None)
    assert HybridConfig.from_dict(json.loads(keys(tmp_path / "model.gguf")["minimoe.config"])) == model.config


def test_memory_stays_near_that_of_the_model(tmp_path):
    """No second copy: at most some of the largest tensor besides the model. In a child, so that nobody else counts."""
    import subprocess
    import sys

    code = f"""
import resource, torch
from minimoe import HybridConfig, HybridLM, catalog
from minimoe.interop import load_gguf, save_gguf
from minimoe.interop.gguf_keys import Keys, architecture, check_config, read_config, write_config
from minimoe.interop.gguf_names import places
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model = HybridLM(HybridConfig.preset("base-12gb", hybrid_override_pattern="MEM*", vocab_size=4096), dtype=torch.bfloat16)
size = sum(t.nbytes for t in model.state_dict().values())
before = peak()
save_gguf(model, {str(tmp_path / "model.gguf")!r}, None, "BF16")
print(size, peak() - before)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, grown = map(int, child.stdout.split())
    assert grown < size, (size, grown)


def test_a_type_that_the_gguf_package_cannot_turn_back(tmp_path):
    model = model_of("M*-", hidden_size=128, mamba_head_dim=16, head_dim=32, intermediate_size=128)
    save_gguf(model, tmp_path / "model.gguf", None, "Q1_0")
    with pytest.raises(module.GGUFError, match="is of type Q1_0, which the gguf package cannot turn back"):
        load_gguf(tmp_path / "model.gguf")
    assert np.isfinite(tensors(tmp_path / "model.gguf")["output_norm.weight"].data).all()
