"""Several processes, started by torchrun as a reader starts them, do the run that one process does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from minimoe import cli
from minimoe.data import Tokenizer, load_corpus
from minimoe.interop import load_model
from minimoe.train.checkpoint import Checkpoints

# two parts of one window for each of two processes; short documents, so that no two parts have as many targets
OPTIONS = ["--preset", "tiny", "--batch", "4", "--length", "48", "--accumulate", "2", "--precision", "float32", "--decay", "0",
           "--device", "cpu", "--save-every", "4"]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PATIENCE = 600  # seconds; for machines that do much else


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """The command's words without --out and --steps."""
    folder, corpus = tmp_path_factory.mktemp("data"), load_corpus()
    (folder / "text").mkdir()
    for number, text in enumerate(corpus.texts[:120]):
        (folder / "text" / f"{number}.txt").write_text(text[:300], encoding="utf-8")
    Tokenizer.train(load_corpus(folder / "text").texts, 320).save(folder / "tokenizer")
    return [*OPTIONS, "--data", str(folder / "text"), "--tokenizer", str(folder / "tokenizer")]


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory):
    """Eight steps by one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main(["train", *options, "--steps", "8", "--out", str(out)]) == 0
    return out


def torchrun(*words, **kwargs) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # else torchrun says that it sets it
    return subprocess.run([*TORCHRUN, *map(str, words)], capture_output=True, text=True, timeout=PATIENCE, env=environment, **kwargs)


def trained(out, *words):
    done = torchrun("-m", "minimoe", "train", *words, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def said(done) -> list[str]:
    """What our processes said, without torchrun's report."""
    return [line for line in done.stderr.splitlines() if line.startswith("minimoe: ")]


