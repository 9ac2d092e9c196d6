"""Event files, read back by TensorBoard's own reader."""

import json
import sys

import pytest
from core_helpers import small_config

from minimoe import HybridLM, cli
from minimoe.train import Meter, TensorBoard, TrainError, Training, TrainOptions

SIZES = ["--preset", "tiny", "--batch", "2", "--length", "32", "--save-every", "3", "--tensorboard"]


def curves(folder):
    """{tag: [(step, value), ...]} as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def raw_points(folder, tag):
    """How many points of a tag the files hold, whether or not they are void by now."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    events = [event for path in folder.iterdir() for event in EventFileLoader(str(path)).Load()]
    return sum(value.tag == tag for event in events if event.HasField("summary") for value in event.summary.value)


def test_the_curves_are_those_of_the_log(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", *SIZES, "--steps", "5", "--data", str(text), "--out", str(out)]) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = curves(out / "tensorboard")
    for name in ("loss", "mtp_loss", "lr", "grad_norm"):
        assert [step for step, _ in found[name]] == list(range(5))
        assert [value for _, value in found[name]] == pytest.approx([line[name] for line in log], rel=1e-5)
    assert all(value > 0 for _, value in found["tokens_per_second"])
    peaks = {name: points for name, points in found.items() if name.startswith("expert_load/")}
    assert len(peaks) == 3 and "expert_load/mtp.layers.1.mixer.gate" in peaks
    # between balance and all tokens choosing the same 2 of 8 experts
    assert all(1 <= value <= 4 for points in peaks.values() for _, value in points)


def test_a_continued_run_has_one_point_a_step(text, tmp_path, capsys, monkeypatch):
    """Broken off after the checkpoint of step 3, so that steps 3 and 4 are done twice."""
    out, real = tmp_path / "run", TensorBoard.__call__
    words = ["train", *SIZES, "--steps", "8", "--data", str(text), "--out", str(out)]

    def crash(board, step):
        real(board, step)
        if step.step == 4:
            raise RuntimeError("the power went")

    monkeypatch.setattr(TensorBoard, "__call__", crash)
    with pytest.raises(RuntimeError, match="the power went"):
        cli.main(words)
    assert [step for step, _ in curves(out / "tensorboard")["loss"]] == list(range(5))
    monkeypatch.undo()
    assert cli.main([*words, "--resume"]) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = curves(out / "tensorboard")
    assert raw_points(out / "tensorboard", "loss") == 10  # two of them void
    for name in ("loss", "lr", "expert_load/model.layers.1.mixer.gate"):
        assert [step for step, _ in found[name]] == list(range(8))
    assert [value for _, value in found["loss"]] == pytest.approx([line["loss"] for line in log], rel=1e-5)


def training(tmp_path, **options):
    import numpy as np

    from minimoe.data import Tokens

    tokens = Tokens((np.arange(2000) % 7 + 3).astype(np.uint16), 2000)
    model = HybridLM(small_config(num_nextn_predict_layers=1))
    return Training(model, tokens, TrainOptions(steps=3, batch=2, length=24, **options))


def test_what_was_not_measured_has_no_curve(tmp_path):
    run = training(tmp_path, mtp_weight=0)
    meter = Meter(run)
    board = TensorBoard(tmp_path / "board", run, meter)
    assert not (tmp_path / "board").exists()  # a run that fails before its first step leaves nothing
    for _ in range(3):
        step = run.step()
        meter(step)
        board(step)
    board.close()
    found = curves(tmp_path / "board")
    assert "loss" in found and "mtp_loss" not in found
    assert not any("mtp" in name for name in found)  # its router saw no token


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "board").write_text("in the way")
    run = training(tmp_path)
    board = TensorBoard(tmp_path / "board", run, Meter(run))
    with pytest.raises(TrainError, match=r"board could not be written \(.*go on without --tensorboard") as error:
        board(run.step())
    assert "\n" not in str(error.value)
    board.close()


def test_without_the_package_nothing_is_begun(text, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard" or name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # what Python itself does for a package that is not there
    assert cli.main(["train", *SIZES, "--data", str(text), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "pip install tensorboard" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
