"""Checkpoint files: whole or not there, never believed when damaged, and what fills the disk leaves the one before."""

import json
import os
import random
import re

import pytest
import torch
import train_child

from minimoe import cli
from minimoe.train import Checkpoints, TrainError


def content(step):
    return {"training": {"weights": torch.full((50,), float(step)), "next_step": step, "config": {"eos": (1, 2)}}}


@pytest.fixture
def three(tmp_path):
    """The checkpoints of steps 10, 20 and 30."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (10, 20, 30):
        checkpoints.save(step, content(step))
    return checkpoints


def test_what_is_saved_comes_back(three):
    found, path = three.load()
    assert path == three.paths()[0] and re.fullmatch(r"step-00000030-[0-9a-f]{16}\.pt", path.name)
    assert torch.equal(found["training"]["weights"], torch.full((50,), 30.0)) and found["step"] == 30
    assert found["training"]["config"] == {"eos": (1, 2)}
    assert Checkpoints(three.folder / "nowhere").load() is None


def test_the_newest_few_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(5):
        checkpoints.save(step, content(step))
        steps = [int(path.name[5:13]) for path in checkpoints.paths()]
        assert steps == [step, step - 1][: step + 1]
    (tmp_path / "step-99999999.pt").write_bytes(b"not ours")
    checkpoints.save(5, content(5))
    assert len(checkpoints.paths()) == 2 and (tmp_path / "step-99999999.pt").exists()


def damaged_in_many_ways():
    def flip(at):
        def change(data):
            data = bytearray(data)
            data[int(at * (len(data) - 1))] ^= 1 << random.Random(at).randrange(8)
            return bytes(data)

        return change

    ways = {f"bit at {at:.3f}": flip(at) for at in [n / 40 for n in range(41)]}
    ways |= {f"cut to {share}": lambda data, share=share: data[: int(share * len(data))] for share in (0, 0.01, 0.5, 0.99)}
    return ways | {
        "last byte lost": lambda data: data[:-1], "a byte more": lambda data: data + b"\0",
        "other text": lambda data: b"shopping list", "zeros": lambda data: bytes(len(data)),
    }  # fmt: skip


def test_every_damage_is_seen_and_the_one_before_is_taken(three):
    newest, before, _ = three.paths()
    whole = newest.read_bytes()
    for name, change in damaged_in_many_ways().items():
        newest.write_bytes(change(whole))
        said = []
        found, path = three.load(say=said.append)
        assert path == before and found["step"] == 20, name
        assert len(said) == 1 and str(newest) in said[0] and "going back to the checkpoint before it" in said[0]
    newest.write_bytes(whole)
    assert three.load()[1] == newest


def test_without_anyone_to_tell_it_warns(three):
    three.paths()[0].write_bytes(b"")
    with pytest.warns(UserWarning, match="step-00000030-.*have changed since it was written; going back"):
        assert three.load()[0]["step"] == 20


def renamed_to_its_hash(path, data):
    """Other bytes under the name that they should have: damage that the hash does not show."""
    import hashlib

    path.unlink()
    path = path.with_name(f"{path.name[:13]}-{hashlib.sha256(data).hexdigest()[:16]}.pt")
    path.write_bytes(data)
    return path


def test_a_file_that_never_was_a_checkpoint_is_skipped_too(three, tmp_path):
    torch.save([1, 2, 3], tmp_path / "list")
    torch.save({"x": print}, tmp_path / "code")  # what weights_only refuses to run
    for data in (b"", b"text", (tmp_path / "list").read_bytes(), (tmp_path / "code").read_bytes()):
        wrong = renamed_to_its_hash(three.paths()[0], data)
        said = []
        assert three.load(say=said.append)[0]["step"] == 20
        assert len(said) == 1 and str(wrong) in said[0] and "it is no checkpoint" in said[0] and "\n" not in said[0]


def test_a_folder_in_its_place_is_skipped_too(three):
    newest = three.paths()[0]
    newest.unlink()
    newest.mkdir()
    said = []
    assert three.load(say=said.append)[0]["step"] == 20 and "it cannot be read (Is a directory)" in said[0]


def test_all_damaged_is_one_line(three):
    for path in three.paths():
        path.write_bytes(b"x")
    said = []
    with pytest.raises(TrainError, match="none of its 3 checkpoints can be read; start anew in a new directory") as error:
        three.load(say=said.append)
    assert len(said) == 3 and "\n" not in str(error.value) and len(three.paths()) == 3  # nothing is thrown away


def test_another_version_s_file_is_refused_and_not_passed_over(three, tmp_path):
    torch.save({"format": 99, "step": 30}, tmp_path / "new")
    renamed_to_its_hash(three.paths()[0], (tmp_path / "new").read_bytes())
    with pytest.raises(TrainError, match="its format is 99, and this version of minimoe reads 1"):
        three.load()


def test_skipped_files_do_not_count_among_those_to_keep(three):
    three.paths()[0].write_bytes(b"x")
    _, used = three.load(say=lambda line: None)
    three.drop_newer(used)
    checkpoints = Checkpoints(three.folder, keep=2)
    checkpoints.save(25, content(25))
    assert [int(path.name[5:13]) for path in checkpoints.paths()] == [25, 20]
    assert checkpoints.load()[0]["step"] == 25


def test_the_last_one_before_a_step(three):
    steps = {step: three.last_before(step) for step in (31, 30, 21, 10)}
    assert [path and int(path.name[5:13]) for path in steps.values()] == [30, 20, 20, None]


def test_a_killed_writer_s_file_is_tidied_up(three):
    (three.folder / ".step-00000031.tmp").write_bytes(b"half")
    assert three.load()[0]["step"] == 30
    three.save(40, content(40))
    assert not list(three.folder.glob(".*"))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainError, match="the checkpoint before step 3 could not be written .* there is none yet") as error:
        Checkpoints(tmp_path / "file").save(3, content(3))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- through the command
@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """Eight steps, with checkpoints before steps 6 and 8, as if it had been killed after the eighth."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main([*tiny_run, "--out", str(out), "--steps", "8", "--save-every", "2"]) == 0
    return out


