"""The training loop: it learns, repeats itself, follows its schedule, and stops with one line."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from core_helpers import error, scramble, small_config

from minimoe import HybridConfig, HybridLM
from minimoe.data import Tokens
from minimoe.data.batches import split_documents
from minimoe.train import (
    Diverged,
    TrainError,
    Training,
    TrainOptions,
    bits_per_byte,
    evaluate,
    train,
    warmup_stable_decay,
)
from minimoe.train.optimizers import adamw

QUICK = TrainOptions(steps=6, batch=2, length=24, precision="float32")


def periodic(period: int = 7, count: int = 4000) -> Tokens:
    return Tokens((np.arange(count) % period + 3).astype(np.uint16), count)


def model(seed: int = 0, **changes) -> HybridLM:
    torch.manual_seed(seed)
    return HybridLM(small_config(num_nextn_predict_layers=1, **changes))


def test_it_learns_what_can_be_learned():
    ours = model()
    log = train(ours, periodic(), dataclasses.replace(QUICK, steps=80, lr=5e-3))
    assert log[0].loss == pytest.approx(math.log(61), abs=0.2)  # knows nothing at first
    assert log[-1].loss < 0.3 and log[-1].mtp_loss < 0.5
    assert evaluate(ours, periodic(), batch=2, length=24, limit=4) < 0.2


def test_tokens_without_order_are_not_learned():
    noise = Tokens(np.random.default_rng(0).integers(0, 61, 4000).astype(np.uint16), 1)
    log = train(model(), noise, dataclasses.replace(QUICK, steps=40))
    assert sum(step.loss for step in log[-10:]) / 10 > math.log(61) - 0.1


def test_the_same_seed_gives_the_same_run_and_another_another():
    runs = [train(model(), periodic(50), dataclasses.replace(QUICK, seed=seed)) for seed in (0, 0, 1)]
    losses = [[step.loss for step in run] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_the_log_counts_from_the_start():
    seen = []
    log = train(model(), periodic(), QUICK, on_step=seen.append)
    assert seen == log and [step.step for step in log] == list(range(6))
    assert [step.tokens for step in log] == [48 * n for n in range(1, 7)]
    assert all(a.seconds < b.seconds for a, b in zip(log, log[1:]))
    assert log[0].to_dict().keys() == {"step", "loss", "tokens", "seconds", "lr", "grad_norm", "mtp_loss"}


def test_without_mtp_weight_the_block_is_left_alone():
    ours, before = model(), model()
    log = train(ours, periodic(), dataclasses.replace(QUICK, mtp_weight=0, weight_decay=0))
    assert log[0].mtp_loss is None and "mtp_loss" not in log[0].to_dict()
    same = [torch.equal(a, b) for a, b in zip(ours.mtp.parameters(), before.mtp.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(ours.lm_head.weight, before.lm_head.weight)


def test_with_it_the_block_learns_too():
    ours, before = model(), model()
    train(ours, periodic(), QUICK)
    weight = "layers.0.eh_proj.weight"
    assert not torch.equal(ours.mtp.get_parameter(weight), before.mtp.get_parameter(weight))


def test_gradients_are_clipped(monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    log = train(model(), periodic(), dataclasses.replace(QUICK, clip=0.01))
    assert max(norms) <= 0.0101 and min(entry.grad_norm for entry in log) > 0.01


def test_only_matrices_decay():
    ours = model()
    decayed, others = adamw(ours, 1e-3).param_groups
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert len(decayed["params"]) + len(others["params"]) == len(list(ours.parameters()))
    kept = {id(p) for p in others["params"]}
    names = {name.rsplit(".", 2)[-1] for name, p in ours.named_parameters() if id(p) in kept}
    assert names == {"weight", "bias", "A_log", "dt_bias", "D"}
    assert all(p.dim() <= 1 for p in others["params"])


def test_schedule_rises_stays_and_falls():
    factors = [warmup_stable_decay(s, 100, 0.1, 0.3) for s in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1 and set(factors[10:70]) == {1.0}
    assert all(a > b for a, b in zip(factors[70:], factors[71:])) and 0 < factors[99] < 0.02
    # a quarter of the way down, minus the square root has lost half
    assert factors[70 + 7] == pytest.approx(1 - math.sqrt(8 / 31))
    assert [warmup_stable_decay(s, 5, 0, 0) for s in range(5)] == [1.0] * 5
    assert all(f > 0 for n in range(1, 40) for f in [warmup_stable_decay(s, n) for s in range(n)])


def test_the_loop_follows_the_schedule():
    log = train(model(), periodic(), dataclasses.replace(QUICK, lr=1e-3, warmup=0.5, decay=0.5))
    assert [step.lr for step in log] == [1e-3 * warmup_stable_decay(s, 6, 0.5, 0.5) for s in range(6)]


def test_bfloat16_is_close_to_float32():
    runs = [train(model(), periodic(), dataclasses.replace(QUICK, precision=p)) for p in ("float32", "bfloat16")]
    differences = [abs(a.loss - b.loss) for a, b in zip(*runs)]
    assert 0 < max(differences) < 0.05  # 0 would mean that nothing was in bfloat16


def test_auto_leaves_narrow_models_in_float32_on_a_cpu():
    from minimoe.train.precision import autocast

    cpu = torch.device("cpu")
    assert not autocast(cpu, "auto", 128)._enabled and autocast(cpu, "bfloat16", 128)._enabled
    assert autocast(cpu, "auto", 512)._enabled == torch.cpu._is_amx_tile_supported()


def test_weights_stay_float32_in_bfloat16_training():
    ours = model()
    train(ours, periodic(), dataclasses.replace(QUICK, precision="bfloat16"))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


def test_a_loss_that_is_no_number_ends_the_run_before_it_spoils_the_weights():
    ours = model()
    with torch.no_grad():
        ours.model.layers[0].mixer.D[0] = float("nan")
    before = ours.lm_head.weight.clone()
    with pytest.raises(Diverged, match="step 0: loss nan .* first in model.layers.0.mixer.D; lower the learning rate") as error:
        train(ours, periodic(), QUICK)
    assert "\n" not in str(error.value) and torch.equal(ours.lm_head.weight, before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"batch": 0}, {"length": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"clip": -1.0},
        {"accumulate": 0}, {"accumulate": 3}, {"balance": -1e-3}, {"seed": -1}, {"balance": float("nan")},
        {"weight_decay": -0.1}, {"mtp_weight": -1}, {"warmup": 0.8, "decay": 0.3}, {"precision": "int4"},
    ],
)  # fmt: skip
def test_options_are_checked(wrong):
    with pytest.raises(TrainError) as error:
        TrainOptions(**wrong)
    assert next(iter(wrong)) in str(error.value) and "\n" not in str(error.value)


END = 2


def with_ends(windows: int = 60, length: int = 24) -> Tokens:
    """Random tokens in documents of random lengths, some of one token."""
    random = np.random.default_rng(1)
    ids = random.integers(3, 61, windows * length).astype(np.uint16)
    ids[random.random(len(ids)) < 0.15] = END
    return Tokens(ids, len(ids))


def double(**options) -> Training:
    """A run in float64, in which two orders of summing agree to 1e-12."""
    torch.manual_seed(0)
    ours = HybridLM(small_config(num_nextn_predict_layers=1, eos_token_id=END), dtype=torch.float64)
    scramble(ours)
    return Training(ours, with_ends(), dataclasses.replace(QUICK, **({"batch": 8, "balance": 0.0} | options)))


def gradient(training: Training) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and gradient of step 0, without taking it."""
    ids, targets = training.batches(0)
    segments, targets = split_documents(ids, targets, END)
    losses = list(training._gradient((ids, targets, segments)))
    assert (targets == -100).any() and len({int(n) for n in (targets != -100).sum(1)}) > 2  # the parts weigh differently
    return losses, {name: p.grad.clone() for name, p in training.model.named_parameters()}


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_of_a_batch_give_the_loss_and_the_gradient_of_the_whole(parts):
    (losses, whole), (other_losses, other) = gradient(double()), gradient(double(accumulate=parts))
    assert other_losses[:2] == pytest.approx(losses[:2], rel=1e-12)
    assert max(error(other[name], whole[name]) for name in whole) < 1e-11
    assert all(g.any() for g in whole.values())


