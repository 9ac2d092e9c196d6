"""The state: immutable in meaning, shared in bytes, and no larger than it says."""

import pytest
import torch
from core_helpers import error, feed, random_calls, random_ids, small_config, small_model

from minimoe import HybridLM
from minimoe import state as module
from minimoe.state import KVState, MambaState


def kv(state):
    return [layer for layer in state.layers if isinstance(layer, KVState)]


def kept_alive(state):
    """Bytes of all storages that the state's tensors hold."""
    tensors = []
    for layer in state.layers:
        if isinstance(layer, KVState):
            tensors += [layer.buffer.k, layer.buffer.v]
        elif isinstance(layer, MambaState):
            tensors += [layer.conv_BKC, layer.ssm_BHPN]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.no_grad()
def test_an_older_state_stays_valid():
    """Three branches from one state, written in turn, each as if the others were not there."""
    model, trunk = small_model(), random_ids(61, 2, 7)
    start = model(trunk).state
    branches = [random_ids(61, 2, 6, seed=s) for s in (1, 2, 3)]
    states, got = [start] * 3, [[] for _ in branches]
    for t in range(6):
        for b, ids in enumerate(branches):
            out = model(ids[:, t : t + 1], states[b])
            states[b] = out.state
            got[b].append(out.logits)
    for ids, parts in zip(branches, got):
        assert error(torch.cat(parts, 1), model(torch.cat([trunk, ids], 1)).logits[:, 7:]) < 1e-11


@torch.no_grad()
def test_going_back_is_free_and_right():
    """Speculation: write five tokens, keep two, write others; the state in between was never touched."""
    model, ids = small_model(), random_ids(61, 1, 12)
    start = model(ids[:, :4]).state
    kept = model(ids[:, 4:6], start).state
    before = [(layer.k.clone(), layer.v.clone()) for layer in kv(kept)]
    model(random_ids(61, 1, 5, seed=9), kept)
    model(random_ids(61, 1, 5, seed=8), start)
    for layer, (k, v) in zip(kv(kept), before):
        assert torch.equal(layer.k, k) and torch.equal(layer.v, v)
    assert error(model(ids[:, 6:], kept).logits, model(ids).logits[:, 6:]) < 1e-11


@torch.no_grad()
def test_branches_of_ragged_rows():
    model = small_model()
    rows = [[random_ids(61, 1, n, seed=n)[0]] for n in (9, 5)]
    _, out = feed(model, rows, random_calls([9, 5], seed=1), packed=False)
    token = random_ids(61, 2, 3, seed=4)
    first = model(token, out.state).logits
    model((token + 1) % 61, out.state, lengths=[1, 3])
    assert torch.equal(model(token, out.state).logits, first)
    for r, row in enumerate(rows):
        assert error(first[r], model(torch.cat([row[0], token[r]])[None]).logits[0, -3:]) < 1e-11


@torch.no_grad()
def test_decoding_writes_in_place(monkeypatch):
    """No concatenation per token: nearly all steps leave the buffer the same object at the same address."""
    copies = []
    grown = module._grown
    monkeypatch.setattr(module, "_grown", lambda x, room: (copies.append(x.numel()), grown(x, room))[1])
    model = small_model("*M*", dtype=torch.float32)
    state = model(random_ids(61, 1, 10)).state
    steps, moved, token = 600, 0, torch.tensor([[5]])
    for _ in range(steps):
        before = [(layer.buffer, layer.buffer.k.data_ptr()) for layer in kv(state)]
        state = model(token, state).state
        after = [(layer.buffer, layer.buffer.k.data_ptr()) for layer in kv(state)]
        moved += sum(b != a for b, a in zip(before, after))
        assert all((b[0] is a[0]) == (b[1] == a[1]) for b, a in zip(before, after))
    per_layer = moved / 2
    assert 1 <= per_layer <= 12, per_layer
    # amortised: all copies together move a few times what is there at the end
    assert sum(copies) <= 6 * sum(layer.k.numel() + layer.v.numel() for layer in kv(state))