def unfinished(run, tmp_path):
    import shutil

    out = shutil.copytree(run, tmp_path / "copy")
    recipe = json.loads((out / "recipe.json").read_text())
    del recipe["result"]
    (out / "recipe.json").write_text(json.dumps(recipe))
    shutil.rmtree(out / "model")
    return out, sorted((out / "checkpoints").iterdir())


def resume(tiny_run, out):
    return cli.main([*tiny_run, "--out", str(out), "--steps", "8", "--save-every", "2", "--resume"])


def losses(out):
    lines = (out / "log.jsonl").read_text().split("\n")[:-1]  # what comes after the last line end is half a line
    return [json.loads(line)["loss"] for line in lines]


def test_a_run_goes_back_to_the_checkpoint_before_a_damaged_one(tiny_run, run, tmp_path, capsys):
    out, (_, newest) = unfinished(run, tmp_path)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    assert resume(tiny_run, out) == 0
    said = capsys.readouterr().err
    assert f"{newest}: its bytes have changed since it was written; going back" in said and "going on from step 6" in said
    assert losses(out) == losses(run)
    assert (out / "model" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    assert newest.name not in os.listdir(out / "checkpoints")


def test_a_run_whose_checkpoints_are_all_damaged_says_so(tiny_run, run, tmp_path, capsys):
    out, files = unfinished(run, tmp_path)
    for path in files:
        path.write_bytes(path.read_bytes()[:-9])
    log = (out / "log.jsonl").read_bytes()
    assert resume(tiny_run, out) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("minimoe: error: ") and "none of its 2 checkpoints can be read" in said[-1]
    assert len(said) == 3 and (out / "log.jsonl").read_bytes() == log


def test_a_full_disk_leaves_the_checkpoint_before(tiny_run, run, tmp_path):
    """For real: the system refuses to let a file grow, in the middle of a checkpoint."""
    out, (before, newest) = unfinished(run, tmp_path)
    newest.unlink()
    whole, said = before.read_bytes(), tmp_path / "said"
    words = [*tiny_run, "--out", out, "--steps", 8, "--save-every", 1, "--resume"]
    for size in (len(whole) // 2, len(whole) - 100, 4000):
        process = train_child.command(words, said, file_size=size)
        process.join(120)
        *_, error = said.read_text().splitlines()
        assert process.exitcode == 1 and error.startswith("minimoe: error: ") and "Traceback" not in said.read_text()
        assert "the checkpoint before step 7 could not be written" in error
        assert f"{before.name} is as it was; make room and go on with --resume" in error
        assert os.listdir(before.parent) == [before.name] and before.read_bytes() == whole
    train_child.finished(words, said)
    assert losses(out) == losses(run)
    assert (out / "model" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()


def test_a_disk_that_is_full_at_once_or_at_the_log(tiny_run, run, tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    words = [*tiny_run, "--out", out, "--steps", 60, "--save-every", 0]  # the log gets longer than the recipe
    for size, file in ((200, "recipe.json"), ((run / "recipe.json").stat().st_size + 100, "log.jsonl")):
        process = train_child.command(words, said, file_size=size)
        process.join(120)
        *_, error = said.read_text().splitlines()
        assert process.exitcode == 1 and "Traceback" not in said.read_text()
        assert f"{out / file} could not be written (File too large); make room and go on with --resume" in error, error
    cut = losses(out)
    assert 5 < len(cut) < 60
    train_child.finished([*words, "--resume"], said)
    assert losses(out)[: len(cut)] == cut and len(losses(out)) == 60


def test_a_disk_that_is_full_when_the_model_is_written(tiny_run, run, tmp_path):
    out, (_, newest) = unfinished(run, tmp_path)
    model, said = (run / "model" / "model.safetensors").read_bytes(), tmp_path / "said"
    words = [*tiny_run, "--out", out, "--steps", 8, "--save-every", 2, "--resume"]
    process = train_child.command(words, said, file_size=len(model) - 10)
    process.join(120)
    *_, error = said.read_text().splitlines()
    assert process.exitcode == 1 and "Traceback" not in said.read_text()
    assert f"{out / 'model'} could not be written" in error and not (out / "model").exists()
    train_child.finished(words, said)
    assert (out / "model" / "model.safetensors").read_bytes() == model and newest.exists()
