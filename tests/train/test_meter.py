"""Speed, MFU and memory of a run."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from core_helpers import small_config

from minimoe import HybridLM, cli
from minimoe.bench.device import MatmulRate
from minimoe.data import Tokens
from minimoe.sizing import flops_per_token
from minimoe.train import Meter, Step, TrainError, Training, TrainOptions
from minimoe.train.meter import matmul_peak, peak_memory
from minimoe.train.world import World

MB = 1_000_000


def training(device="cpu", **options) -> Training:
    tokens = Tokens((np.arange(2000) % 7 + 3).astype(np.uint16), 2000)
    model = HybridLM(small_config(num_nextn_predict_layers=1), device=device)
    return Training(model, tokens, TrainOptions(**{"steps": 4, "batch": 2, "length": 24} | options))


def steps_of(seconds, first=0, before=0.0):
    """Steps that took so many seconds each."""
    ends = before + np.cumsum(seconds)
    return [Step(first + n, 1.0, 48 * (first + n + 1), float(end), 1e-3, 1.0) for n, end in enumerate(ends)]


def test_the_rate_is_the_median_of_the_last_steps():
    meter = Meter(training(), last=3)
    assert meter.tokens_per_second is None and meter.mfu is None
    for step in steps_of([9.0, 1.0, 2.0, 4.0]):
        meter(step)
    assert meter.tokens_per_second == pytest.approx(48 / 2.0)


def test_a_continued_run_counts_its_own_steps():
    run = training()
    run.next_step, run.seconds = 100, 500.0
    meter = Meter(run)
    for step in steps_of([2.0, 2.0], first=100, before=500.0):
        meter(step)
    assert meter.tokens_per_second == pytest.approx(48 / 2.0)


def test_mfu_is_the_share_of_the_peak():
    run = training()
    meter = Meter(run, MatmulRate("float32", 1e9, 512))
    (step,) = steps_of([0.5])
    meter(step)
    flops = flops_per_token(run.model.config, 24).training
    assert meter.mfu == pytest.approx(48 / 0.5 * flops / 1e9)
    run.world = type("Two", (World,), {"size": 2})()
    two = Meter(run, meter.peak)
    two(step)
    assert two.mfu == pytest.approx(meter.mfu / 2)  # the same tokens, with twice as much to multiply with
    without = Meter(training(mtp_weight=0))
    assert without.flops_per_token == flops_per_token(run.model.config, 24, mtp=False).training < flops


def test_more_than_the_peak_is_refused():
    run = training()
    meter = Meter(run, MatmulRate("float32", 1e6, 512))
    meter(steps_of([0.01])[0])
    with pytest.raises(TrainError, match="of the measured peak cannot be.*too low.*too many") as error:
        meter.mfu  # noqa: B018
    assert "\n" not in str(error.value)


def test_a_dtype_that_the_device_cannot_multiply_is_said():
    meter = Meter(training(), MatmulRate("bfloat16", None, None, "not implemented for 'BFloat16'"))
    meter(steps_of([0.5])[0])
    with pytest.raises(TrainError, match="cpu multiplies no bfloat16 matrices"):
        meter.mfu  # noqa: B018


def test_a_real_run_stays_below_the_peak_of_its_dtype():
    run = training()
    meter = Meter(run, matmul_peak(run, 0.2))
    started = time.perf_counter()
    for _ in range(4):
        meter(run.step())
    took = time.perf_counter() - started
    assert meter.peak.dtype == "float32"  # a model this narrow is not trained in bfloat16 by itself
    assert 0 < meter.mfu < 1
    assert meter.tokens_per_second > 4 * 48 / took / 2  # the median of four against their mean and what lies between
    assert matmul_peak(training(precision="bfloat16"), 0.1).dtype == "bfloat16"


def test_peak_memory_remembers_what_has_gone():
    """In a process of its own, so that nothing before it has set a higher mark."""
    code = (
        "import numpy as np, torch\nfrom minimoe.train.meter import peak_memory\n"
        "most = lambda: peak_memory(torch.device('cpu'))['peak_memory_bytes']\n"
        "before = most(); a = np.ones(400_000_000, np.uint8); during = most(); del a; print(before, during, most())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, during, after = map(int, out.split())
    assert 350 * MB < during - before < 450 * MB
    assert after > during - MB  # the kernel's own count is not exact to the page
    assert 50 * MB < before < 2000 * MB  # Python with torch, in bytes and not in pages or kilobytes


@pytest.mark.gpu
def test_peak_memory_on_cuda_begins_with_the_meter():
    device = torch.device("cuda")
    big = torch.empty(400 * MB, dtype=torch.uint8, device=device)
    del big
    run = training(device)
    meter = Meter(run)
    meter(run.step())
    found = meter.result()
    assert 0 < found["peak_memory_bytes"] < 100 * MB < 400 * MB <= found["peak_reserved_bytes"]
    assert found["peak_memory_bytes"] == peak_memory(device)["peak_memory_bytes"]


def test_the_command_says_how_fast_it_was(text, tmp_path, capsys):
    words = ["train", "--preset", "tiny", "--batch", "2", "--length", "32", "--data", str(text)]
    assert cli.main([*words, "--steps", "4", "--mfu", "--json", "--out", str(tmp_path / "a")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "a" / "recipe.json").read_text())["result"]
    assert 0 < result["mfu"] < 1 and result["peak_memory_bytes"] > 100 * MB
    log = [json.loads(line)["seconds"] for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert result["tokens_per_second"] == pytest.approx(64 / np.median(np.diff([0.0, *log])), rel=1e-2)
    assert cli.main([*words, "--steps", "1", "--out", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "tokens/s" in said and "bytes of memory at most" in said and "peak" not in said


def test_an_mfu_that_cannot_be_spoils_nothing(text, tmp_path, capsys, monkeypatch):
    from minimoe.train import meter

    monkeypatch.setattr(meter, "measure_matmul", lambda *_: MatmulRate("float32", 1e3, 256))
    words = ["train", "--preset", "tiny", "--batch", "2", "--length", "32", "--data", str(text), "--steps", "2", "--mfu", "--json"]
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["mfu"] is None and json.loads(out)["validation_loss"] > 0
    assert "cannot be" in error and (tmp_path / "run" / "model" / "model.safetensors").is_file()