def check_same(out, alone):
    """The same log, the same biases, and weights as close as Adam's first steps leave them."""
    for ours, theirs in zip(lines(out), lines(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("step", "loss", "mtp_loss", "grad_norm", "tokens", "lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)
    ours, theirs = load_model(out)[0].state_dict(), load_model(alone)[0].state_dict()
    for name, weight in theirs.items():
        if name.endswith("correction_bias"):
            assert weight.abs().max() > 0 and torch.equal(ours[name], weight), name
        else:  # a gradient near 0 has the sign of its rounding, and a step of 0.002 follows the sign
            torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-3, msg=name)
            assert (ours[name] - weight).abs().mean() < 1e-5, name
    results = [json.loads((run / "recipe.json").read_text())["result"] for run in (out, alone)]
    assert results[0]["validation_loss"] == pytest.approx(results[1]["validation_loss"], rel=1e-5)


def check_files(out, alone):
    """A checkpoint has the same names, shapes and kinds of things in it, whoever wrote it."""

    def shape(thing):
        if isinstance(thing, dict):
            return {key: shape(value) for key, value in thing.items()}
        if isinstance(thing, list):
            return [shape(value) for value in thing]
        return (type(thing), thing.shape, thing.dtype, str(thing.device)) if isinstance(thing, torch.Tensor) else type(thing)

    ours, theirs = (shape(Checkpoints(run / "checkpoints").load()[0]) for run in (out, alone))
    assert ours == theirs


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_do_the_run_of_one_and_one_goes_on_from_theirs(parallel, options, alone, tmp_path):
    out = trained(tmp_path / "two", *options, "--steps", "8", "--parallel", parallel)
    check_same(out, alone)
    check_files(out, alone)
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["processes"], recipe["parallel"]) == (2, parallel)

    half = shutil.copytree(out, tmp_path / "half")
    newest = Checkpoints(half / "checkpoints").paths()[0]
    assert newest.name.startswith("step-00000008")
    newest.unlink()
    assert cli.main(["train", *options, "--steps", "8", "--out", str(half), "--resume"]) == 0
    check_same(half, alone)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_go_on_from_the_checkpoint_of_one(parallel, options, alone, tmp_path):
    half = shutil.copytree(alone, tmp_path / "half")
    Checkpoints(half / "checkpoints").paths()[0].unlink()
    check_same(trained(half, *options, "--steps", "8", "--resume", "--parallel", parallel), alone)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_activation_checkpointing_changes_nothing(parallel, options, alone, tmp_path):
    check_same(trained(tmp_path / "two", *options, "--steps", "8", "--recompute", "--parallel", parallel), alone)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_process_that_is_killed_ends_the_run_and_resume_goes_on(parallel, options, tmp_path):
    words = ["-m", "minimoe", "train", *options, "--parallel", parallel, "--out", str(tmp_path / "run")]
    with open(tmp_path / "said", "w") as errors:
        run = subprocess.Popen([*TORCHRUN, *words, "--steps", "100000"], stdout=errors, stderr=errors)
    try:
        wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob("step-*.pt")), run)
        second = next(p for p in psutil.Process(run.pid).children() if p.environ().get("RANK") == "1")
        second.kill()
        assert run.wait(PATIENCE) != 0
    finally:
        run.kill()
    told = [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith("minimoe: error: ")]
    assert len(told) <= 1  # torchrun may end the other process before it can say anything
    assert all("another process has ended" in line for line in told)
    done = Checkpoints(tmp_path / "run" / "checkpoints").load()[0]["step"]
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    going_on = torchrun(*words, "--steps", done + 4, "--resume")
    assert going_on.returncode == 0, going_on.stderr
    assert f"going on from step {done} " in going_on.stderr
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(done + 4))
    assert cli.main(["train", *options, "--out", str(copy), "--steps", str(done + 4), "--resume"]) == 0
    check_same(tmp_path / "run", copy)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_asked_to_stop_all_stop_after_the_same_step(parallel, options, tmp_path):
    words = ["-m", "minimoe", "train", *options, "--save-every", "0", "--parallel", parallel, "--out", str(tmp_path / "run")]
    with open(tmp_path / "said", "w") as errors:
        run = subprocess.Popen([*TORCHRUN, *words, "--steps", "100000"], stdout=errors, stderr=errors)
    try:
        wait_for(lambda: (tmp_path / "run" / "log.jsonl").exists() and lines_so_far(tmp_path / "run") > 2, run)
        run.send_signal(signal.SIGINT)
        assert run.wait(PATIENCE) != 0
    finally:
        run.kill()
    told = (tmp_path / "said").read_text()
    assert told.count("minimoe: error: interrupted; ") == 1
    step = len(lines(tmp_path / "run"))
    assert Checkpoints(tmp_path / "run" / "checkpoints").load()[0]["step"] == step
    assert f"{step} of 100000 steps were done" in told
    assert all(weight.isfinite().all() for weight in load_model(tmp_path / "run")[0].state_dict().values())


def lines_so_far(out) -> int:
    return (out / "log.jsonl").read_text().count("\n")


def wait_for(condition, run) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.1)


# A process of its own: the second one's memory is too small for more than ``most`` windows at once.
SHORT_OF_MEMORY = """
import json, sys
import numpy as np, torch
from minimoe import HybridConfig, HybridLM
from minimoe.cli import _fail
from minimoe.data import Tokens
from minimoe.errors import MinimoeError
from minimoe.train import Training, TrainOptions
from minimoe.train.world import processes

parallel, most, mtp_weight, out = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
tokens = Tokens(np.random.default_rng(0).integers(3, 320, 5000).astype(np.uint16), 1)
options = TrainOptions(steps=4, batch=8, length=32, precision="float32", mtp_weight=mtp_weight)

def run(world):
    torch.manual_seed(0)
    training = Training(HybridLM(HybridConfig.preset("tiny"), device=world.device), tokens, options, world)
    if world.rank == 1:
        training.model.lm_head.register_full_backward_pre_hook(
            lambda module, grads: torch.empty(2**60) if len(grads[0]) > most * 32 else None
        )
    log = [training.step().to_dict() for _ in range(4)]
    training.close()
    if world.first:
        with open(out, "w") as file:
            json.dump([line | {"parts": training.accumulate} for line in log], file)

try:
    with processes("cpu", parallel if parallel != "one" else None) as world:
        run(world)
except MinimoeError as error:
    sys.exit(_fail(error))
"""


