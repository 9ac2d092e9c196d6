"""Hugging Face directories: there and back, theirs and ours."""

import json
import os
import stat

import pytest
import torch
from core_helpers import clear_of_ties, error, random_ids, small_model
from hf_reference import transformers, transformers_model, write_release
from safetensors.torch import load_file

from minimoe.config import ConfigError
from minimoe.interop import CheckpointError, huggingface, load_hf, save_hf

MTP = {"num_nextn_predict_layers": 1, "eos_token_id": 2}


def model_of(pattern="MEM*E", dtype=torch.float32, **changes):
    return small_model(pattern, dtype=dtype, **(MTP | changes))


def open_in_transformers(directory, **keywords):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **keywords).eval()


def same_weights(ours, theirs):
    theirs = theirs if isinstance(theirs, dict) else theirs.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def clear_ids(model, rows=2, length=30):
    """Ids at which no router of the model is nearly undecided."""
    for seed in range(50):
        ids = random_ids(model.config.vocab_size, rows, length, seed=seed)
        if clear_of_ties(model, ids).all():
            return ids
    raise AssertionError("every text has a near-tie")


@pytest.mark.parametrize("pattern, changes", [
    ("MEM*E", {}),
    ("ME*-", {"moe_latent_size": None}),
    ("*-M", {}),
    ("EM*", {"norm_topk_prob": False}),
    ("M*", {"n_groups": 1, "conv_kernel": 2}),
    ("ME*", {"time_step_min": 0.05, "time_step_max": 0.5}),
    ("*E", {"rescale_prenorm_residual": False, "num_key_value_heads": 4}),
], ids=str)  # fmt: skip
@torch.no_grad()
def test_an_unpatched_transformers_opens_what_we_save_and_computes_alike(tmp_path, pattern, changes):
    """dt lies on both sides of transformers' clamp here; prefill and decode."""
    model = model_of(pattern, **changes)
    ids = clear_ids(model)
    save_hf(model, tmp_path / "saved")
    theirs = open_in_transformers(tmp_path / "saved")
    out = theirs(ids[:, :20], use_cache=True)
    parts, cache = [out.logits], out.past_key_values
    for t in range(20, 30):
        out = theirs(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
    logits = model(ids).logits
    assert error(torch.cat(parts, 1), logits) < 1e-4
    assert error(theirs(ids).logits, logits) < 1e-4


@torch.no_grad()
def test_transformers_generates_the_same_text(tmp_path):
    from minimoe import generate

    model = model_of(eos_token_id=None)
    model.config = model.config.replace(eos_token_id=60)
    save_hf(model, tmp_path / "saved")
    theirs = open_in_transformers(tmp_path / "saved")
    ids = random_ids(60, 1, 9, seed=3)
    ours = generate(model, ids, max_new_tokens=12)
    text = theirs.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    assert text[0, 9:].tolist() == ours.ids[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["MEM*E", "M-*", "E"])
def test_what_we_save_comes_back_bit_for_bit(tmp_path, pattern, dtype):
    model = model_of(pattern, dtype)
    save_hf(model, tmp_path / "saved")
    back = load_hf(tmp_path / "saved")
    same_weights(back, model)
    assert back.config == model.config
    ids = random_ids(61, 2, 9)
    assert torch.equal(back(ids).logits, model(ids).logits)
    assert torch.equal(back.draft(ids, model(ids).hidden_BLD)[0], model.draft(ids, model(ids).hidden_BLD)[0])


@pytest.mark.parametrize("changes", [
    {"eos_token_id": 0},
    {"eos_token_id": None},
    {"eos_token_id": (3, 0)},
    {"bos_token_id": 0},
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
], ids=str)  # fmt: skip
def test_every_field_of_the_config_comes_back(tmp_path, changes):
    """Also those that are 0, False or None."""
    model = model_of(**changes)
    save_hf(model, tmp_path / "saved")
    assert load_hf(tmp_path / "saved").config == model.config


@pytest.mark.parametrize("field", ["eos_token_id", "bos_token_id"])
@pytest.mark.parametrize("value", [0, 5])
def test_transformers_reads_the_special_ids_we_wrote(tmp_path, field, value):
    save_hf(model_of(**{field: value}), tmp_path / "saved")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert getattr(config, field) == value


def test_names_on_disk_are_the_released_ones(tmp_path):
    model = model_of("ME*-")
    save_hf(model, tmp_path / "saved")
    stored = load_file(tmp_path / "saved/model.safetensors")
    assert {
        "backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight",
        "backbone.layers.0.mixer.A_log", "backbone.layers.1.mixer.experts.5.up_proj.weight",
        "backbone.layers.1.mixer.experts.0.down_proj.weight",
        "backbone.layers.1.mixer.gate.e_score_correction_bias", "backbone.layers.3.mixer.up_proj.weight",
        "mtp.layers.0.eh_proj.weight", "mtp.layers.1.mixer.experts.3.up_proj.weight",
        "mtp.layers.1.final_layernorm.weight",
    } <= stored.keys()  # fmt: skip
    assert not [
        n for n in stored if n.startswith("model.") or n.endswith(("experts.up_proj", "experts.down_proj"))
    ]
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["time_step_min"] == 0.0 and config["minimoe_time_step_min"] == 0.001
    assert config["model_type"] == "nemotron_h" and config["architectures"] == ["NemotronHForCausalLM"]


@pytest.mark.parametrize("shards", [1, 3])
@torch.no_grad()
def test_what_transformers_saves_is_read(tmp_path, shards):
    """Through save_pretrained, in one file and in shards."""
    model = model_of()
    theirs = transformers_model(model)
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="5GB" if shards == 1 else "40KB")
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) == 1) == (shards == 1)
    back = load_hf(tmp_path / "saved")
    assert back.mtp is None and back.config.hybrid_override_pattern == "MEM*E"
    same_weights(back, theirs)
    ids = clear_ids(model)
    assert error(back(ids).logits, theirs(ids).logits) < 1e-4


