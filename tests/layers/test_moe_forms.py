"""Experts: sorted and grouped against one after another."""

import pytest
import torch
import torch.nn.functional as F
from core_helpers import error, normal, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from minimoe import HybridLM
from minimoe.layers import MoE, experts_grouped, experts_loop, moe

# largest error of the grouped form, as a part of the largest output
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def choices(T, E, K, seed, used=None):
    """K different experts a token out of the first ``used``, and weights that sum to about one."""
    random = torch.Generator().manual_seed(seed)
    experts = torch.stack([torch.randperm(used or E, generator=random)[:K] for _ in range(T)])
    return experts, torch.rand(T, K, generator=random, dtype=torch.float64) * 2 / K


def inputs(T, E, K, F_, R, dtype, seed=0, used=None):
    x, up = normal(T, R, seed=seed, dtype=dtype), normal(E, F_, R, seed=seed + 1, dtype=dtype) * R**-0.5
    down, (experts, weights) = (
        normal(E, R, F_, seed=seed + 2, dtype=dtype) * F_**-0.5,
        choices(T, E, K, seed, used),
    )
    return x, up, down, experts, weights.to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("T, E, K, F_, R", [
    (40, 4, 2, 24, 32),
    (1, 8, 3, 24, 32),
    (40, 1, 1, 24, 32),
    (40, 4, 4, 24, 32),
    (3, 64, 2, 16, 16),
    (40, 4, 2, 22, 30),
    (40, 4, 2, 22, 32),
    (40, 4, 2, 24, 30),
    (1, 4, 2, 22, 30),
    (50, 5, 3, 21, 31),
    (20, 3, 2, 1, 1),
])  # fmt: skip
def test_grouped_experts_equal_the_loop(dtype, T, E, K, F_, R):
    """Any widths: the grouped matmul's demand for rows of 16 bytes may not reach the caller."""
    args = inputs(T, E, K, F_, R, dtype)
    y = experts_grouped(*args)
    assert y.shape == (T, R) and y.dtype == dtype
    assert error(y, experts_loop(*args)) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("used", [2, 3])
def test_experts_that_nobody_chose_change_nothing(dtype, used):
    args = inputs(60, 7, 2, 24, 32, dtype, used=used)
    assert error(experts_grouped(*args), experts_loop(*args)) < BOUND[dtype]
    x, up, down, experts, weights = args
    moved = experts + 7 - used  # the last experts instead of the first
    assert (
        error(experts_grouped(x, up, down, moved, weights), experts_loop(x, up, down, moved, weights))
        < BOUND[dtype]
    )
    up[used:], down[used:] = float("nan"), float("nan")
    assert torch.isfinite(experts_grouped(x, up, down, experts, weights)).all()
    assert torch.isfinite(experts_loop(x, up, down, experts, weights)).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 50), E=st.integers(1, 9), extra=st.integers(0, 8), width=st.integers(1, 12),
    R=st.integers(1, 12), seed=st.integers(0, 1000), dtype=st.sampled_from(list(BOUND)),
    aligned=st.booleans(),
)  # fmt: skip
def test_grouped_experts_equal_the_loop_at_random_sizes(T, E, extra, width, R, seed, dtype, aligned):
    step = 8 if aligned else 1
    args = inputs(T, E, 1 + extra % E, width * step, R * step, dtype, seed)
    assert error(experts_grouped(*args), experts_loop(*args)) < BOUND[dtype]