def saved_bytes(training: Training) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that one pass keeps for its way back, and the gradient."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr(), tensor.shape] = tensor.nbytes
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in training.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, grads = gradient(training)
    return sum(size for (at, _), size in kept.items() if at not in weights), grads


def test_recomputing_gives_the_same_gradient_from_less_memory():
    (much, plain), (little, again) = saved_bytes(double()), saved_bytes(double(recompute=True))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert little < 0.5 * much


def test_recomputing_trains_the_same_weights():
    runs = [model(), model()]
    for ours, recompute in zip(runs, (False, True)):
        train(ours, periodic(), dataclasses.replace(QUICK, recompute=recompute))
    assert all(torch.equal(a, b) for a, b in zip(runs[0].parameters(), runs[1].parameters(), strict=True))
    assert not runs[1].model.recompute  # the model is as any other afterwards


def test_packed_documents_are_trained_on_as_if_each_were_alone():
    """Loss and gradient of the windows are those of their documents, weighted by the tokens that each was asked for."""
    training = double()
    losses, packed = gradient(training)
    ids, targets = training.batches(0)
    segments, targets = split_documents(ids, targets, END)
    total, count, sums = 0.0, int((targets != -100).sum()), [0.0, 0.0]
    training.model.zero_grad()
    for row in range(len(ids)):
        for number in segments[row].unique():
            here = segments[row] == number
            asked = int((targets[row, here] != -100).sum())
            if asked:  # a document of its end alone asks for nothing
                both = training.model.losses(ids[row, here][None], targets[row, here][None])
                sums = [sum_ + loss.item() * asked / count for sum_, loss in zip(sums, both)]
                total = total + (both[0] + training.options.mtp_weight * both[1]) * asked / count
    total.backward()
    assert losses[:2] == pytest.approx(sums, rel=1e-12)
    for name, p in training.model.named_parameters():
        assert error(packed[name], p.grad) < 1e-11, name


