"""checkpoints/small: light enough for a repository, whole, and what its model card says."""

import json
import re

import pytest
import torch
from common import ROOT

from minimoe import HybridConfig, generate
from minimoe.data import encode_corpus, load_corpus
from minimoe.interop import load_model
from minimoe.train import bits_per_byte, evaluate

HERE = ROOT / "checkpoints" / "small"
RESULT = json.loads((HERE / "recipe.json").read_text())["result"]


@pytest.fixture(scope="module")
def shipped():
    model, tokenizer = load_model(HERE)
    return model.float().eval(), tokenizer


def test_it_is_light():
    files = [path for path in HERE.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 15 * 2**20
    assert sum(path.stat().st_size for path in files) <= 48_000_000


def test_it_is_preset_small_with_its_mtp_block(shipped):
    model, tokenizer = shipped
    small = HybridConfig.preset("small")
    ours = {"tokenizer_fingerprint": tokenizer.fingerprint, "eos_token_id": (2, 4), "bos_token_id": 1, "pad_token_id": 0}
    assert model.config == small.replace(**ours) and model.mtp is not None
    assert {p.dtype for p in load_model(HERE)[0].parameters()} == {torch.bfloat16}


def test_the_log_is_the_run_that_the_recipe_describes():
    lines = [json.loads(line) for line in (HERE / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(RESULT["steps"]))
    assert lines[-1]["tokens"] == RESULT["tokens"]
    ((step, seconds),) = RESULT["cpu_seconds_at_step"].items()
    assert seconds / (int(step) + 1) * RESULT["steps"] <= 3600  # one core-hour, as its card says


def test_the_loss_on_held_out_files_is_the_one_that_was_written_down(shipped):
    """Some of the windows; another Python has other files, so only the neighbourhood is asked for."""
    model, tokenizer = shipped
    tokens = encode_corpus(load_corpus().split()[1], tokenizer)
    loss = evaluate(model, tokens, batch=4, length=512, limit=8)
    assert loss == pytest.approx(RESULT["validation_loss"], rel=0.15)
    assert bits_per_byte(loss, tokens) == pytest.approx(RESULT["bits_per_byte"], rel=0.15)


def test_it_writes_something_like_python(shipped):
    """Not whether the code is right: it is not. Whether it goes on indented, as most lines of Python do."""
    model, tokenizer = shipped
    ids = generate(model, [tokenizer.encode("class Reader:\n    def __init__(self, path):\n")], max_new_tokens=48).ids[0]
    lines = tokenizer.decode(ids).split("\n")
    assert "self" in tokenizer.decode(ids)
    assert sum(line.startswith("    ") or not line for line in lines[:-1]) >= len(lines) - 2


def test_the_card_says_what_was_done():
    card = (HERE / "README.md").read_text()
    for figure in (RESULT["steps"], RESULT["tokens"]):
        assert f"{figure:,}" in card
    assert f"{RESULT['validation_loss']:.2f}" in card and f"{RESULT['bits_per_byte']:.2f}" in card
    assert re.search(r"minimoe train .*--steps 3600", card)


def test_transformers_opens_it(shipped):
    import transformers

    model, tokenizer = shipped
    theirs = transformers.AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode("def main(argv=None):\n    ")])
    with torch.no_grad():
        difference = (theirs(ids).logits - model(ids).logits).abs().max()
    assert difference < 1e-3
    assert transformers.AutoTokenizer.from_pretrained(HERE)("def main(").input_ids == tokenizer.encode("def main(")
