"""Acceptance of drafts: against a slow definition that reads everything again for every token, and known cases."""

import pytest
import torch
from core_helpers import random_ids, small_config, small_model

from minimoe import HybridLM
from minimoe.train.acceptance import acceptance

DEPTH = 3


def model(seed=0, **changes):
    return small_model("MEM*E", seed=seed, num_nextn_predict_layers=1, **({"vocab_size": 7} | changes))


@torch.no_grad()
def slowly(model, ids, depth):
    """One place: the prompt is ``ids``; every call reads the whole text anew. 1 right, 0 wrong."""
    ids, right = list(ids), []
    out = model(torch.tensor([ids]))
    beside = [torch.zeros_like(out.hidden_BLD[0, 0]), *out.hidden_BLD[0]]
    trunk = draft = [int(out.logits[0, -1].argmax())]
    for _ in range(depth):
        logits, hidden, _ = model.draft(torch.tensor([ids + draft]), torch.stack(beside)[None])
        beside.append(hidden[0, -1])
        trunk = [*trunk, int(model(torch.tensor([ids + trunk])).logits[0, -1].argmax())]
        draft = [*draft, int(logits[0, -1].argmax())]
        right.append(int(trunk[-1] == draft[-1]))
    return right


def test_it_is_what_the_definition_says():
    ours, ids = model(vocab_size=5), random_ids(5, 9, 20)
    counted = torch.rand(9, 20, generator=torch.Generator().manual_seed(1)) < 0.8
    found = acceptance(ours, ids, DEPTH, every=4, counted=counted, batch=4)
    chains = [slowly(ours, ids[row, : end + 1].tolist(), DEPTH)
              for row in range(9) for end in range(3, 20, 4) if counted[row, end]]  # fmt: skip
    assert found.any == [(sum(c[k] for c in chains), len(chains)) for k in range(DEPTH)]
    given = [[c[k] for c in chains if all(c[:k])] for k in range(DEPTH)]
    assert found.given == [(sum(g), len(g)) for g in given]
    lengths = [next((k for k in range(DEPTH) if not c[k]), DEPTH) for c in chains]
    assert found.lengths == [lengths.count(n) for n in range(DEPTH + 1)]
    assert found.mean_length == pytest.approx(sum(lengths) / len(lengths))
    assert len(set(lengths)) > 2, "drafts all wrong, or all right, would prove little"


@torch.no_grad()
def test_positions_compare_block_and_trunk_at_every_token():
    ours, ids = model(), random_ids(7, 5, 19)
    counted = torch.ones(5, 19, dtype=torch.bool)
    counted[:, :6] = False
    out = ours(ids)
    before = torch.cat([torch.zeros_like(out.hidden_BLD[:, :1]), out.hidden_BLD[:, :-1]], 1)
    same = ours.draft(ids, before)[0].argmax(-1) == out.logits.argmax(-1)
    for every in (1, 4, 50):  # however the text is cut into calls
        assert acceptance(ours, ids, 1, every, counted).positions == (int(same[:, 6:].sum()), 5 * 13)


def test_padding_behind_a_row_changes_nothing():
    ours, ids = model(), random_ids(7, 3, 12)
    padded = torch.cat([ids, random_ids(7, 3, 8, seed=5)], 1)
    counted = torch.zeros(3, 20, dtype=torch.bool)
    counted[:, :12] = True
    assert acceptance(ours, padded, DEPTH, 4, counted) == acceptance(ours, ids, DEPTH, 4)


def test_a_block_that_says_what_the_trunk_says_is_always_right():
    """One token is likeliest whatever comes in: for the trunk and, through the same head, for the block."""
    ours, ids = model(), random_ids(7, 4, 16)
    with torch.no_grad():
        for norm in (ours.model.norm_f, ours.mtp.layers[1].final_layernorm):
            norm.weight.zero_()
    found = acceptance(ours, ids, DEPTH, 4)  # all logits are 0: the likeliest is the first of them
    assert found.any == found.given == [(16, 16)] * DEPTH
    assert found.mean_length == DEPTH and found.positions == (64, 64)


def test_nothing_is_asked_for_after_the_end():
    ours, ids = model(eos_token_id=(0,)), random_ids(7, 4, 16)
    with torch.no_grad():
        ours.model.norm_f.weight.zero_()  # the trunk always takes token 0: the end
    found = acceptance(ours, ids, DEPTH, 4)
    assert found.any == found.given == [(0, 0)] * DEPTH and found.lengths == [16, 0, 0, 0]


def test_where_nothing_is_counted_nothing_is_asked():
    found = acceptance(model(), random_ids(7, 2, 8), 2, 4, torch.zeros(2, 8, dtype=torch.bool))
    assert found.any == [(0, 0)] * 2 and found.positions == (0, 0) and found.mean_length == 0


def test_misuse_is_one_line():
    with pytest.raises(ValueError, match="has no MTP block; set num_nextn_predict_layers=1"):
        acceptance(HybridLM(small_config()), random_ids(61, 1, 8))
    with pytest.raises(ValueError, match="depth=0, every=16: both must be 1 or more"):
        acceptance(model(), random_ids(7, 1, 8), depth=0)
