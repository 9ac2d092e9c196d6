"""minimoe train and minimoe generate, as a reader runs them."""

import json

import pytest
import torch

from minimoe import cli
from minimoe.data import Tokenizer, load_corpus
from minimoe.interop import load_model

SIZES = ["--preset", "tiny", "--batch", "2", "--length", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small folder of source files."""
    folder = tmp_path_factory.mktemp("text")
    corpus = load_corpus()
    for name, text in zip(corpus.names[:60], corpus.texts[:60]):
        (folder / name.replace("/", "_")).write_text(text[:4000], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """One run of five steps, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "new"
    assert cli.main(["train", *SIZES, "--steps", "5", "--data", str(folder), "--out", str(out)]) == 0
    return out


def fails(words, capsys):
    """One line on stderr and exit code 1."""
    assert cli.main([str(word) for word in words]) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("minimoe: error: ") and error.count("\n") == 1
    return error


def test_the_log_has_a_line_a_step(trained):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5))
    assert all({"step", "loss", "tokens", "seconds"} <= line.keys() for line in lines)
    assert lines[-1]["tokens"] == 5 * 2 * 32


def test_the_recipe_repeats_the_run(trained, folder):
    recipe = json.loads((trained / "recipe.json").read_text())
    training, validation = load_corpus(folder).split()
    source, held_out = recipe["sources"]
    assert source["sha256"] == training.sha256 and source["bytes"] == training.bytes and source["share"] == 1
    assert held_out["sha256"] == validation.sha256 and held_out["files"] == len(validation.names)
    assert recipe["tokenizer"] == load_model(trained)[1].fingerprint
    assert recipe["options"]["steps"] == 5 and recipe["result"]["steps"] == 5
    assert recipe["result"]["bits_per_byte"] > 0 and recipe["machine"]["torch"] == torch.__version__


def test_two_runs_give_the_same_weights(trained, folder, tmp_path):
    assert cli.main(["train", *SIZES, "--steps", "5", "--data", str(folder), "--out", str(tmp_path / "b")]) == 0
    one, other = load_model(trained)[0].state_dict(), load_model(tmp_path / "b")[0].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_model_knows_its_tokenizer(trained):
    model, tokenizer = load_model(trained)
    assert model.config.tokenizer_fingerprint == tokenizer.fingerprint
    assert model.config.eos_token_ids == (tokenizer.eos_id, tokenizer.special["<|im_end|>"])
    assert load_model(trained / "model")[0].config == model.config


def test_another_tokenizer_is_refused(trained, tmp_path, capsys):
    import shutil

    shutil.copytree(trained / "model", tmp_path / "m")
    Tokenizer.train(["another text, another vocabulary"], 270).save(tmp_path / "m")
    error = fails(["generate", tmp_path / "m", "--prompt", "x"], capsys)
    assert "fingerprint" in error


def test_generate_prints_text(trained, capsys):
    assert cli.main(["generate", str(trained), "--prompt", "def f(", "--max-new-tokens", "4"]) == 0
    out, error = capsys.readouterr()
    assert out.startswith("def f(") and "4 tokens" in error


