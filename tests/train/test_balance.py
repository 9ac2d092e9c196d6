"""The routers' biases: moved by counts of the training steps, toward balance, and by nothing else."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from core_helpers import small_config

from minimoe import HybridLM
from minimoe.data import Tokens
from minimoe.layers.moe import Router
from minimoe.train import BiasUpdate, Training, TrainOptions, evaluate, train
from minimoe.train.balance import balance_loss

QUICK = TrainOptions(steps=6, batch=4, length=24, precision="float32")
NOISE = Tokens(np.random.default_rng(0).integers(3, 61, 4000).astype(np.uint16), 4000)
EXPERTS, TOP = 6, 2


def model(seed=0, **changes):
    torch.manual_seed(seed)
    return HybridLM(small_config(num_nextn_predict_layers=1, **changes))


def routers(ours):
    return [module for module in ours.modules() if isinstance(module, Router)]


def biases(ours):
    return torch.stack([router.e_score_correction_bias for router in routers(ours)])


@torch.no_grad()
def peaks(ours):
    """Each trunk router's busiest expert over the mean, on text that the steps do not share."""
    seen = []
    hooks = [router.register_forward_hook(lambda _, args, out: seen.append(out[0])) for router in routers(ours.model)]
    ours(torch.randint(3, 61, (8, 64), generator=torch.Generator().manual_seed(5)))
    [hook.remove() for hook in hooks]
    return [float(torch.bincount(experts.flatten(), minlength=EXPERTS).max() / (experts.numel() / EXPERTS)) for experts in seen]


def collapsed(**changes):
    """Two experts are preferred by so much that they get everything."""
    ours = model(**changes)
    for router in routers(ours):
        router.e_score_correction_bias[:TOP] = 0.1
    assert peaks(ours) == [EXPERTS / TOP] * 2
    return ours


def test_a_collapsed_router_spreads_its_load():
    ours = collapsed()
    train(ours, NOISE, dataclasses.replace(QUICK, steps=45, balance=0.003))
    assert max(peaks(ours)) < 1.7  # 3 is all to two experts, 1 is even


def test_without_balance_it_stays_collapsed():
    ours = collapsed()
    before = biases(ours).clone()
    train(ours, NOISE, dataclasses.replace(QUICK, steps=40, balance=0))
    assert min(peaks(ours)) > 2.4 and torch.equal(biases(ours), before)  # of 3; what the weights have learned moves a little


def test_the_bias_moves_by_the_rate_against_the_load():
    ours = model()
    balance = BiasUpdate(ours, rate=0.125)
    balance.counts[0] += torch.tensor([7.0, 1, 4, 4, 4, 4])
    balance.counts[1] += torch.tensor([12.0, 0, 0, 0, 0, 0])
    assert balance.step()[:2] == [7 / 4, 6.0]
    assert biases(ours)[0].tolist() == [-0.125, 0.125, 0, 0, 0, 0]  # those at the mean stay
    assert biases(ours)[1].tolist() == [-0.125] + [0.125] * 5
    assert torch.equal(biases(ours)[2:], torch.zeros_like(biases(ours)[2:]))  # nothing counted, nothing moved
    assert all(not counts.any() for counts in balance.counts)
    balance.close()


def test_a_step_counts_each_token_s_choices_once():
    ours = model()
    training = Training(ours, NOISE, dataclasses.replace(QUICK, balance=1.0))
    choices = [[] for _ in training.balance.routers]
    for seen, router in zip(choices, training.balance.routers):
        router.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out[0].flatten()))
    training.step()
    counts = torch.stack([torch.bincount(torch.cat(seen), minlength=EXPERTS) for seen in choices]).float()
    assert len(choices) == 3 and (counts.sum(1) == 4 * 24 * TOP).all()  # two in the trunk, one in the MTP block
    assert torch.equal(biases(ours), torch.sign(counts.mean(1, keepdim=True) - counts))


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"accumulate": 4}, {"recompute": True}])
def test_parts_and_recomputing_count_alike(changes):
    runs = [model(), model()]
    train(runs[0], NOISE, dataclasses.replace(QUICK, balance=0.01))
    train(runs[1], NOISE, dataclasses.replace(QUICK, balance=0.01, **changes))
    assert torch.equal(biases(runs[0]), biases(runs[1])) and biases(runs[0]).any()


