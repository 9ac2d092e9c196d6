"""Damaged, foreign and incomplete checkpoints: one line that says which file or tensor."""

import json
import pickle
import struct

import pytest
import torch
from core_helpers import small_model
from hf_reference import released_tensors, write_release
from safetensors.torch import load_file, save_file

from minimoe.config import ConfigError
from minimoe.interop import CheckpointError, load_hf


def model_of():
    return small_model("ME*-", dtype=torch.float32, num_nextn_predict_layers=1)


@pytest.fixture
def directory(tmp_path):
    return write_release(model_of(), tmp_path / "model")


def refused(directory, words, kind=CheckpointError, **keywords):
    with pytest.raises(kind, match=words) as caught:
        load_hf(directory, **keywords)
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


def header_size(raw):
    return 8 + struct.unpack("<Q", raw[:8])[0]


@pytest.mark.parametrize(
    "cut", ["empty", "4 bytes", "8 bytes", "in the header", "after the header", "half", "last byte"]
)
def test_a_truncated_file_is_named(directory, cut):
    file = directory / "model.safetensors"
    raw = file.read_bytes()
    header = header_size(raw)
    length = {"empty": 0, "4 bytes": 4, "8 bytes": 8, "in the header": header // 2,
              "after the header": header, "half": len(raw) // 2, "last byte": len(raw) - 1}[cut]  # fmt: skip
    file.write_bytes(raw[:length])
    assert "fetch it again" in refused(directory, "model.safetensors is damaged or not safetensors")


@pytest.mark.slow
def test_a_file_cut_anywhere_is_named(directory):
    file = directory / "model.safetensors"
    raw = file.read_bytes()
    for length in sorted({*range(0, len(raw), max(1, len(raw) // 400)), *range(0, 200), len(raw) - 1}):
        file.write_bytes(raw[:length])
        refused(directory, "model.safetensors is damaged")


def test_a_truncated_shard_is_named(tmp_path):
    directory = write_release(model_of(), tmp_path, shards=3)
    shard = directory / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    refused(directory, "model-00002-of-00003.safetensors is damaged")


@pytest.mark.parametrize("content", [
    b"GGUF" + b"\0" * 200, b"PK\x03\x04" + b"\0" * 200, b"<!DOCTYPE html><html>404</html>" * 9, b"\xff" * 300,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
], ids=["gguf", "zip", "html", "ones", "lfs pointer"])  # fmt: skip
def test_a_file_of_another_kind_is_named(directory, content):
    (directory / "model.safetensors").write_bytes(content)
    refused(directory, "model.safetensors is damaged or not safetensors")


def test_a_missing_shard_is_named(tmp_path):
    directory = write_release(model_of(), tmp_path, shards=3)
    (directory / "model-00003-of-00003.safetensors").unlink()
    refused(directory, "model-00003-of-00003.safetensors is missing")


@pytest.mark.parametrize(
    "content", ["{", "[]", "null", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 3}}', "\x00"]
)
def test_a_broken_index_is_named(tmp_path, content):
    directory = write_release(model_of(), tmp_path, shards=2)
    (directory / "model.safetensors.index.json").write_text(content)
    refused(directory, "model.safetensors.index.json")


def test_weights_of_another_model_are_foreign(directory):
    save_file({"transformer.h.0.attn.weight": torch.zeros(3)}, directory / "model.safetensors")
    refused(directory, "tensor model.embeddings.weight is missing")


@pytest.mark.parametrize("name", [
    "backbone.embeddings.weight", "lm_head.weight", "backbone.layers.0.mixer.A_log",
    "backbone.layers.3.norm.weight", "backbone.layers.1.mixer.gate.e_score_correction_bias",
    "mtp.layers.0.eh_proj.weight",
])  # fmt: skip
def test_a_missing_tensor_is_named(directory, name):
    tensors = released_tensors(model_of())
    del tensors[name]
    save_file(tensors, directory / "model.safetensors")
    refused(directory, f"tensor {name.replace('backbone', 'model')} is missing")


def test_a_missing_expert_is_named(directory):
    tensors = released_tensors(model_of())
    del tensors["backbone.layers.1.mixer.experts.4.down_proj.weight"]
    save_file(tensors, directory / "model.safetensors")
    refused(directory, "expert 4 of model.layers.1.mixer.experts.down_proj is missing")


def test_all_experts_missing_are_named(directory):
    tensors = {n: t for n, t in released_tensors(model_of()).items() if ".experts." not in n}
    save_file(tensors, directory / "model.safetensors")
    refused(directory, r"model.layers.1.mixer.experts.up_proj is missing")


def test_an_expert_too_many_is_foreign(directory):
    tensors = released_tensors(model_of())
    tensors["backbone.layers.1.mixer.experts.6.up_proj.weight"] = torch.zeros(24, 16)
    save_file(tensors, directory / "model.safetensors")
    refused(directory, "has no place in this config")


@pytest.mark.parametrize("name, shape", [
    ("backbone.embeddings.weight", (62, 32)), ("backbone.layers.0.mixer.conv1d.weight", (128, 4)),
    ("backbone.layers.0.mixer.A_log", (7,)), ("backbone.layers.1.mixer.experts.3.up_proj.weight", (24, 15)),
    ("backbone.layers.2.mixer.q_proj.weight", (16, 32)),
])  # fmt: skip
def test_a_wrong_shape_is_named(directory, name, shape):
    tensors = released_tensors(model_of())
    expected = tuple(tensors[name].shape)
    tensors[name] = torch.zeros(shape)
    save_file(tensors, directory / "model.safetensors")
    message = refused(directory, "has shape")
    assert str(shape) in message and str(expected) in message
    if "experts" in name:
        assert "expert 3" in message


def test_a_tensor_too_many_is_foreign(directory):
    tensors = released_tensors(model_of()) | {"backbone.layers.4.norm.weight": torch.zeros(32)}
    save_file(tensors, directory / "model.safetensors")
    refused(directory, "model.layers.4.norm.weight has no place in this config")


def test_a_config_of_another_size_is_noticed(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    refused(directory, "has shape.*config asks for.*different models")


def test_a_missing_directory_or_config_is_named(tmp_path, directory):
    refused(tmp_path / "nowhere", "config.json is missing")
    (directory / "config.json").unlink()
    refused(directory, "config.json is missing")
    refused(directory / "model.safetensors", "config.json is missing")


@pytest.mark.parametrize(
    "content", ["", "{", "{'a': 1}", '{"hidden_size": 32,}', "\x00\x01", "not json at all"]
)
def test_broken_json_is_named(directory, content):
    (directory / "config.json").write_text(content)
    refused(directory, "config.json is not readable JSON")


def test_json_of_another_encoding_or_form_is_named(directory):
    (directory / "config.json").write_bytes(b"\xff\xfe{\x00}\x00")
    refused(directory, "config.json is not readable JSON")
    (directory / "config.json").write_text("[1, 2]")
    refused(directory, "config.json is not a JSON object")


@pytest.mark.parametrize("config, words", [
    ({"model_type": "llama", "hidden_size": 32}, "model_type='llama'"),
    ({"model_type": "nemotron_h"}, "hybrid_override_pattern"),
    ({"model_type": "nemotron_h", "hybrid_override_pattern": "M", "vocab_size": 61}, "hidden_size"),
    ({"hybrid_override_pattern": "MXE", "vocab_size": 61, "hidden_size": 32}, "'X'"),
])  # fmt: skip
def test_a_config_that_cannot_work_is_refused(directory, config, words):
    (directory / "config.json").write_text(json.dumps(config))
    refused(directory, words, ConfigError)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def test_a_pickled_checkpoint_is_not_opened(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(directory, r"pytorch_model.bin is not read")


def test_no_weights_at_all(directory):
    (directory / "model.safetensors").unlink()
    refused(directory, "model.safetensors is missing")


def test_files_are_left_as_they_were(directory):
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    load_hf(directory)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    assert load_file(directory / "model.safetensors").keys() == released_tensors(model_of()).keys()