@torch.no_grad()
def test_room_to_spare_is_bounded():
    model = small_model("*", dtype=torch.float32)
    state = model(random_ids(61, 1, 1000)).state
    for _ in range(2):
        state = model(torch.tensor([[5]]), state).state
    assert kept_alive(state) <= 1.3 * state.nbytes


@pytest.mark.parametrize(
    "dtype, size", [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)], ids=str
)
@torch.no_grad()
def test_nbytes_equals_the_formula(dtype, size):
    config = small_config("M*EM*-*")
    model = HybridLM(config, dtype=dtype)
    state = model(random_ids(61, 3, 9), lengths=[9, 4, 0]).state
    kv_bytes = 3 * 2 * 2 * 8 * size * (9 + 4)  # layers, k and v, heads, head dim
    conv_bytes = 2 * 3 * 3 * (8 * 6 + 2 * 4 * 10) * size  # layers, rows, kernel - 1, channels
    ssm_bytes = 2 * 3 * (8 * 6 * 10) * max(size, 4)
    assert state.kv_nbytes == kv_bytes
    assert state.nbytes == kv_bytes + conv_bytes + ssm_bytes
    assert model(random_ids(61, 3, 1), state).state.nbytes == state.nbytes + 3 * 2 * 2 * 8 * size * 3