def test_one_text_a_window_is_another_thing():
    with_documents, without = (double(documents=documents) for documents in (True, False))
    assert with_documents.step().loss != pytest.approx(without.step().loss, rel=1e-3)


def test_a_run_that_is_stopped_and_restored_is_the_same_run():
    """In one process: what state() gives is all that later steps depend on, whatever happened between."""
    whole = double(steps=8, balance=0.01, precision="float32")
    steps = [dataclasses.replace(whole.step(), seconds=0) for _ in range(8)]
    first = double(steps=8, balance=0.01, precision="float32")
    [first.step() for _ in range(5)]
    state = torch.load(saved(first.state()))
    second = double(steps=8, balance=0.01, precision="float32")
    scramble(second.model, seed=9)
    torch.rand(7)
    second.restore(state)
    assert [dataclasses.replace(second.step(), seconds=0) for _ in range(3)] == steps[5:]
    assert second.seconds > state["seconds"] > 0
    for one, other in zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def saved(state):
    """Through a file, as a checkpoint does it."""
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"lr": 1e-3}, "options lr=0.002, and now it is 0.001"), ({"length": 12}, "length=24"), ({"seed": 5}, "seed=0")],
)
def test_a_state_of_other_options_is_refused_before_anything_changes(changes, words):
    state, ours = double().state(), double(**changes)
    scramble(ours.model, seed=9)
    before = {name: p.clone() for name, p in ours.model.state_dict().items()}
    with pytest.raises(TrainError, match=words):
        ours.restore(state)
    assert all(torch.equal(p, before[name]) for name, p in ours.model.state_dict().items()) and ours.next_step == 0


def test_a_state_of_another_model_is_refused():
    other = Training(model(), with_ends(), dataclasses.replace(QUICK, batch=8, balance=0.0))
    with pytest.raises(TrainError, match="config eos_token_id=.*; give the same, or choose a new directory"):
        double().restore(other.state())


def test_what_does_not_change_the_arithmetic_may_change():
    state = double(steps=6).state()
    ours = double(steps=9, decay=0.1, recompute=True, accumulate=2)
    ours.restore(state)
    assert ours.accumulate == 2
    state["accumulate"] = 4  # of a run that had run out of memory
    ours.restore(state)
    assert ours.accumulate == 4


def test_evaluation_is_the_mean_over_all_windows():
    ours, tokens = model(), Tokens(np.random.default_rng(0).integers(0, 61, 400).astype(np.uint16), 1000)
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    windows = [ours.loss(ids[None, s : s + 24], ids[None, s + 1 : s + 25]).item() for s in range(0, 376, 24)]
    assert evaluate(ours, tokens, batch=3, length=24) == pytest.approx(sum(windows) / len(windows), rel=1e-5)
    # uniform over 61 tokens, 2.5 bytes a token
    assert bits_per_byte(math.log(61), tokens) == pytest.approx(math.log2(61) / 2.5)


def test_every_preset_trains_a_step():
    for name in ("tiny", "small", "awkward"):
        torch.manual_seed(0)
        ours = HybridLM(HybridConfig.preset(name))
        log = train(ours, periodic(), dataclasses.replace(QUICK, steps=1))
        assert log[0].loss == pytest.approx(math.log(ours.config.vocab_size), rel=0.1)