@pytest.fixture(scope="module")
def short_of_memory(tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "short_of_memory.py"
    script.write_text(SHORT_OF_MEMORY)
    return script


def child(script, *words) -> list[dict]:
    """The script's log by one process."""
    subprocess.run([sys.executable, str(script), "one", *map(str, words)], check=True, timeout=PATIENCE)
    return json.loads(words[-1].read_text())


@pytest.mark.slow
def test_out_of_memory_in_one_process_makes_the_parts_of_all_smaller(short_of_memory, tmp_path):
    done = torchrun(short_of_memory, "ddp", 1, 0.3, tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads((tmp_path / "two.json").read_text()), child(short_of_memory, 8, 0.3, tmp_path / "one.json")
    assert "out of memory with 2 windows at once; from here on 1 at once, 4 times a step" in ours[0]["note"]
    assert [line["parts"] for line in ours] == [4] * 4 and all("note" not in line for line in ours[1:])
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_out_of_memory_that_cannot_be_mended_ends_the_run_in_one_line(short_of_memory, tmp_path):
    done = torchrun(short_of_memory, "ddp", 0, 0.3, tmp_path / "none.json")
    assert done.returncode != 0 and len(said(done)) == 1, done.stderr
    assert "with a single window of 32 tokens" in said(done)[0]
    done = torchrun(short_of_memory, "fsdp", 1, 0.3, tmp_path / "none.json")  # where nothing can be rehearsed
    assert done.returncode != 0 and len(said(done)) == 1, done.stderr
    assert "out of memory on cpu with 4 windows at once; go on with --resume and --accumulate" in said(done)[0]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_mtp_block_without_a_loss_is_left_alone(parallel, short_of_memory, tmp_path):
    done = torchrun(short_of_memory, parallel, 8, 0, tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads((tmp_path / "two.json").read_text()), child(short_of_memory, 8, 0, tmp_path / "one.json")
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_that_diverges_is_told_once_and_keeps_its_weights(parallel, options, tmp_path):
    words = ["-m", "minimoe", "train", *options, "--parallel", parallel, "--steps", "60", "--lr", "1e9", "--out", tmp_path / "run"]
    done = torchrun(*words)
    assert done.returncode != 0 and len(said(done)) == 1, done.stderr
    assert "lower the learning rate" in said(done)[0] and "Traceback" not in done.stderr.split("minimoe: error")[0]
    assert all(weight.isfinite().all() for weight in load_model(tmp_path / "run")[0].state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--batch", "5"], "batch=5: must be a multiple of 2 processes times accumulate=1"),
        (["--batch", "6", "--accumulate", "2"], "batch=6: must be a multiple of 2 processes times accumulate=2"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--data", "/nowhere"], "no such folder"),
    ],
)
def test_bad_input_is_one_line_whatever_the_number_of_processes(changes, told, options, tmp_path):
    words = [word for word in options if word not in ("--accumulate", "2")]
    done = torchrun("-m", "minimoe", "train", *words, *changes, "--steps", "2", "--out", tmp_path / "run")
    assert done.returncode != 0 and len(said(done)) == 1, done.stderr
    assert said(done)[0].startswith("minimoe: error: ") and told in said(done)[0]
    assert not (tmp_path / "run").exists()


def test_parallel_without_torchrun_is_one_line(options, tmp_path, capsys):
    assert cli.main(["train", *options, "--parallel", "fsdp", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("minimoe: error: --parallel fsdp") and "torchrun" in error and error.count("\n") == 1
