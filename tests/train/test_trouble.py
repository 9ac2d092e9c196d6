"""What goes wrong in a step: memory that runs out, numbers that are none; and that memory does not creep."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import train_child
from core_helpers import small_config
from torch import nn

from minimoe import HybridLM
from minimoe.data import Tokens
from minimoe.interop import load_hf
from minimoe.train import Diverged, OutOfMemory, Training, TrainOptions
from minimoe.train.trouble import first_not_finite, out_of_memory

QUICK = TrainOptions(steps=6, batch=2, length=24, precision="float32")
NOISE = Tokens(np.random.default_rng(0).integers(3, 61, 4000).astype(np.uint16), 4000)


def model(seed=0):
    torch.manual_seed(seed)
    return HybridLM(small_config(num_nextn_predict_layers=1))


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- memory
def large(tiny_run, out, *words):
    """Steps of 8 windows of 512 tokens, whose activations are most of what the process holds."""
    at = tiny_run.index("--batch")
    return [str(word) for word in [*tiny_run[:at], *tiny_run[at + 4 :], "--batch", 8, "--length", 512, "--out", out, *words]]


def room_needed(tiny_run, tmp_path, accumulate):
    """Bytes of address space that two steps take without a limit."""
    said, out = tmp_path / "said", tmp_path / f"in-{accumulate}"
    words = large(tiny_run, out, "--steps", 2, "--accumulate", accumulate)
    process = train_child.start(train_child.memory_of_command, said, words)
    process.join(300)
    assert process.exitcode == 0, said.read_text()
    return int(said.read_text().splitlines()[-1]) * 1024


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_and_goes_on(tiny_run, tmp_path):
    """For real: an address space in which half of the windows fit and not all of them."""
    whole, half = (room_needed(tiny_run, tmp_path, accumulate) for accumulate in (1, 2))
    assert whole - half > 20e6  # there is something to save
    out, said = tmp_path / "limited", tmp_path / "said"
    text = train_child.finished(large(tiny_run, out, "--steps", 2), said, address_space=(whole + half) // 2)
    log, free = log_of(out), log_of(tmp_path / "in-1")
    note = "out of memory with 8 windows at once; from here on 4 at once, 2 times a step"
    assert log[0]["note"] == note and f"step 0: {note}" in text and "note" not in log[1]
    for ours, theirs in zip(log, free, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    limited, unlimited = load_hf(out / "model"), load_hf(tmp_path / "in-1" / "model")
    for (name, one), other in zip(limited.state_dict().items(), unlimited.state_dict().values(), strict=True):
        if "correction_bias" in name:
            assert torch.equal(one, other)  # the pass that failed was not counted
    newest = torch.load(max((out / "checkpoints").iterdir()))
    assert newest["training"]["accumulate"] == 2  # a resumed run does not have to find out again


@pytest.mark.slow
def test_out_of_memory_with_a_single_window_is_one_line(tiny_run, tmp_path):
    said = tmp_path / "said"
    need = room_needed(tiny_run, tmp_path, 8)
    words = large(tiny_run, tmp_path / "out", "--steps", 2)
    at = words.index("--length") + 1
    process = train_child.command([*words[:at], 4096, *words[at + 1 :]], said, address_space=need)
    process.join(300)
    *_, error = said.read_text().splitlines()
    assert process.exitcode == 1 and "Traceback" not in said.read_text()
    assert error.startswith("minimoe: error: out of memory on cpu with a single window of 4096 tokens; choose a shorter length")
    assert not (tmp_path / "out").exists()


def test_only_what_says_so_is_out_of_memory():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50)
    assert out_of_memory(error.value) and out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError())
    with pytest.raises(RuntimeError) as error:
        torch.zeros(2) @ torch.zeros(3)
    assert not out_of_memory(error.value)


def too_much(training, times):
    """Ask for a petabyte in the middle of the first ``times`` passes, as a real pass would that does not fit."""
    left = [times]

    def grab(module, args, output):
        if left[0]:
            left[0] -= 1
            torch.empty(1 << 50)

    return training.model.model.layers[2].register_forward_hook(grab)


def test_the_step_is_done_again_in_smaller_parts():
    runs = [Training(model(), NOISE, dataclasses.replace(QUICK, batch=6, balance=0.01)) for _ in range(2)]
    too_much(runs[1], 2)
    counted = []  # choices of the first router, which the failed passes had reached
    runs[1].optimizer.register_step_pre_hook(lambda *_: counted.append(int(runs[1].balance.counts[0].sum())))
    steps = [[training.step() for _ in range(3)] for training in runs]
    assert steps[1][0].note == "out of memory with 3 windows at once; from here on 2 at once, 3 times a step"
    assert runs[1].accumulate == 3 and steps[1][1].note is None
    assert counted == [6 * 24 * 2] * 3
    for one, other in zip(*steps, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
    for (name, one), other in zip(runs[0].model.named_buffers(), runs[1].model.buffers(), strict=True):
        assert torch.equal(one, other), name


def test_not_even_one_window():
    training = Training(model(), NOISE, QUICK)
    too_much(training, 9)
    before = {name: p.clone() for name, p in training.model.state_dict().items()}
    with pytest.raises(OutOfMemory, match="with a single window of 24 tokens; choose a shorter length"):
        training.step()
    assert training.next_step == 0 and all(torch.equal(p, before[name]) for name, p in training.model.state_dict().items())


def test_another_error_is_not_taken_for_it():
    training = Training(model(), NOISE, QUICK)
    training.model.model.layers[2].register_forward_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        training.step()
    assert training.accumulate == 1


# ---------------------------------------------------------------------- not a number
@pytest.mark.parametrize(
    "weight", ["model.layers.0.mixer.D", "model.layers.1.mixer.experts.up_proj", "lm_head.weight", "mtp.layers.0.eh_proj.weight"]
)
def test_a_weight_that_is_no_number_is_named(weight):
    training = Training(model(), NOISE, QUICK)
    training.step()
    with torch.no_grad():
        training.model.get_parameter(weight).view(-1)[3] = float("nan")
    before = training.model.state_dict()["lm_head.weight"].clone()
    with pytest.raises(Diverged, match=f"step 1: .* first in {re.escape(weight)}; lower the learning rate") as error:
        training.step()
    assert "\n" not in str(error.value) and training.next_step == 1
    assert torch.equal(training.model.lm_head.weight, before) or weight == "lm_head.weight"


def test_a_layer_whose_output_overflows_is_named():
    training = Training(model(), NOISE, QUICK)
    with torch.no_grad():
        training.model.model.layers[3].mixer.k_proj.weight.fill_(3e38)  # finite, and too large for a product
    with pytest.raises(Diverged, match="step 0: .* first in model.layers.3.mixer.k_proj;"):
        training.step()


def test_a_gradient_that_overflows_is_named_before_clipping_spreads_it():
    """The root is finite, its slope at zero is not; the layers after it have sound gradients."""

    class Root(nn.Module):
        def forward(self, x):
            return x.sqrt()

    net = nn.Sequential(nn.Linear(2, 2, bias=False), Root(), nn.Linear(2, 1, bias=False))
    nn.init.zeros_(net[0].weight)
    x = torch.ones(1, 2)
    net(x).sum().backward()
    assert not net[0].weight.grad.isfinite().all() and net[2].weight.grad.isfinite().all()
    assert first_not_finite(net, lambda: net(x)) == "the gradient of 0.weight"


def test_gradients_whose_norm_alone_overflows_are_named():
    training = Training(model(), NOISE, dataclasses.replace(QUICK, mtp_weight=1e30))
    with pytest.raises(Diverged, match="gradient norm inf, first in the gradient of "):
        training.step()


def test_the_watching_leaves_no_hooks():
    training = Training(model(), NOISE, QUICK)
    before = sum(len(module._forward_hooks) for module in training.model.modules())
    with torch.no_grad():
        training.model.model.layers[0].mixer.D[0] = float("inf")
    with pytest.raises(Diverged):
        training.step()
    assert sum(len(module._forward_hooks) for module in training.model.modules()) == before


def test_the_command_names_step_layer_and_the_last_good_checkpoint(tiny_run, tmp_path, capsys):
    """A learning rate that no one would choose: some steps later the numbers are gone."""
    from minimoe import cli

    out = tmp_path / "out"
    words = [*tiny_run, "--out", str(out), "--steps", "40", "--save-every", "1", "--lr", "40"]
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    found = re.search(r"step (\d+): loss \S+ and gradient norm \S+, first in (\S+|the gradient of \S+); lower the learning rate "
                      r".*; the last good checkpoint is (\S+); (\d+) of 40 steps were done", error)  # fmt: skip
    assert found and error.count("\n") == 1, error
    step, place, path, done = found.groups()
    assert step == done == str(len(log_of(out)))
    assert place.removeprefix("the gradient of ") in dict(model_names())
    content = torch.load(path)
    assert content["step"] == int(step) - 1  # the one of the failing step itself led there
    assert all(tensor.isfinite().all() for tensor in content["training"]["model"].values())
    assert load_hf(out / "model").lm_head.weight.isfinite().all()


def test_without_an_earlier_checkpoint_the_command_says_so(tiny_run, tmp_path, capsys):
    from minimoe import cli

    words = [*tiny_run, "--out", str(tmp_path / "out"), "--steps", "40", "--save-every", "1", "--lr", "1e30"]
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert "minimoe: error: step 1: loss nan" in error and "there is no good checkpoint yet; 1 of 40 steps were done" in error


def model_names():
    from minimoe import HybridConfig

    ours = HybridLM(HybridConfig.preset("tiny"), device="meta")
    return [*ours.named_modules(), *ours.named_parameters(), *ours.named_buffers()]


# ---------------------------------------------------------------------- memory that must not creep
@pytest.mark.slow
def test_memory_is_flat_over_two_hundred_steps(tmp_path):
    said = tmp_path / "said"
    process = train_child.start(train_child.memory_of_steps, said, (20, 200))
    process.join(300)
    assert process.exitcode == 0, said.read_text()
    after_20, after_200 = map(int, said.read_text().split())
    assert after_200 < 1.02 * after_20
