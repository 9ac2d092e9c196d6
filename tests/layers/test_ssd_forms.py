"""The chunked form of the recurrence against its definition, in float64."""

import pytest
import torch
import torch.nn.functional as F
from core_helpers import error, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from minimoe.layers import ssd_chunked, ssd_recurrent
from minimoe.layers.mamba2 import causal_conv

NAMES = ("x", "dt", "A", "Bmat", "Cmat", "state")


def inputs(B, L, H, P, G, N, seed=0, dtype=torch.float64):
    """x, dt, A, Bmat, Cmat and a start state; dt from about 1e-4 to 10, a tenth of it exactly zero."""
    dt = F.softplus(normal(B, L, H, seed=seed + 3) * 4 - 3)
    dt = torch.where(normal(B, L, H, seed=seed + 6) > 1.28, torch.zeros_like(dt), dt)
    made = (
        normal(B, L, H, P, seed=seed), dt, -torch.exp(normal(H, seed=seed + 4) * 2),
        normal(B, L, G, N, seed=seed + 1), normal(B, L, G, N, seed=seed + 2),
        normal(B, H, P, N, seed=seed + 5),
    )  # fmt: skip
    return [m.to(dtype) for m in made]


def random_runs(B, L, seed, share=0.3):
    """Document numbers that start at 0 or 1 and grow."""
    random = torch.Generator().manual_seed(seed)
    return (torch.rand(B, L, generator=random) < share).long().cumsum(1)


def both(args, chunk, run=None):
    y, state = ssd_recurrent(*args, run)
    y_chunked, state_chunked = ssd_chunked(*args, chunk, run)
    assert y_chunked.shape == y.shape and state_chunked.shape == state.shape
    return max(error(y_chunked, y), error(state_chunked, state))


@pytest.mark.parametrize("L", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_equals_recurrent_at_every_chunk_size(L, packed):
    args = inputs(2, L, 6, 3, 3, 4, seed=L)
    run = random_runs(2, L, seed=L) if packed else None
    for chunk in range(1, L + 4):
        assert both(args, chunk, run) < 1e-12, chunk


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3), L=st.integers(1, 40), G=st.integers(1, 4), J=st.integers(1, 4), P=st.integers(1, 5),
    N=st.integers(1, 7), chunk=st.integers(1, 50), packed=st.booleans(), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_chunked_equals_recurrent_at_random_shapes(B, L, G, J, P, N, chunk, packed, seed):
    run = random_runs(B, L, seed) if packed else None
    assert both(inputs(B, L, G * J, P, G, N, seed), chunk, run) < 1e-11


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3), L=st.integers(1, 90), G=st.integers(1, 4), J=st.integers(1, 4), P=st.integers(1, 5),
    N=st.integers(1, 7), chunk=st.integers(1, 100), packed=st.booleans(), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_chunked_equals_recurrent_at_many_random_shapes(B, L, G, J, P, N, chunk, packed, seed):
    run = random_runs(B, L, seed) if packed else None
    assert both(inputs(B, L, G * J, P, G, N, seed), chunk, run) < 1e-11


def test_the_comparison_notices_a_wrong_group_and_a_lost_start_state():
    x, dt, A, Bmat, Cmat, state = inputs(2, 9, 6, 3, 3, 4)
    y, _ = ssd_recurrent(x, dt, A, Bmat, Cmat, state)
    assert error(ssd_chunked(x, dt, A, Bmat.roll(1, 2), Cmat, state, 4)[0], y) > 1e-3
    assert error(ssd_chunked(x, dt, A, Bmat, Cmat, torch.zeros_like(state), 4)[0], y) > 1e-3
    assert error(ssd_chunked(x, dt, A, Bmat, Cmat, state, 4, random_runs(2, 9, 0))[0], y) > 1e-3


def test_a_new_document_starts_from_an_empty_state():
    """Packed documents give what each gives alone; run 0 continues the state that came in."""
    x, dt, A, Bmat, Cmat, state = inputs(1, 12, 4, 3, 2, 5)
    for border in (0, 1, 4, 7, 11):
        run = (torch.arange(12) >= border).long()[None]
        y, last = ssd_chunked(x, dt, A, Bmat, Cmat, state, 4, run)
        parts = []
        for piece, start in ((slice(0, border), state), (slice(border, 12), torch.zeros_like(state))):
            if piece.start == piece.stop:
                continue
            part, end = ssd_recurrent(x[:, piece], dt[:, piece], A, Bmat[:, piece], Cmat[:, piece], start)
            parts.append(part)
        assert error(y, torch.cat(parts, 1)) < 1e-12 and error(last, end) < 1e-12, border