@pytest.mark.parametrize("counts", [[3, 0, 4, 9], [0, 0, 5], [8], [4, 4], [1, 0]], ids=str)
def test_runs_are_rounded_up_by_repeating_their_last_rows(counts):
    rows = torch.arange(sum(counts))
    taken, real, longer = moe._round_up_runs(torch.tensor(counts), 4)
    assert longer.tolist() == [-(-n // 4) * 4 for n in counts]
    assert torch.equal(rows[taken][real], rows), "every row once, in order"
    old, new = rows.split(counts), rows[taken].split(longer.tolist())
    assert all(set(n.tolist()) == set(o.tolist()) for o, n in zip(old, new)), "a run holds rows of its own only"


def test_bfloat16_runs_come_in_few_lengths_on_a_cpu(monkeypatch):
    """Each new number of rows would make oneDNN build a kernel; the rows that fill up may not count, nor their gradient."""
    seen = []
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(moe.F, "grouped_mm", lambda x, w, offs: (seen.append(offs), grouped_mm(x, w, offs=offs))[1])
    for dtype, multiple in ((torch.bfloat16, 32), (torch.float32, 1)):
        seen.clear()
        args = inputs(45, 4, 3, 24, 32, dtype)
        wanted = [t.requires_grad_() for t in (args[0], args[1], args[2], args[4])]
        grads = []
        for form in (experts_loop, experts_grouped):
            y = form(*args)
            grads.append(torch.autograd.grad((y * normal(*y.shape, seed=9, dtype=dtype)).sum(), wanted))
        assert len(seen) == 2 and all(int(end) % multiple == 0 for end in seen[0])
        assert int(seen[0][-1]) == 45 * 3 if multiple == 1 else int(seen[0][-1]) > 45 * 3
        for loop, grouped in zip(*grads):
            assert error(grouped, loop) < BOUND[dtype]


def test_the_loop_is_the_sum_it_says():
    x, up, down, experts, weights = inputs(12, 5, 3, 7, 6, torch.float64)
    expected = torch.stack(
        [
            sum(
                weights[t, k] * (down[e] @ (up[e] @ x[t]).clamp(min=0) ** 2) for k, e in enumerate(experts[t])
            )
            for t in range(12)
        ]
    )
    assert error(experts_loop(x, up, down, experts, weights), expected) < 1e-12
    assert error(experts_loop(x, up, down, experts.flip(1), weights), expected) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(40, 6, 2, 24, 32), (1, 6, 2, 24, 32), (40, 6, 2, 22, 30)], ids=str)
def test_gradients_of_both_forms_agree(dtype, sizes):
    grads = []
    for form in (experts_loop, experts_grouped):
        x, up, down, experts, weights = inputs(*sizes, dtype)
        wanted = [t.requires_grad_() for t in (x, up, down, weights)]
        y = form(x, up, down, experts, weights)
        grads.append(torch.autograd.grad((y * normal(*y.shape, seed=9, dtype=dtype)).sum(), wanted))
    for name, loop, grouped in zip(("x", "up", "down", "weights"), *grads):
        assert error(grouped, loop) < BOUND[dtype], name


def test_gradient_is_the_derivative():
    x, up, down, experts, weights = inputs(4, 3, 2, 3, 2, torch.float64)
    wanted = [t.requires_grad_() for t in (x, up, down, weights)]
    for form in (experts_loop, experts_grouped):
        assert torch.autograd.gradcheck(
            lambda x, up, down, w, form=form: form(x, up, down, experts, w), wanted
        )


def test_a_single_token_reads_only_its_own_experts(monkeypatch):
    """A decoded token costs K experts and not E."""
    read = []
    linear = F.linear
    monkeypatch.setattr(moe.F, "linear", lambda x, w, *b: (read.append(w.shape), linear(x, w, *b))[1])
    experts_grouped(*inputs(1, 64, 3, 24, 32, torch.float32))
    assert len(read) == 2 * 3


def test_router_learns_through_the_weights_only():
    """Gradient reaches the router's matrix; the correction bias is a buffer, set by counting."""
    layer = MoE(small_config("E"))
    layer.load_state_dict(
        {name: normal(*t.shape, seed=3, dtype=t.dtype) * 0.3 for name, t in layer.state_dict().items()}
    )
    layer(normal(1, 12, 32, dtype=torch.float32)).square().sum().backward()
    assert layer.gate.weight.grad.abs().max() > 0
    assert "gate.e_score_correction_bias" in dict(layer.named_buffers())
    assert "gate.e_score_correction_bias" not in dict(layer.named_parameters())
    assert "gate.e_score_correction_bias" in layer.state_dict()


def test_moe_without_a_latent_has_no_projections():
    layer = MoE(small_config("E", moe_latent_size=None))
    assert layer.experts.up_proj.shape == (6, 24, 32) and layer.experts.down_proj.shape == (6, 32, 24)
    assert not [name for name in layer.state_dict() if "latent" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_of_odd_widths_runs(dtype):
    model = HybridLM(small_config("ME", moe_latent_size=30, moe_intermediate_size=22), dtype=dtype)
    ids = torch.arange(50)[None]
    model.loss(ids, ids).backward()
    assert torch.isfinite(model(ids).logits).all()


def test_experts_run_under_autocast():
    """The router is kept out of autocast, so the rest must work inside it."""
    torch.manual_seed(0)
    model = HybridLM(small_config("MEM*E", hidden_size=64, moe_latent_size=32, moe_intermediate_size=32))
    ids = torch.arange(50)[None]
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids)
        loss = model.loss(ids, ids)
        model(ids[:, :1], out.state)
    loss.backward()
    assert out.logits.dtype == torch.float32
    assert error(out.logits, exact) < 0.1
