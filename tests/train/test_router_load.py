"""Which experts are chosen: counted as a router chooses, and summed up as known cases say."""

import math

import pytest
import torch
from core_helpers import random_ids, small_model

from minimoe.layers.moe import route
from minimoe.train.router_load import counted_choices, load

IDS = random_ids(61, 3, 20)


@torch.no_grad()
def test_every_choice_is_counted_once():
    model = small_model("MEM*E", num_nextn_predict_layers=1)
    inputs = {}
    gate = model.model.layers[1].mixer.gate
    hook = gate.register_forward_pre_hook(lambda _, args: inputs.setdefault("x_TD", args[0]))
    with counted_choices(model) as counts:
        model(IDS)
        model(IDS)
    hook.remove()
    assert list(counts) == ["model.layers.1.mixer", "model.layers.4.mixer", "mtp.layers.1.mixer"]
    assert [int(c.sum()) for c in counts.values()] == [2 * 60 * 2, 2 * 60 * 2, 0], "two choices a token; the block did not run"
    chosen_TK = route(inputs["x_TD"], gate.weight, gate.e_score_correction_bias, 2, 1.0)[0]
    for expert in range(6):
        assert counts["model.layers.1.mixer"][expert] == 2 * int((chosen_TK == expert).sum())


def test_the_mtp_block_is_counted_too_and_nothing_afterwards():
    model = small_model("MEM*E", num_nextn_predict_layers=1)
    with counted_choices(model) as counts, torch.no_grad():
        model.losses(IDS, IDS)
    assert int(counts["mtp.layers.1.mixer"].sum()) == 120
    with torch.no_grad():
        model.losses(IDS, IDS)
    assert int(counts["mtp.layers.1.mixer"].sum()) == 120


def test_known_loads():
    even = load(torch.full((8,), 50))
    assert even.peak == 1 and even.entropy == pytest.approx(3) and even.experts_at_work == pytest.approx(8)
    one = load(torch.tensor([0, 7, 0, 0]))
    assert one.shares == [0, 1, 0, 0] and one.peak == 4 and one.entropy == 0 and one.experts_at_work == 1
    uneven = load(torch.tensor([1, 3]))
    assert uneven.peak == 1.5 and uneven.entropy == pytest.approx(2 - 0.75 * math.log2(3))


def test_a_bias_shows():
    """An expert that the correction bias favours is chosen by every token."""
    model = small_model("MEM*E")
    model.model.layers[1].mixer.gate.e_score_correction_bias[3] = 10.0
    with counted_choices(model) as counts, torch.no_grad():
        model(IDS)
    favoured = load(counts["model.layers.1.mixer"])
    assert favoured.shares[3] == 0.5 and favoured.peak == 3  # one of the two choices, of six experts


def test_an_unused_router_is_one_line():
    with pytest.raises(ValueError, match="has not chosen anything"):
        load(torch.zeros(4, dtype=torch.int64))
