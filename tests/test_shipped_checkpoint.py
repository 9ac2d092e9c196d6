"""checkpoints/small: light enough for a repository, whole, and what its model card says."""

import json

import pytest
import ship
import torch
from common import ROOT

from minimoe import HybridConfig, generate
from minimoe.data import encode_corpus, load_corpus
from minimoe.data.tasks import examples
from minimoe.interop import load_model
from minimoe.runtime import llamacpp
from minimoe.runtime.decoding import logits as logits_of
from minimoe.train import bits_per_byte, evaluate
from minimoe.train.router_load import counted_choices
from minimoe.train.scoring import ask

HERE = ROOT / "checkpoints" / "small"
RECIPE = json.loads((HERE / "recipe.json").read_text())
RESULT = RECIPE["result"]
FIGURES = json.loads((ROOT / "results" / "10_checkpoint.json").read_text())["numbers"]


@pytest.fixture(scope="module")
def shipped():
    model, tokenizer = load_model(HERE)
    return model.float().eval(), tokenizer


def test_it_is_light():
    files = [path for path in HERE.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 15 * 2**20
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
    assert RECIPE["options"]["steps"] == RESULT["steps"] and RESULT["cpu_seconds"] > 0
    assert [source["name"] for source in RECIPE["sources"]] == ["stdlib", "packages", "tasks", "held out"]


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
    assert f"--steps {RESULT['steps']}" in card and f"{RESULT['cpu_seconds'] / 3600:.1f} core-hours" in card
    assert card == ship.card()  # and its figures are those of the experiment


def test_the_experiment_was_run_on_this_checkpoint(shipped):
    assert FIGURES["parameters"] == sum(p.numel() for p in shipped[0].parameters())
    assert FIGURES["compression"]["model"]["bits_per_byte"] == pytest.approx(RESULT["bits_per_byte"], rel=0.01)


def test_its_experts_are_all_at_work(shipped):
    """On held-out text; the first model that was shipped had 5 experts that took everything."""
    model, tokenizer = shipped
    tokens = encode_corpus(load_corpus().split()[1], tokenizer)
    ids = torch.from_numpy(tokens.ids[:4096].astype("int64")).view(8, 512)
    with counted_choices(model) as counts, torch.no_grad():
        model(ids)
    trunk = [counts_E for name, counts_E in counts.items() if not name.startswith("mtp")]
    assert len(trunk) == 2
    for counts_E in trunk:
        assert float(counts_E.max() / counts_E.float().mean()) < 3 and int((counts_E > 0).sum()) == 16


def test_it_answers_in_the_form_that_it_was_taught(shipped):
    model, tokenizer = shipped
    asked = list(examples(8, seed=3, tasks=["copy"], held_out=True))
    for thinking in (False, True):
        replies = [reply.text for reply in ask(model, tokenizer, asked, thinking)]
        assert all(("</think>" in text) == thinking for text in replies)
        assert sum(example.solved_by(text) for example, text in zip(asked, replies)) >= 4


def test_llamacpp_opens_the_q8_0_file_and_reads_alike(shipped):
    from minimoe.interop import load_gguf

    model, tokenizer = shipped
    path = HERE / "small-Q8_0.gguf"
    rounded, same = load_gguf(path)
    assert same.fingerprint == tokenizer.fingerprint
    ids = tokenizer.encode("def main(argv=None):\n    parser = argparse.ArgumentParser()\n    ")
    with torch.no_grad():
        ours, theirs = (m(torch.tensor([ids])).logits.log_softmax(-1) for m in (model, rounded.float()))
    assert (ours.exp() * (ours - theirs)).sum(-1).mean() < 0.01  # nats: what eight bits cost
    llama = llamacpp.load(path, exact=True)
    logits = torch.from_numpy(logits_of(llama, ids))
    llama.close()
    with torch.no_grad():  # llama.cpp rounds what goes into a Q8_0 product to 8 bits too
        difference = (logits - rounded.float()(torch.tensor([ids])).logits[0]).abs().max()
    assert difference < 5e-2 * logits.abs().max()


def test_transformers_opens_it(shipped):
    import transformers

    model, tokenizer = shipped
    theirs = transformers.AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode("def main(argv=None):\n    ")])
    with torch.no_grad():
        difference = (theirs(ids).logits - model(ids).logits).abs().max()
    assert difference < 1e-3
    assert transformers.AutoTokenizer.from_pretrained(HERE)("def main(").input_ids == tokenizer.encode("def main(")
