"""Attention: the definition against SDPA, with masks, states and gradients."""

from types import SimpleNamespace

import pytest
import torch
from core_helpers import error, normal, scramble, small_config

from minimoe.layers import Attention, attend
from minimoe.layers import attention as module
from minimoe.layers.attention import causal_mask
from minimoe.state import Span


def layer_of(**changes):
    return scramble(Attention(small_config("*", **changes)).double())


def by_definition(layer, x_BLD, past=(), mask=None):
    """The layer's output for x_BLD after the inputs ``past``, through :func:`attend`."""
    everything = torch.cat([*past, x_BLD], 1)
    L, S = x_BLD.shape[1], everything.shape[1]
    split = lambda p, x: (x @ p.weight.T).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)  # noqa: E731
    if mask is None:
        mask = (torch.arange(S) <= torch.arange(S - L, S)[:, None]).expand(len(x_BLD), L, S)
    y = attend(
        split(layer.q_proj, x_BLD), split(layer.k_proj, everything), split(layer.v_proj, everything), mask
    )
    return y.transpose(1, 2).flatten(2) @ layer.o_proj.weight.T


def test_attend_is_softmax_of_scaled_products():
    """Written out query by query; heads 0 and 1 share key head 0, heads 2 and 3 share key head 1."""
    q, k, v = normal(1, 4, 5, 3, seed=1), normal(1, 2, 7, 3, seed=2), normal(1, 2, 7, 3, seed=3)
    mask = torch.rand(1, 5, 7, generator=torch.Generator().manual_seed(4)) < 0.6
    mask[..., 0] = True
    y = attend(q, k, v, mask)
    for h in range(4):
        for i in range(5):
            seen = mask[0, i].nonzero()[:, 0]
            weights = torch.exp(k[0, h // 2, seen] @ q[0, h, i] / 3**0.5)
            expected = (weights[:, None] * v[0, h // 2, seen]).sum(0) / weights.sum()
            assert error(y[0, h, i], expected) < 1e-12
    assert error(attend(q, k.flip(1), v.flip(1), mask), y) > 1e-3


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (4, 1), (4, 4), (6, 3)])
@pytest.mark.parametrize("L", [1, 2, 9])
def test_layer_equals_the_definition(heads, kv_heads, L):
    layer, x = layer_of(num_attention_heads=heads, num_key_value_heads=kv_heads), normal(2, L, 32, seed=5)
    assert error(layer(x)[0], by_definition(layer, x)) < 1e-12


@pytest.mark.parametrize("cuts", [(1, 1, 1), (4, 3), (1, 5, 2), (3, 1, 4)])
def test_layer_equals_the_definition_after_earlier_calls(cuts):
    layer, past, state = layer_of(), [], None
    for n, L in enumerate(cuts):
        x = normal(2, L, 32, seed=n)
        y, state = layer(x, state)
        assert error(y, by_definition(layer, x, past)) < 1e-12
        past.append(x)
    assert state.lengths == (sum(cuts),) * 2 and state.k.shape == (2, 2, sum(cuts), 8)


def test_ragged_rows_see_their_own_past():
    """Rows with different pasts, then a call of three tokens of which one row has only one."""
    layer = layer_of()
    x, more = normal(2, 6, 32, seed=1), normal(2, 3, 32, seed=2)
    first = Span((0, 0), (6, 2), padded=True)
    _, state = layer(x, None, first)
    y, state = layer(more, state, Span((6, 2), (3, 1), padded=True))
    assert state.lengths == (9, 3)
    assert error(y[:1], by_definition(layer, more[:1], [x[:1]])) < 1e-12
    assert error(y[1:, :1], by_definition(layer, more[1:, :1], [x[1:, :2]])) < 1e-12
    assert torch.isfinite(y).all(), "padding may mean nothing, but it may not be NaN"


def test_documents_do_not_see_each_other():
    layer, x = layer_of(), normal(1, 7, 32, seed=1)
    first_key = torch.tensor([[0, 0, 0, 3, 3, 3, 6]])
    y, _ = layer(x, None, Span((0,), (7,), run_BL=first_key, first_key_BL=first_key))
    for piece in (slice(0, 3), slice(3, 6), slice(6, 7)):
        assert error(y[:, piece], by_definition(layer, x[:, piece])) < 1e-12
    assert error(y, by_definition(layer, x)) > 1e-3


def test_a_key_head_for_each_query_head_changes_nothing(monkeypatch):
    """What a GPU gets with a mask, done here."""
    layer, x = layer_of(), normal(2, 7, 32, seed=1).requires_grad_()
    first_key = torch.tensor([[0, 0, 0, 3, 3, 3, 6]] * 2)
    results = []
    for equal in (False, True):
        monkeypatch.setattr(module, "wants_equal_heads", lambda q_BHLP, mask, equal=equal: equal)
        y, state = layer(x, None, Span((0, 0), (7, 7), run_BL=first_key, first_key_BL=first_key))
        assert state.buffer.k.shape[1] == 2  # the state keeps them once
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    assert all(error(one, other) < 1e-12 for one, other in zip(*results, strict=True))


def test_heads_are_equal_where_a_gpu_has_no_kernel_for_shared_ones():
    wants = lambda dtype, mask, cuda=True: module.wants_equal_heads(SimpleNamespace(is_cuda=cuda, dtype=dtype), mask)  # noqa: E731
    mask = torch.ones(1)
    assert not wants(torch.bfloat16, None) and not wants(torch.float16, None)
    assert wants(torch.bfloat16, mask) and wants(torch.float32, None) and wants(torch.float32, mask)
    assert not wants(torch.float32, mask, cuda=False)


def test_mask_says_what_each_query_may_see():
    span = Span((2, 0), (2, 1), padded=True, first_key_BL=torch.tensor([[1, 3], [0, 0]]))
    mask = causal_mask(span, 2, 4, torch.device("cpu"))
    assert mask[0].tolist() == [[False, True, True, False], [False, False, False, True]]
    assert mask[1].tolist() == [[True, False, False, False], [True, True, False, False]]


def test_gradients_equal_those_of_the_definition():
    layer, x = layer_of(), normal(2, 7, 32, seed=5).requires_grad_()
    wanted = [x, *layer.parameters()]
    upstream = normal(2, 7, 32, seed=6)
    ours = torch.autograd.grad((layer(x)[0] * upstream).sum(), wanted)
    theirs = torch.autograd.grad((by_definition(layer, x) * upstream).sum(), wanted)
    for a, b in zip(ours, theirs):
        assert error(a, b) < 1e-10


def test_gradients_reach_earlier_calls():
    layer, x = layer_of(), normal(2, 7, 32, seed=5).requires_grad_()
    upstream = normal(2, 7, 32, seed=6)
    whole = torch.autograd.grad((layer(x)[0] * upstream).sum(), [x, *layer.parameters()])
    state, total = None, 0
    for piece in (slice(0, 3), slice(3, 4), slice(4, 7)):
        y, state = layer(x[:, piece], state)
        total = total + (y * upstream[:, piece]).sum()
    for a, b in zip(torch.autograd.grad(total, [x, *layer.parameters()]), whole):
        assert error(a, b) < 1e-10


def test_attend_has_the_right_derivative():
    q, k, v = (
        normal(*s, seed=n).requires_grad_() for n, s in enumerate([(1, 2, 3, 2), (1, 1, 3, 2), (1, 1, 3, 2)])
    )
    mask = torch.ones(3, 3, dtype=torch.bool).tril()[None]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, mask), (q, k, v))


def test_a_decoded_token_builds_no_mask(monkeypatch):
    """The two common cases go to SDPA without one."""
    layer, x = layer_of(), normal(2, 7, 32, seed=5)
    monkeypatch.setattr(module, "causal_mask", lambda *a: pytest.fail("built a mask"))
    _, state = layer(x)
    layer(x[:, :1], state)
