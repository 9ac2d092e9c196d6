"""A run that is killed, interrupted or prolonged goes on as if nothing had been, to the last bit."""

import json
import os
import random
import signal
import time

import pytest
import torch
import train_child

from minimoe import cli
from minimoe.train.run import Run


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def log_of(out):
    """The lines without their times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def result_of(out):
    result = json.loads((out / "recipe.json").read_text())["result"]
    return {key: result.get(key) for key in ("steps", "tokens", "validation_loss", "bits_per_byte")}


def same_run(one, other):
    """Losses, gradients, weights, tokenizer and figures of two runs are identical, bit for bit."""
    assert log_of(one) == log_of(other) and result_of(one) == result_of(other)
    ours, theirs = files_of(one / "model"), files_of(other / "model")
    assert ours == theirs and "model.safetensors" in ours
    states = [torch.load(max((out / "checkpoints").iterdir()))["training"] for out in (one, other)]
    assert all(torch.equal(states[0]["model"][name], states[1]["model"][name]) for name in states[0]["model"])
    assert torch.equal(states[0]["random"]["cpu"], states[1]["random"]["cpu"])


def wait_for(condition, process, seconds=120):
    """Until it holds; the process must live on, because it is to be killed."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < end, process.exitcode
        time.sleep(0.0002)


def kill_once(words, out, said, moment, random):
    """Start it, kill it: "start" while it loads, "step" somewhere among its steps, "save" within writing a checkpoint."""

    def being_written():
        return {(path.name, path.stat().st_ino) for path in (out / "checkpoints").glob(".step-*.tmp")}

    def written():
        return {path.name for path in (out / "checkpoints").glob("step-*.pt")}

    left, there = being_written(), written()
    process = train_child.command(words, said)
    if moment == "start":
        time.sleep(random.uniform(0, 0.8))
    elif moment == "step":
        wait_for(lambda: written() - there, process)
        time.sleep(random.uniform(0, 0.08))
    else:
        while True:
            try:
                wait_for(lambda: being_written() - left, process)
                break
            except FileNotFoundError:  # it was finished while we looked
                continue
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, said.read_text()
    try:
        return bool(being_written() - left)
    except FileNotFoundError:
        return False


def killed_run_is_the_same(tiny_run, tmp_path, moments, steps):
    words = [*tiny_run, "--steps", steps, "--save-every", 1]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_child.finished([*words, "--out", whole], tmp_path / "said")
    draw = random.Random(7)
    within_a_save = [
        kill_once([*words, "--out", killed, "--resume"], killed, tmp_path / "said", moment, draw) for moment in moments
    ]
    said = train_child.finished([*words, "--out", killed, "--resume"], tmp_path / "said")
    assert "going on from step" in said
    same_run(whole, killed)
    assert not list(killed.glob(".model-*")) and not list(killed.glob("**/.*.tmp"))  # nothing of the dead lies about
    return sum(within_a_save)