def test_dt_zero_leaves_the_state_alone():
    x, dt, A, Bmat, Cmat, state = inputs(2, 10, 4, 3, 2, 5)
    dt = dt * (torch.arange(10) < 6)[None, :, None]
    _, short = ssd_recurrent(x[:, :6], dt[:, :6], A, Bmat[:, :6], Cmat[:, :6], state)
    for chunk in (1, 3, 4, 10, 20):
        assert error(ssd_chunked(x, dt, A, Bmat, Cmat, state, chunk)[1], short) < 1e-12


def test_very_fast_decay_neither_overflows_nor_divides():
    """The chunked form multiplies decays instead of dividing by them: dt A = -1e4 a token is fine."""
    x, dt, A, Bmat, Cmat, state = inputs(2, 20, 4, 3, 2, 5, dtype=torch.float32)
    dt, A = torch.full_like(dt, 100.0), A - 100
    y, last = ssd_recurrent(x, dt, A, Bmat, Cmat, state)
    y_chunked, last_chunked = ssd_chunked(x, dt, A, Bmat, Cmat, state, 8)
    assert torch.isfinite(y_chunked).all() and torch.isfinite(last_chunked).all()
    assert error(y_chunked, y) < 1e-5 and error(last_chunked, last) < 1e-5


def test_very_slow_decay_remembers():
    x, dt, A, Bmat, Cmat, state = inputs(1, 30, 4, 3, 2, 5, dtype=torch.float32)
    args = (x, torch.full_like(dt, 1e-5), torch.full_like(A, -1e-3), Bmat, Cmat, state)
    wide = [a.double() for a in args]
    assert error(ssd_chunked(*args, 8)[0], ssd_recurrent(*wide)[0]) < 1e-5
    assert error(ssd_chunked(*args, 8)[1], state) < 1e-2


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_both_forms_agree(packed):
    run = random_runs(2, 11, 5) if packed else None
    grads = []
    for form in (lambda *a: ssd_recurrent(*a, run), lambda *a: ssd_chunked(*a, 4, run)):
        args = [a.requires_grad_() for a in inputs(2, 11, 4, 3, 2, 5, seed=7)]
        y, state = form(*args)
        loss = (y * normal(*y.shape, seed=20)).sum() + (state * normal(*state.shape, seed=21)).sum()
        grads.append(torch.autograd.grad(loss, args))
    for name, ours, theirs in zip(NAMES, *grads):
        assert error(ours, theirs) < 1e-10, name


def test_gradient_of_the_chunked_form_is_the_derivative():
    args = [a.requires_grad_() for a in inputs(1, 5, 2, 2, 1, 2, seed=3)]
    args[1] = (args[1].detach() + 0.1).requires_grad_()  # dt = 0 is a corner
    assert torch.autograd.gradcheck(lambda *a: ssd_chunked(*a, 2), args)
    assert torch.autograd.gradcheck(lambda *a: ssd_chunked(*a, 2, torch.tensor([[0, 0, 1, 1, 2]])), args)


def test_gradients_stay_finite_where_everything_decays():
    """exp of a masked positive number would be infinite, and its gradient NaN."""
    args = inputs(1, 16, 4, 3, 2, 5, dtype=torch.float32)
    args[1], args[2] = torch.full_like(args[1], 50.0), torch.full_like(args[2], -16.0)
    args = [a.requires_grad_() for a in args]
    y, state = ssd_chunked(*args, 8)
    for g in torch.autograd.grad(y.sum() + state.sum(), args):
        assert torch.isfinite(g).all()


@pytest.mark.parametrize("kernel", [2, 3, 4, 7])
def test_convolution_equals_its_sum(kernel):
    x, weight, bias = normal(2, 9 + kernel - 1, 5, seed=1), normal(5, 1, kernel, seed=2), normal(5, seed=3)
    expected = torch.stack(
        [bias + sum(weight[:, 0, k] * x[:, t + k] for k in range(kernel)) for t in range(9)], 1
    )
    assert error(causal_conv(x, weight, bias), expected) < 1e-12
    one = torch.zeros(2, 9 + kernel - 1, dtype=torch.long)
    assert error(causal_conv(x, weight, bias, one), expected) < 1e-12


def test_convolution_stops_at_the_borders_of_documents():
    x, weight, bias = normal(1, 13, 5, seed=1), normal(5, 1, 4, seed=2), normal(5, seed=3)
    run = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 3]])
    y = causal_conv(x, weight, bias, run)
    for t in range(10):
        kept = [weight[:, 0, k] * x[0, t + k] for k in range(4) if run[0, t + k] == run[0, t + 3]]
        assert error(y[0, t], bias + sum(kept)) < 1e-12, t
    assert error(y, causal_conv(x, weight, bias)) > 1e-3


@pytest.mark.parametrize("kernel", [2, 4])
def test_gradient_of_the_convolution_is_the_derivative(kernel):
    args = [
        t.requires_grad_()
        for t in (normal(2, 5 + kernel - 1, 3, seed=1), normal(3, 1, kernel, seed=2), normal(3, seed=3))
    ]
    assert torch.autograd.gradcheck(causal_conv, args)
