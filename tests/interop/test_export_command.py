"""minimoe export: a directory to GGUF and back, with the figures it prints."""

import json
import re

import pytest
import torch
from core_helpers import random_ids
from gguf_helpers import model_of, rewrite, same_data, tensors, tokenizer
from hf_reference import transformers

from minimoe import cli
from minimoe.data import Tokenizer
from minimoe.interop import load_gguf, load_hf, save_gguf, save_hf


@pytest.fixture
def directory(tmp_path):
    model = model_of(tokenizer_fingerprint=tokenizer().fingerprint)
    save_hf(model, tmp_path / "model", tokenizer())
    return tmp_path / "model"


def export(capsys, *words):
    assert cli.main(["export", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refuses(capsys, match, *words, code=1):
    assert cli.main(["export", *map(str, words)]) == code
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("minimoe: error: ") and re.search(match, error), error


@pytest.mark.parametrize("quant", ["F32", "q8_0", "Q4_K_M"])
def test_a_directory_becomes_a_file(directory, tmp_path, capsys, quant):
    target = tmp_path / "made.gguf"
    figures = export(capsys, directory, target, "--quant", quant)
    stored = tensors(target).values()
    types = [tensor.tensor_type.name for tensor in stored]
    assert figures["types"] == {kind: types.count(kind) for kind in types}
    assert figures["bytes"] == target.stat().st_size > figures["tensor_bytes"] == sum(t.n_bytes for t in stored)
    assert figures["parameters"] == sum(t.numel() for t in load_hf(directory).state_dict().values())
    assert figures["bits_per_weight"] == pytest.approx(8 * figures["tensor_bytes"] / figures["parameters"], abs=1e-3)
    assert (figures["quant"], bool(figures["fallbacks"])) == (quant.upper(), quant != "F32")
    model, words = load_gguf(target)
    assert words.fingerprint == tokenizer().fingerprint == model.config.tokenizer_fingerprint


def test_the_text_says_what_fell_back(directory, tmp_path, capsys):
    assert cli.main(["export", str(directory), str(tmp_path / "made.gguf"), "--quant", "Q4_K_M"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'made.gguf'}: " in out and " bits a weight (" in out and "tensors: " in out
    assert "Q5_0 instead of Q4_K, whose blocks do not divide rows of 32" in out


def test_there_and_back(directory, tmp_path, capsys):
    export(capsys, directory, tmp_path / "made.gguf")
    figures = export(capsys, tmp_path / "made.gguf", tmp_path / "back")
    ours, back = load_hf(directory), load_hf(tmp_path / "back")
    assert back.config == ours.config and figures["dtype"] == "float32"
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), back.state_dict().values(), strict=True))
    assert Tokenizer.load(tmp_path / "back").fingerprint == tokenizer().fingerprint == figures["tokenizer"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    ids = random_ids(310, 1, 12)
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids).logits).abs().max() < 1e-4


def test_a_file_becomes_a_smaller_file(directory, tmp_path, capsys):
    export(capsys, directory, tmp_path / "whole.gguf")
    export(capsys, directory, tmp_path / "direct.gguf", "--quant", "Q4_0")
    figures = export(capsys, tmp_path / "whole.gguf", tmp_path / "small.gguf", "--quant", "Q4_0")
    same_data(tmp_path / "direct.gguf", tmp_path / "small.gguf")
    assert figures["parameters"] == sum(t.numel() for t in load_hf(directory).state_dict().values())
    refuses(capsys, "requantizing from type", tmp_path / "small.gguf", tmp_path / "again.gguf", "--quant", "Q5_1")


def test_what_transformers_saved(directory, tmp_path, capsys):
    """Without our tokenizer and without the MTP block, which transformers drops."""
    transformers.AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="no MTP weights"):
        refuses(capsys, "tokenizer_config.json is missing", tmp_path / "theirs", tmp_path / "made.gguf")
        export(capsys, tmp_path / "theirs", tmp_path / "made.gguf", "--tokenizer", directory)
        export(capsys, tmp_path / "theirs", tmp_path / "ids.gguf", "--tokenizer", "none")
    model, words = load_gguf(tmp_path / "made.gguf")
    assert words.fingerprint == tokenizer().fingerprint and load_gguf(tmp_path / "ids.gguf")[1] is None
    ours = load_hf(directory).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())


def test_a_foreign_vocabulary_is_left_out_and_said_so(directory, tmp_path, capsys):
    save_gguf(load_hf(directory), tmp_path / "ours.gguf", tokenizer(), "F16")
    rewrite(tmp_path / "ours.gguf", tmp_path / "theirs.gguf", change=lambda name, value: (
        None if name.startswith("minimoe.") else "pixtral" if name == "tokenizer.ggml.pre" else value))  # fmt: skip
    assert cli.main(["export", str(tmp_path / "theirs.gguf"), str(tmp_path / "back")]) == 0
    out, error = capsys.readouterr()
    assert "parameters in float16\nread without its tokenizer" in out and "pixtral" in out and error == ""
    assert load_hf(tmp_path / "back").lm_head.weight.dtype == torch.float16
    assert not (tmp_path / "back" / "tokenizer.json").exists()


def test_what_is_refused(directory, tmp_path, capsys):
    save_hf(model_of(), tmp_path / "other", Tokenizer.train(["a"], 263))
    save_hf(model_of("ME*-", num_nextn_predict_layers=0), tmp_path / "mixed", tokenizer())
    target = tmp_path / "made.gguf"
    refuses(capsys, "one of SOURCE and TARGET must end in .gguf", directory, tmp_path / "elsewhere")
    refuses(capsys, "--quant Q8_0", tmp_path / "x.gguf", tmp_path / "elsewhere", "--quant", "Q8_0")
    refuses(capsys, "--tokenizer", tmp_path / "x.gguf", tmp_path / "elsewhere", "--tokenizer", directory)
    refuses(capsys, "nowhere", tmp_path / "nowhere", target)
    refuses(capsys, "nowhere.gguf: no such file", tmp_path / "nowhere.gguf", tmp_path / "elsewhere")
    refuses(capsys, "nowhere.gguf", tmp_path / "nowhere.gguf", target)
    refuses(capsys, "fingerprint", directory, target, "--tokenizer", tmp_path / "other")
    refuses(capsys, r"hybrid_override_pattern='ME\*-'", tmp_path / "mixed", target)
    refuses(capsys, "unknown", directory, target, "--quant", "Q3")
    assert not target.exists() and not (tmp_path / "elsewhere").exists()
    export(capsys, directory, target)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").touch()
    refuses(capsys, "other files .diary.txt.", target, tmp_path / "full")