def test_an_mtp_block_that_was_dropped_is_missed_aloud(tmp_path):
    model = model_of()
    save_hf(model, tmp_path / "saved")
    theirs = open_in_transformers(tmp_path / "saved")
    theirs.save_pretrained(tmp_path / "resaved")
    with pytest.warns(UserWarning, match="MTP"):
        back = load_hf(tmp_path / "resaved")
    assert back.mtp is None
    same_weights(back, theirs)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("changes", [{}, {"moe_latent_size": None}], ids=["latent", "full width"])
def test_released_naming_is_read(tmp_path, shards, dot, changes):
    """backbone.*, experts one by one (over several shards), both spellings of the correction bias."""
    model = model_of("ME*-", torch.bfloat16, **changes)
    back = load_hf(write_release(model, tmp_path, shards, dot))
    same_weights(back, model)
    ids = random_ids(61, 2, 9)
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_a_config_with_layers_block_type_is_read(tmp_path):
    model = model_of()
    write_release(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["hybrid_override_pattern"]
    config["layers_block_type"] = ["linear_attention", "moe", "linear_attention", "full_attention", "moe"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    same_weights(load_hf(tmp_path), model)


@pytest.mark.parametrize(
    "layers, pattern", [(1, "M"), (3, "MEM"), (5, "MEM*E"), ([3], "*"), ([1, 4], "EE"), ([4, 0, 3], "EM*")]
)
@pytest.mark.parametrize("shards", [1, 3])
@torch.no_grad()
def test_some_of_the_layers_can_be_read(tmp_path, layers, pattern, shards):
    model = model_of(dtype=torch.float64)
    part = load_hf(write_release(model, tmp_path, shards), layers=layers)
    assert part.config.hybrid_override_pattern == pattern and part.mtp is None
    picked = range(layers) if isinstance(layers, int) else layers
    ids = random_ids(61, 2, 9)
    x = model.model.embeddings(ids)
    for i in picked:
        block = model.model.layers[i]
        y = block.mixer(block.norm(x))
        x = x + (y[0] if isinstance(y, tuple) else y)
    assert error(part(ids).logits, model.lm_head(model.model.norm_f(x))) < 1e-12


@pytest.mark.parametrize("layers", [0, 6, -1, [], [5], [0, -1]])
def test_layers_that_are_not_there_are_refused(tmp_path, layers):
    with pytest.raises(CheckpointError, match="layers 0 to 4") as caught:
        load_hf(write_release(model_of(), tmp_path), layers=layers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_is_that_asked_for_except_the_routers_bias(tmp_path, dtype):
    model = model_of()
    back = load_hf(write_release(model, tmp_path), dtype=dtype)
    for name, tensor in back.state_dict().items():
        bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.promote_types(dtype, torch.float32) if bias else dtype), name
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), name
    assert torch.isfinite(back(random_ids(61, 1, 9)).logits).all()


def test_device_is_that_asked_for(tmp_path):
    there = load_hf(write_release(model_of(), tmp_path), device="meta")
    assert all(t.is_meta for t in there.state_dict().values())


def test_a_loaded_model_can_be_trained(tmp_path):
    back = load_hf(write_release(model_of(), tmp_path))
    ids = random_ids(61, 2, 9)
    back.loss(ids, ids).backward()
    assert all(p.requires_grad for p in back.parameters())
    assert back.lm_head.weight.grad.abs().max() > 0


@torch.no_grad()
def test_a_bfloat16_model_is_saved_as_such_and_opens_alike(tmp_path):
    model = model_of("M*-", torch.bfloat16)
    save_hf(model, tmp_path / "saved")
    theirs = open_in_transformers(tmp_path / "saved", dtype="auto")
    assert theirs.lm_head.weight.dtype == torch.bfloat16
    ids = random_ids(61, 2, 20)
    assert error(theirs(ids).logits, model(ids).logits) < 0.1


@torch.no_grad()
def test_saving_over_the_directory_that_a_model_was_read_from(tmp_path):
    """The usual loop: load, train, save to the same place. The model in memory keeps its weights."""
    write_release(model_of(), tmp_path / "saved")
    model, ids = load_hf(tmp_path / "saved"), random_ids(61, 1, 9)
    before = model(ids).logits
    save_hf(model_of("ME*"), tmp_path / "saved")
    assert torch.equal(model(ids).logits, before)
    save_hf(model, tmp_path / "saved")
    same_weights(load_hf(tmp_path / "saved"), model)


class FakeTokenizer:
    def save_pretrained(self, directory):
        with open(os.path.join(directory, "tokenizer.json"), "w") as file:
            file.write("{}")


class OurTokenizer:
    def save(self, directory):
        FakeTokenizer().save_pretrained(directory)


@pytest.mark.parametrize("tokenizer", [FakeTokenizer(), OurTokenizer()], ids=["theirs", "ours"])
def test_a_tokenizer_is_saved_beside_the_weights(tmp_path, tokenizer):
    save_hf(model_of(), tmp_path / "saved", tokenizer)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    save_hf(model_of(), tmp_path / "saved", tokenizer)


def test_saving_over_an_older_save_replaces_it(tmp_path):
    save_hf(model_of("M*"), tmp_path / "saved")
    model = model_of("ME", dtype=torch.float64)
    save_hf(model, tmp_path / "saved")
    same_weights(load_hf(tmp_path / "saved"), model)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_saving_makes_parent_directories(tmp_path):
    save_hf(model_of(), tmp_path / "a" / "b" / "saved")
    assert load_hf(tmp_path / "a/b/saved").config.hidden_size == 32


def test_saving_into_an_empty_directory(tmp_path):
    (tmp_path / "saved").mkdir()
    save_hf(model_of(), tmp_path / "saved")
    assert load_hf(tmp_path / "saved").config.hidden_size == 32


@pytest.mark.skipif(os.name == "nt", reason="no permission bits")
def test_saved_files_can_be_read_by_those_who_may_read_the_config(tmp_path):
    save_hf(model_of(), tmp_path / "saved")
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "saved").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"], modes