def test_killed_twice_and_resumed_it_is_the_same_run(tiny_run, tmp_path):
    killed_run_is_the_same(tiny_run, tmp_path, ["step", "save"], steps=16)


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_it_is_the_same_run(tiny_run, tmp_path):
    moments = ["save", "step", "start", "save", "step"] * 4
    assert killed_run_is_the_same(tiny_run, tmp_path, moments, steps=70) >= 2  # some did hit an unfinished checkpoint


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_saves_and_goes_on(tiny_run, tmp_path, number):
    words = [*tiny_run, "--steps", 24, "--save-every", 0]
    whole, out, said = tmp_path / "whole", tmp_path / "out", tmp_path / "said"
    process = train_child.command([*words, "--out", out], said)
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size, process)
    os.kill(process.pid, number)
    process.join(120)
    error = said.read_text().splitlines()
    assert process.exitcode == 1 and error[-1].startswith("minimoe: error: interrupted; ") and "Traceback" not in str(error)
    done = len(log_of(out))
    assert 0 < done < 24 and f"{done} of 24 steps were done" in error[-1] and "--resume goes on" in error[-1]
    assert {"model.safetensors", "tokenizer.json"} <= files_of(out / "model").keys()
    assert [path.name[:13] for path in (out / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    train_child.finished([*words, "--out", out, "--resume"], said)
    train_child.finished([*words, "--out", whole], said)
    same_run(whole, out)


def train(tiny_run, out, *words):
    return cli.main([str(word) for word in [*tiny_run, "--out", out, *words]])


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train(tiny_run, out, "--steps", 6, "--save-every", 2) == 0
    return out


def copy_of(run, tmp_path):
    import shutil

    return shutil.copytree(run, tmp_path / "copy")


def test_a_finished_run_has_nothing_to_do(tiny_run, finished, tmp_path, capsys):
    out = copy_of(finished, tmp_path)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    for _ in range(2):
        assert train(tiny_run, out, "--steps", 6, "--save-every", 2, "--resume", "--json") == 0
        said = capsys.readouterr()
        assert json.loads(said.out) == json.loads((finished / "recipe.json").read_text())["result"]
        assert "nothing to do: 6 steps are done" in said.err
        assert {path: path.read_bytes() for path in before} == before


def test_killed_after_the_last_step_only_the_end_is_done_again(tiny_run, finished, tmp_path, capsys):
    """Model and result are missing, the checkpoint of the last step is there."""
    import shutil

    out = copy_of(finished, tmp_path)
    shutil.rmtree(out / "model")
    (out / ".model-left").mkdir()
    recipe = json.loads((out / "recipe.json").read_text())
    del recipe["result"]
    (out / "recipe.json").write_text(json.dumps(recipe))
    assert train(tiny_run, out, "--steps", 6, "--save-every", 2, "--resume") == 0
    assert "going on from step 6" in capsys.readouterr().err
    same_run(finished, out)
    assert files_of(out / "checkpoints") == files_of(finished / "checkpoints") and not (out / ".model-left").exists()


def test_resumed_twice_it_is_the_same(tiny_run, tmp_path, finished):
    out = tmp_path / "out"
    assert train(tiny_run, out, "--steps", 6, "--save-every", 2) == 0
    for checkpoints in (1, 0):  # back to step 4, and then to the beginning
        newest = sorted((out / "checkpoints").iterdir())[checkpoints:]
        for path in newest:
            path.unlink()
        (out / "log.jsonl").open("a").write('{"step": 6, "lo')  # half a line, as a crash leaves it
        assert train(tiny_run, out, "--steps", 6, "--save-every", 2, "--resume") == 0
        same_run(finished, out)


def test_more_steps_go_on(tiny_run, finished, tmp_path, capsys):
    out = copy_of(finished, tmp_path)
    assert train(tiny_run, out, "--steps", 9, "--save-every", 2, "--resume") == 0
    assert "going on from step 6" in capsys.readouterr().err
    assert log_of(out)[:6] == log_of(finished) and [line["step"] for line in log_of(out)] == list(range(9))
    assert result_of(out)["steps"] == 9 and result_of(out)["tokens"] == 9 * 2 * 32
    assert json.loads((out / "recipe.json").read_text())["options"]["steps"] == 9
    assert files_of(out / "model")["model.safetensors"] != files_of(finished / "model")["model.safetensors"]


def test_fewer_steps_than_were_done_change_nothing(tiny_run, finished, tmp_path, capsys):
    out = copy_of(finished, tmp_path)
    assert train(tiny_run, out, "--steps", 3, "--resume") == 0
    assert "nothing to do: 6 steps are done" in capsys.readouterr().err
    same_run(finished, out)


def test_a_lost_log_loses_no_run(tiny_run, finished, tmp_path):
    out = copy_of(finished, tmp_path)
    (out / "log.jsonl").unlink()
    assert train(tiny_run, out, "--steps", 8, "--resume") == 0
    assert result_of(out)["steps"] == 8 and files_of(out / "model")


def refused(capsys, tiny_run, out, *words):
    """One line, and nothing in the directory has changed."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train(tiny_run, out, *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("minimoe: error: ") and error.count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before
    return error


def test_another_run_is_not_continued(tiny_run, finished, tmp_path, capsys):
    out, resume = copy_of(finished, tmp_path), ("--steps", 9, "--resume")
    error = refused(capsys, tiny_run, out, *resume, "--lr", "0.001")
    assert "lr=0.002, and now it is 0.001; give the same, or choose a new directory" in error
    assert "seed=0, and now it is 1" in refused(capsys, tiny_run, out, *resume, "--seed", "1")
    assert "num_nextn_predict_layers=1, and now it is 0" in refused(capsys, tiny_run, out, *resume, "--mtp-weight", "0")
    other = tmp_path / "other"
    other.mkdir()
    for n in range(40):
        (other / f"{n}.txt").write_text(f"other words, number {n}\n" * 40)
    error = refused(capsys, tiny_run, out, *resume, "--data", other)  # a second source
    assert "trained with other sources than are given now" in error and "recipe.json" in error
    error = refused(capsys, tiny_run[:-2], out, *resume)  # the same text, and a tokenizer trained on a part of it
    assert "trained with other tokenizer than are given now" in error


def test_what_is_no_run_is_not_continued(tiny_run, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("buy milk")
    error = refused(capsys, tiny_run, tmp_path / "notes", "--resume")
    assert "is no run that can be continued: it has no recipe.json" in error
    (tmp_path / "notes" / "recipe.json").write_text("flour, eggs")
    assert "recipe.json cannot be read" in refused(capsys, tiny_run, tmp_path / "notes", "--resume")
    (tmp_path / "notes" / "recipe.json").write_text("[]")
    assert "recipe.json cannot be read" in refused(capsys, tiny_run, tmp_path / "notes", "--resume")
    (tmp_path / "file").write_text("x")
    assert "is there already" in refused(capsys, tiny_run, tmp_path / "file")
    assert "is no run" in refused(capsys, tiny_run, tmp_path / "file", "--resume")


def test_nothing_there_to_resume_is_a_beginning(tiny_run, finished, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert train(tiny_run, tmp_path / "empty", "--steps", 6, "--save-every", 2, "--resume") == 0
    assert "starting from the beginning" in capsys.readouterr().err
    same_run(finished, tmp_path / "empty")


def test_one_process_at_a_time(tiny_run, tmp_path, capsys):
    """The second is sent away and the first does not notice; a lock that a killed process held holds nobody."""
    words, out, said = [*tiny_run, "--steps", 12, "--save-every", 1], tmp_path / "out", tmp_path / "said"
    process = train_child.command([*words, "--out", out], said)
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size, process)
    os.kill(process.pid, signal.SIGSTOP)  # in the middle of its run for as long as we need
    assert train(words, out, "--resume") == 1
    assert "another process is training there now" in capsys.readouterr().err
    assert train(words, out) == 1 and "is there already" in capsys.readouterr().err
    os.kill(process.pid, signal.SIGCONT)
    process.join(120)
    assert process.exitcode == 0 and len(log_of(out)) == 12
    train_child.finished([*words, "--out", tmp_path / "alone"], said)
    same_run(tmp_path / "alone", out)


def test_two_that_start_at_once_do_not_share_a_directory(tmp_path):
    """Both found it empty; the second one looks again when the first one has gone."""
    from minimoe.train import TrainError

    recipe = {"tokenizer": "a", "sources": []}
    one, other = Run(tmp_path / "out"), Run(tmp_path / "out")

    class AtItsBeginning:
        next_step = 0

    one.start(AtItsBeginning(), recipe)
    with pytest.raises(TrainError, match="another process is training there now"):
        other.start(AtItsBeginning(), recipe)
    one.finish({})
    one.close()
    with pytest.raises(TrainError, match="is there already"):
        other.start(AtItsBeginning(), recipe)
    other.close()


def test_a_second_signal_does_not_wait():
    from minimoe.train.interrupt import between_steps

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with between_steps() as asked:
            assert not asked()
            signal.raise_signal(signal.SIGINT)
            assert asked()
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_signals_stay_as_they_are():
    import threading

    from minimoe.train.interrupt import between_steps

    seen = []

    def run():
        with between_steps() as asked:
            seen.append((asked(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGINT))]