@torch.no_grad()
def test_state_keeps_no_more_alive_than_it_says():
    """Not the whole projection of a prompt for three rows of it."""
    model, ids = small_model("M*M", dtype=torch.float32), random_ids(61, 2, 300)
    for keywords in ({}, {"lengths": [300, 300]}, {"segment_ids": torch.arange(600).view(2, 300) // 70}):
        state = model(ids, **keywords).state
        assert kept_alive(state) <= 1.01 * state.nbytes
    assert kept_alive(model(ids, lengths=[300, 100]).state) <= 2 * state.nbytes


@torch.no_grad()
def test_mamba_state_does_not_grow():
    model = small_model("MM")
    short, long = model(random_ids(61, 1, 2)).state, model(random_ids(61, 1, 200)).state
    assert short.nbytes == long.nbytes and short.kv_nbytes == 0


@torch.no_grad()
def test_select_reorders_repeats_and_drops_rows():
    model = small_model()
    rows = [[random_ids(61, 1, n, seed=n)[0]] for n in (9, 5, 7)]
    _, out = feed(model, rows, [[9, 5, 7]], packed=False)
    token = random_ids(61, 3, 2, seed=4)
    expected = model(token, out.state).logits
    picked = [2, 0, 2, 1]
    chosen = out.state.select(picked)
    assert chosen.lengths == (7, 9, 7, 5)
    assert error(model(token[picked], chosen).logits, expected[picked]) < 1e-11
    only = out.state.select([1])
    assert only.kv_nbytes == 5 * 2 * 2 * 8 * 8 and kv(only)[0].k.shape[2] == 5
    assert error(model(token[[1]], only).logits, expected[[1]]) < 1e-11
    with pytest.raises(IndexError, match="row 3"):
        out.state.select([0, 3])


@torch.no_grad()
def test_select_of_a_packed_state_keeps_its_documents():
    model = small_model()
    ids = random_ids(61, 2, 8)
    segments = torch.tensor([[0] * 3 + [1] * 5, [0] * 6 + [1] * 2])
    state = model(ids, segment_ids=segments).state
    token = random_ids(61, 2, 2, seed=4)
    expected = model(token, state).logits
    assert error(model(token.flip(0), state.select([1, 0])).logits, expected.flip(0)) < 1e-11


@torch.no_grad()
def test_selected_rows_are_written_apart():
    model, ids = small_model(), random_ids(61, 2, 5)
    state = model(ids).state
    copy = state.select([0, 1])
    token = random_ids(61, 2, 1, seed=3)
    expected = model(token, state).logits
    model((token + 1) % 61, copy)
    assert error(model(token, state).logits, expected) < 1e-12


def test_detach_cuts_the_graph_and_keeps_the_values():
    model, ids = small_model(), random_ids(61, 2, 8)
    state = model(ids[:, :4]).state
    assert any(layer.ssm_BHPN.requires_grad for layer in state.layers if isinstance(layer, MambaState))
    cut = state.detach()
    for layer in cut.layers:
        if isinstance(layer, MambaState):
            assert not layer.ssm_BHPN.requires_grad and not layer.conv_BKC.requires_grad
        elif layer is not None:
            assert not layer.k.requires_grad and not layer.v.requires_grad
    assert error(model(ids[:, 4:], cut).logits, model(ids).logits[:, 4:]) < 1e-11
    model.zero_grad()
    model(ids[:, 4:], cut).logits.sum().backward()  # the first call's graph is not needed
    assert all(p.grad is not None for p in model.lm_head.parameters())


@torch.no_grad()
def test_to_moves_every_tensor():
    state = small_model()(random_ids(61, 2, 8), segment_ids=torch.zeros(2, 8, dtype=torch.long)).state
    there = state.to("meta")
    assert there.lengths == state.lengths and there.nbytes == state.nbytes and there.document_B.is_meta
    for layer in there.layers:
        if layer is not None:
            assert (layer.k if isinstance(layer, KVState) else layer.ssm_BHPN).is_meta
    model, token = small_model(), random_ids(61, 2, 1)
    same = model(random_ids(61, 2, 8)).state
    assert error(model(token, same.to("cpu")).logits, model(token, same).logits) < 1e-12


@pytest.mark.parametrize("calls", [[None], [[5, 3]], [None, [5, 3]], [[5, 3], [5, 3]]], ids=str)
def test_a_call_without_gradients_does_not_spoil_a_graph(calls):
    """Sampling from a state in the middle of a training step leaves the step's backward as it was.

    Where every row is padded, the graph's buffer has room to spare, and nobody may write into it.
    """
    model, ids = small_model(), random_ids(61, 2, 8)
    grads = []
    for look in (False, True):
        model.zero_grad()
        state, total = None, 0
        for lengths in calls:
            out = model(ids, state, lengths=lengths)
            state, total = out.state, total + out.logits[:, :3].sum()
        if look:
            with torch.no_grad():
                model(ids[:, :1], state)
        total.backward()
        grads.append(model.model.layers[3].mixer.q_proj.weight.grad.clone())
    assert error(grads[1], grads[0]) < 1e-12


def test_training_part_of_a_model_through_calls():
    """Keys and values without gradient, queries with: later calls may not overwrite what backward reads."""
    model, ids = small_model("*"), random_ids(61, 2, 8)
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name)
    grads = []
    for cuts in ((8,), (4, 2, 2)):
        model.zero_grad()
        state, total = None, 0
        for n, part in enumerate(ids.split(cuts, 1)):
            with torch.set_grad_enabled(n > 0 or len(cuts) == 1):
                out = model(part, state)
            state = out.state
            total = total + out.logits[:, -4:].sum() if n or len(cuts) == 1 else 0
        total.backward()
        grads.append(model.model.layers[0].mixer.q_proj.weight.grad.clone())
    assert error(grads[1], grads[0]) < 1e-10


def test_a_state_made_in_inference_mode_can_be_continued_outside():
    model, ids = small_model(), random_ids(61, 2, 8)
    with torch.inference_mode():
        state = model(ids[:, :1], model(ids).state).state
    with torch.no_grad():
        expected = model(torch.cat([ids, ids[:, :1], ids[:, 3:4]], 1)).logits[:, -1:]
        assert error(model(ids[:, 3:4], state).logits, expected) < 1e-11