def snapshot(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("three years")
    with pytest.raises(CheckpointError, match="other files.*thesis.txt") as caught:
        save_hf(model_of(), tmp_path / "work")
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == {"work/thesis.txt": b"three years"}


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises((CheckpointError, OSError)) as caught:
        save_hf(model_of(), tmp_path / "file")
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == {"file": b"x"} and len(list(tmp_path.iterdir())) == 1


def fail(*args, **keywords):
    raise OSError("No space left on device")


def half_written(tensors, path, **keywords):
    with open(path, "wb") as file:
        file.write(b"half")
    fail()


class BrokenTokenizer:
    save_pretrained = fail


@pytest.mark.parametrize("where", ["weights", "config", "tokenizer"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_save_that_fails_midway_leaves_everything_as_it_was(tmp_path, monkeypatch, where, exists):
    if exists:
        save_hf(model_of("M*"), tmp_path / "saved")
    before = snapshot(tmp_path)
    if where == "weights":
        monkeypatch.setattr(huggingface, "save_file", half_written)
    if where == "config":
        monkeypatch.setattr(huggingface.json, "dumps", fail)
    with pytest.raises(OSError, match="No space"):
        save_hf(model_of(), tmp_path / "saved", BrokenTokenizer() if where == "tokenizer" else None)
    assert snapshot(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["saved"] if exists else []), "litter"


@pytest.mark.parametrize("nth", [1, 2])
def test_a_swap_that_fails_midway_leaves_the_old_directory(tmp_path, monkeypatch, nth):
    """A full disk or a virus scanner between the two renames: the old save must still be at its place."""
    save_hf(model_of("M*"), tmp_path / "saved")
    before, rename, count = snapshot(tmp_path), os.rename, []

    def some_fail(source, target, *args, **keywords):
        count.append(source)
        if len(count) == nth:
            fail()
        return rename(source, target, *args, **keywords)

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, some_fail)
    with pytest.raises(OSError, match="No space"):
        save_hf(model_of(), tmp_path / "saved")
    monkeypatch.undo()
    assert snapshot(tmp_path) == before


def test_what_transformers_cannot_compute_is_refused(tmp_path):
    """It ignores time_step_limit, and its router cannot run with a single expert."""
    with pytest.raises(CheckpointError, match="time_step_limit") as caught:
        save_hf(model_of(time_step_limit=(0.01, 0.2)), tmp_path / "saved")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="n_routed_experts") as caught:
        save_hf(model_of(n_routed_experts=1, num_experts_per_tok=1), tmp_path / "saved")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_shards_are_small_and_read_alike_by_both(tmp_path):
    """The limit is of tensor bytes; a file has a header of some kilobytes more."""
    model = small_model("MEM*E", dtype=torch.float32)
    save_hf(model, tmp_path / "whole")
    save_hf(model, tmp_path / "shards", max_shard_bytes=30_000)
    files = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(files) > 2 and max(file.stat().st_size for file in files) < 40_000
    ours, theirs = load_hf(tmp_path / "shards"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    for name, tensor in load_hf(tmp_path / "whole").state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
        assert torch.equal(theirs.state_dict()[name], tensor)


def test_where_you_are_and_what_others_wrote_is_not_replaced(tmp_path, monkeypatch):
    model = small_model()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="folder you are in"):
        save_hf(model, ".")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="nemotron_h"):
        save_hf(model, tmp_path / "other")
    assert (tmp_path / "other" / "config.json").read_text() == '{"model_type": "llama"}'


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "x"])
def test_a_shard_size_that_cannot_be_is_named(tmp_path, size):
    with pytest.raises(CheckpointError, match="max_shard_bytes"):
        save_hf(small_model(), tmp_path / "m", max_shard_bytes=size)


def test_another_shard_size_replaces_the_old_files(tmp_path):
    model = small_model(dtype=torch.float32)
    save_hf(model, tmp_path / "m", max_shard_bytes=30_000)
    save_hf(model, tmp_path / "m")
    assert [file.name for file in (tmp_path / "m").glob("*.safetensors*")] == ["model.safetensors"]