def test_an_evaluation_in_between_does_not_count():
    runs = [model(), model()]
    for ours, interrupted in zip(runs, (False, True)):
        training = Training(ours, NOISE, dataclasses.replace(QUICK, balance=0.01))
        for _ in range(4):
            if interrupted:
                evaluate(ours, NOISE, batch=4, length=24, limit=3)
                assert all(not counts.any() for counts in training.balance.counts)
            training.step()
    for one, other in zip(runs[0].state_dict().values(), runs[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_counts_keep_no_graph_alive():
    training = Training(model(), NOISE, QUICK)
    kept = []
    router = training.balance.routers[0]
    router.register_forward_hook(lambda _, args, out: kept.append(weakref.ref(out[1])))
    training.step()
    assert all(counts.grad_fn is None and not counts.requires_grad for counts in training.balance.counts)
    gc.collect()
    assert kept and all(ref() is None for ref in kept)  # the weights of the choices, which have a graph, are gone


def test_steps_leave_no_tensors_behind():
    training = Training(model(), NOISE, QUICK)

    def alive():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    training.step()
    after_one = alive()
    for _ in range(4):
        training.step()
    assert alive() == after_one


def test_closed_it_counts_no_more():
    training = Training(model(), NOISE, QUICK)
    training.close()
    training.model.loss(*training.batches(0))
    assert all(not counts.any() for counts in training.balance.counts)


def test_the_balance_loss_is_1_at_balance_and_E_over_K_at_worst():
    even_BLK = (torch.arange(12).view(1, 6, 2) % EXPERTS).expand(3, 6, 2)
    assert balance_loss(even_BLK, torch.rand(3, 1, EXPERTS).expand(3, 6, EXPERTS)).item() == pytest.approx(1)
    same_BLK = torch.tensor([0, 1]).expand(3, 6, 2)
    worst_BLE = torch.tensor([0.9, 0.4, 0, 0, 0, 0]).expand(3, 6, EXPERTS)
    assert balance_loss(same_BLK, worst_BLE).item() == pytest.approx(EXPERTS / TOP)


def test_the_balance_loss_is_of_each_sequence_and_pulls_scores_toward_idle_experts():
    # two sequences that use two experts each, others than the other one: together they are more even than alone
    chosen_BLK = torch.tensor([[[0, 1]], [[2, 3]]]).expand(2, 5, 2)
    scores_BLE = torch.full((2, 5, EXPERTS), 0.5, requires_grad=True)
    loss = balance_loss(chosen_BLK, scores_BLE)
    loss.backward()
    assert loss.item() == pytest.approx(1)  # even scores, whatever is chosen
    assert (scores_BLE.grad[0, :, :2] > 0).all() and (scores_BLE.grad[0, :, 2:] < 0).all()
    assert (scores_BLE.grad[1, :, 2:4] > 0).all() and (scores_BLE.grad[1, :, [0, 1, 4, 5]] < 0).all()


def test_the_balance_loss_enters_the_gradient_with_its_weight_and_leaves_the_logged_loss_alone():
    runs = {weight: Training(model(), NOISE, dataclasses.replace(QUICK, balance_loss=weight, clip=1e9)) for weight in (0, 1, 3)}
    logged = {weight: run.step().loss for weight, run in runs.items()}
    assert logged[0] == logged[1] == logged[3]
    grad = {weight: torch.stack([router.weight.grad for router in routers(run.model)]) for weight, run in runs.items()}
    assert (grad[1] - grad[0]).abs().max() > 1e-5
    torch.testing.assert_close(grad[3] - grad[0], 3 * (grad[1] - grad[0]), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"recompute": True}])
def test_the_balance_loss_is_the_same_in_parts_and_recomputed(changes):
    options = dataclasses.replace(QUICK, steps=1, balance_loss=1.0, documents=False)
    whole, other = (Training(model(), NOISE, dataclasses.replace(options, **more)) for more in ({}, changes))
    for run in (whole, other):
        run.step()
    for one, two in zip(routers(whole.model), routers(other.model)):
        torch.testing.assert_close(one.weight.grad, two.weight.grad, rtol=1e-4, atol=1e-8)


def test_an_expert_whose_scores_have_sunk_is_brought_back():
    def lowest(weight):
        ours = model()
        for router in routers(ours.model):
            with torch.no_grad():
                router.weight *= 12  # scores near 0 and near 1, and an expert's sink where they stay
        options = dataclasses.replace(QUICK, steps=40, balance=0.0, balance_loss=weight, lr=5e-3)
        seen = []
        train(ours, NOISE, options)
        hooks = [router.register_forward_hook(lambda _, args, out: seen.append(out[2].mean(0).min())) for router in routers(ours.model)]
        with torch.no_grad():
            ours(torch.randint(3, 61, (8, 64), generator=torch.Generator().manual_seed(5)))
        [hook.remove() for hook in hooks]
        return min(map(float, seen))

    assert lowest(1.0) > lowest(0.0) + 0.1


def test_a_model_without_experts_has_no_balance_loss():
    torch.manual_seed(0)
    train(HybridLM(small_config("M*")), NOISE, dataclasses.replace(QUICK, steps=1, balance_loss=1.0))