def test_generate_as_json_and_its_text_are_the_same(trained, capsys):
    words = ["generate", str(trained), "--prompt", "def f(", "--max-new-tokens", "6"]
    assert cli.main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert load_model(trained)[1].decode(result["ids"]) == result["text"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == "def f(" + result["text"]


def test_sampling_needs_a_seed_to_repeat(trained, capsys):
    texts = set()
    for seed in (1, 1, 2):
        words = ["generate", trained, "--prompt", "a", "--temperature", "1", "--seed", seed, "--json"]
        assert cli.main([str(word) for word in words]) == 0
        texts.add(tuple(json.loads(capsys.readouterr().out)["ids"]))
    assert len(texts) == 2


def test_the_prompt_comes_from_standard_input(trained, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("import "))
    assert cli.main(["generate", str(trained), "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("import ")


def test_bad_input_is_one_line(trained, folder, tmp_path, capsys):
    new = tmp_path / "new"
    (tmp_path / "empty").mkdir()
    cases = {
        "is there already": ["train", "--out", trained],
        "no such folder": ["train", "--out", new, "--data", tmp_path / "nowhere"],
        "no text in it": ["train", "--out", new, "--data", tmp_path / "empty"],
        "steps=0": ["train", "--out", new, "--data", folder, "--steps", "0"],
        "lr=-1.0": ["train", "--out", new, "--data", folder, "--lr", "-1"],
        "fewer than one window": ["train", *SIZES[:4], "--length", "10000000", "--out", new, "--data", folder],
        "device 'tpu'": ["train", "--out", new, "--data", folder, "--device", "tpu"],
        "tokenizer": ["train", "--out", new, "--data", folder, "--tokenizer", tmp_path / "empty"],
        "no such file": ["generate", tmp_path / "nowhere", "--prompt", "x"],
        "prompt is empty": ["generate", trained, "--prompt", ""],
        "temperature": ["generate", trained, "--prompt", "x", "--temperature", "-1"],
        "config.json is missing": ["generate", tmp_path / "empty", "--prompt", "x"],
    }
    for words, command in cases.items():
        assert words in fails(command, capsys)
        assert not new.exists()


def test_a_tokenizer_that_is_too_large_for_the_preset_is_refused(folder, tmp_path, capsys):
    Tokenizer.train(load_corpus(folder).texts, 400).save(tmp_path / "t")
    error = fails(["train", *SIZES, "--out", tmp_path / "new", "--data", folder, "--tokenizer", tmp_path / "t"], capsys)
    assert "400 tokens" in error and "320" in error


def test_without_mtp_the_block_is_not_built(folder, tmp_path):
    out = tmp_path / "new"
    words = ["train", *SIZES, "--steps", "1", "--mtp-weight", "0", "--data", str(folder), "--out", str(out)]
    assert cli.main(words) == 0
    assert load_model(out)[0].mtp is None


def test_interrupted_it_keeps_what_it_has(folder, tmp_path, capsys, monkeypatch):
    """A Ctrl-C in the middle of a step: the step comes to its end."""
    import signal

    from minimoe.train import loop

    real = loop.warmup_stable_decay

    def interrupt(step, *rest):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return real(step, *rest)

    monkeypatch.setattr(loop, "warmup_stable_decay", interrupt)
    error = fails(["train", *SIZES, "--data", folder, "--out", tmp_path / "new"], capsys)
    assert "interrupted; 3 of 300 steps were done" in error and "with --resume goes on" in error
    assert load_model(tmp_path / "new")[0].config.vocab_size == 320
    assert json.loads((tmp_path / "new" / "recipe.json").read_text())["result"]["steps"] == 3
    assert len((tmp_path / "new" / "log.jsonl").read_text().splitlines()) == 3
    assert [path.name[:13] for path in (tmp_path / "new" / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_run_that_diverges_keeps_the_weights_of_the_step_before(folder, tmp_path, capsys):
    error = fails(["train", *SIZES, "--data", folder, "--out", tmp_path / "new", "--lr", "1e9", "--steps", "40"], capsys)
    assert "lower the learning rate" in error and "the model as it was is in" in error
    model, _ = load_model(tmp_path / "new")
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_run_that_fails_at_once_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    from minimoe import HybridLM

    def broken(self, *_, **__):
        return [self.lm_head.weight.sum() * float("nan")] * 2

    monkeypatch.setattr(HybridLM, "losses", broken)
    error = fails(["train", *SIZES, "--data", folder, "--out", tmp_path / "new"], capsys)
    assert "step 0: loss nan" in error and "there is no good checkpoint yet" in error
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()  # what was there before stays
    fails(["train", *SIZES, "--data", folder, "--out", tmp_path / "mine"], capsys)
    assert list((tmp_path / "mine").iterdir()) == []


def test_too_little_text_to_validate_on_says_which(folder, tmp_path, capsys):
    words = ["train", "--preset", "tiny", "--batch", "2", "--length", "20000", "--out", tmp_path / "new", "--data", folder]
    error = fails(words, capsys)
    assert "validation text (" in error and "fewer than one window of 20000 + 1; give more text or a shorter length" in error
    assert not (tmp_path / "new").exists()


def test_a_mixture_is_noted_source_by_source(folder, tmp_path):
    out, other = tmp_path / "new", tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("another text " * 60)
    words = ["train", *SIZES, "--steps", "1", "--data", f"{folder}=3", "--data", f"{other}=1", "--out", str(out)]
    assert cli.main(words) == 0
    first, second, held_out = json.loads((out / "recipe.json").read_text())["sources"]
    assert (first["share"], second["share"], second["files"], held_out["name"]) == (3.0, 1.0, 1, "held out")


def test_shares_and_sources_that_make_no_sense_are_one_line(folder, tmp_path, capsys):
    for data, words in {f"{folder}=much": "is no share", f"{folder}=0": "must be above 0", "tasks": "name a source of text"}.items():
        assert words in fails(["train", *SIZES, "--data", data, "--out", tmp_path / "new"], capsys)
        assert not (tmp_path / "new").exists()


def test_little_text_makes_a_smaller_vocabulary_and_every_id_has_a_text(tmp_path):
    (tmp_path / "text").mkdir()
    for n in range(60):
        (tmp_path / "text" / f"{n}.txt").write_text(f"{n} words and words\n" * 9)
    out = tmp_path / "new"
    words = ["train", *SIZES, "--steps", "1", "--data", str(tmp_path / "text"), "--out", str(out)]
    assert cli.main(words) == 0
    model, tokenizer = load_model(out)
    assert model.config.vocab_size == tokenizer.vocab_size < 320


@pytest.mark.parametrize("words", [["--seed", "-1"], ["--seed", "99999999999999999999"], ["--device", "meta"]])
def test_wrong_numbers_and_devices_are_one_line(folder, tmp_path, capsys, words):
    assert words[1] in fails(["train", *SIZES, "--data", folder, "--out", tmp_path / "new", *words], capsys)
    assert not (tmp_path / "new").exists()


def test_a_character_that_was_begun_is_shown_as_such(trained, capsys, monkeypatch):
    """The text that streams and the one in --json end alike."""
    from minimoe import generation

    tokenizer = load_model(trained)[1]
    half = tokenizer.encode("\U0001f600")[0]
    monkeypatch.setattr(generation, "pick", lambda *_: half)
    words = ["generate", str(trained), "--prompt", "x", "--max-new-tokens", "1"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == "x\ufffd"


def test_standard_input_that_is_no_text_is_one_line(trained, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"))
    assert "no text in utf-8" in fails(["generate", trained], capsys)
    monkeypatch.setattr("sys.stdin", None)
    assert "prompt is empty" in fails(["generate", trained], capsys)
