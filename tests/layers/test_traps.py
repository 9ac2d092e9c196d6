"""Each trap that a faithful small Nemotron 3 must not fall into, by name.

Every test compares a layer with the equation, written out token by token below, and shows that the wrong
equation gives something else with the same weights: a test that could not fail would prove nothing.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from core_helpers import error, normal, scramble, small_config

from minimoe import HybridConfig, HybridLM
from minimoe.layers import (
    MLP,
    Attention,
    Mamba2,
    MoE,
    MTPBlock,
    attention,
    mamba2,
    route,
    ssd_chunked,
    ssd_recurrent,
)

RIGHT, WRONG = 1e-12, 1e-3


def double(layer, seed=1):
    return scramble(layer.double(), seed)


def silu(x):
    return x * torch.sigmoid(x)


def rms(x, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def written_out_mamba(
    layer, x_LD, group_of=None, norm_groups=None, gate_first=True, dt_range=(0.0, math.inf), skip=True
):
    """The Mamba-2 mixer for one sequence, a loop over tokens and heads; the keywords make it wrong."""
    H, P, G, N = layer.heads, layer.head_dim, layer.groups, layer.state_size
    group_of = group_of or (lambda h: h // (H // G))
    gate_LI, xbc_LC, dt_LH = (x_LD @ layer.in_proj.weight.T).split([H * P, H * P + 2 * G * N, H], -1)
    K, L = layer.conv1d.weight.shape[-1], len(x_LD)
    past = torch.cat([torch.zeros(K - 1, xbc_LC.shape[1], dtype=x_LD.dtype), xbc_LC])
    conv = torch.stack(
        [
            layer.conv1d.bias + sum(layer.conv1d.weight[:, 0, k] * past[t + k] for k in range(K))
            for t in range(L)
        ]
    )
    x, Bmat, Cmat = silu(conv).split([H * P, G * N, G * N], -1)
    x, Bmat, Cmat = x.view(L, H, P), Bmat.view(L, G, N), Cmat.view(L, G, N)
    dt = torch.log1p(torch.exp(dt_LH + layer.dt_bias)).clamp(*dt_range)
    y = torch.zeros(L, H, P, dtype=x.dtype)
    for h in range(H):
        state, g = torch.zeros(P, N, dtype=x.dtype), group_of(h)
        for t in range(L):
            state = torch.exp(-dt[t, h] * torch.exp(layer.A_log[h])) * state + dt[t, h] * torch.outer(
                x[t, h], Bmat[t, g]
            )
            y[t, h] = state @ Cmat[t, g] + (layer.D[h] * x[t, h] if skip else 0)
    y, eps = y.view(L, H * P), layer.norm.eps
    norm_groups = norm_groups or G
    if gate_first:
        y = rms((y * silu(gate_LI)).view(L, norm_groups, -1), eps).view(L, -1)
    else:
        y = rms(y.view(L, norm_groups, -1), eps).view(L, -1) * silu(gate_LI)
    return (y * layer.norm.weight) @ layer.out_proj.weight.T


@pytest.fixture(scope="module")
def mamba():
    layer = double(Mamba2(small_config("M")))
    x = normal(1, 11, 32, seed=2)
    with torch.no_grad():
        return layer, x[0], layer(x)[0][0]


def test_mamba_heads_share_the_matrices_of_their_own_group(mamba):
    """Four groups of two neighbouring heads: not one group, and not heads dealt out in turn."""
    layer, x, y = mamba
    assert layer.groups == 4 and layer.heads == 8
    assert error(y, written_out_mamba(layer, x)) < RIGHT
    assert error(y, written_out_mamba(layer, x, group_of=lambda h: 0)) > WRONG
    assert error(y, written_out_mamba(layer, x, group_of=lambda h: h % 4)) > WRONG


def test_gated_norm_works_per_group_and_gates_first(mamba):
    layer, x, y = mamba
    assert error(y, written_out_mamba(layer, x)) < RIGHT
    assert error(y, written_out_mamba(layer, x, norm_groups=1)) > WRONG
    assert error(y, written_out_mamba(layer, x, norm_groups=8)) > WRONG
    assert error(y, written_out_mamba(layer, x, gate_first=False)) > WRONG


def test_mamba_skips_from_x_after_the_convolution(mamba):
    layer, x, y = mamba
    assert error(y, written_out_mamba(layer, x, skip=False)) > WRONG


def test_dt_is_not_clamped(mamba):
    """time_step_limit is (0, inf): dt below time_step_min and above time_step_max passes as it is."""
    layer, x, y = mamba
    dt = F.softplus(x @ layer.in_proj.weight.T[:, -layer.heads :] + layer.dt_bias)
    assert dt.min() < 0.001 and dt.max() > 0.1, (
        "the weights do not cross the clamp, so this test proves nothing"
    )
    assert error(y, written_out_mamba(layer, x)) < RIGHT
    assert error(y, written_out_mamba(layer, x, dt_range=(0.001, math.inf))) > 1e-5
    assert error(y, written_out_mamba(layer, x, dt_range=(0.0, 0.1))) > WRONG


def test_a_time_step_limit_of_the_config_is_kept():
    layer = double(Mamba2(small_config("M", time_step_limit=(0.01, 0.3))))
    x = normal(1, 9, 32, seed=2)
    y = layer(x)[0][0]
    assert error(y, written_out_mamba(layer, x[0], dt_range=(0.01, 0.3))) < RIGHT
    assert error(y, written_out_mamba(layer, x[0])) > WRONG


def test_one_call_of_one_token_clamps_dt_as_a_longer_one_does():
    """transformers clamps in prefill and not in decode; here both do, or neither."""
    layer = double(Mamba2(small_config("M", time_step_limit=(0.01, 0.3))))
    x = normal(1, 9, 32, seed=2)
    whole, _ = layer(x)
    state, parts = None, []
    for t in range(9):
        y, state = layer(x[:, t : t + 1], state)
        parts.append(y)
    assert error(torch.cat(parts, 1), whole) < RIGHT


def ssd_inputs(L, seed=0, B=2, H=4, P=3, G=2, N=5):
    x, Bmat, Cmat = (
        normal(B, L, H, P, seed=seed),
        normal(B, L, G, N, seed=seed + 1),
        normal(B, L, G, N, seed=seed + 2),
    )
    dt = F.softplus(normal(B, L, H, seed=seed + 3) * 3 - 2)
    return x, dt, -torch.exp(normal(H, seed=seed + 4)), Bmat, Cmat, normal(B, H, P, N, seed=seed + 5)


@pytest.mark.parametrize("L", [1, 3, 4, 5, 7, 8, 9, 15])
def test_length_need_not_be_a_multiple_of_the_chunk(L):
    x, dt, A, Bmat, Cmat, start = ssd_inputs(L)
    y, state = ssd_recurrent(x, dt, A, Bmat, Cmat, start)
    y_chunked, state_chunked = ssd_chunked(x, dt, A, Bmat, Cmat, start, 4)
    assert error(y_chunked, y) < RIGHT and error(state_chunked, state) < RIGHT
    if L % 4:  # what padding with more than dt = 0 would leave behind
        longer = [torch.cat([m, m[:, -1:].repeat_interleave(-L % 4, 1)], 1) for m in (x, dt, Bmat, Cmat)]
        assert error(ssd_chunked(longer[0], longer[1], A, longer[2], longer[3], start, 4)[1], state) > WRONG


@pytest.fixture(scope="module")
def wide():
    """A fresh model with many Mamba heads, so that distributions can be told apart."""
    torch.manual_seed(0)
    config = small_config(
        "M*E-", hidden_size=192, mamba_num_heads=4096, mamba_head_dim=1, moe_latent_size=96, head_dim=48,
        moe_intermediate_size=128, moe_shared_expert_intermediate_size=256, intermediate_size=256,
        vocab_size=256, time_step_min=0.002, time_step_max=0.2, time_step_floor=0.005,
        initializer_range=0.0173,
    )  # fmt: skip
    return HybridLM(config)


def distance_to_uniform(x, low, high):
    """Kolmogorov-Smirnov: the largest distance of the two distribution functions."""
    x = x.detach().double().sort().values
    return float(((x - low) / (high - low) - torch.linspace(0, 1, len(x), dtype=torch.float64)).abs().max())


def test_A_starts_uniform_between_1_and_16(wide):
    """As NVIDIA's Megatron-LM draws it; transformers' own 1, 2, 3, ... is another start."""
    A = wide.model.layers[0].mixer.A_log.exp()
    assert A.min() >= 0.999 and A.max() <= 16.001
    assert distance_to_uniform(A, 1, 16) < 0.03
    assert distance_to_uniform(A.log(), 0, math.log(16)) > 0.1, "log-uniform would pass too"


def test_dt_starts_log_uniform_and_above_the_floor(wide):
    dt = F.softplus(wide.model.layers[0].mixer.dt_bias.double())
    assert dt.min() >= 0.005 * 0.999 and dt.max() <= 0.2 * 1.001
    free = dt[dt > 0.0051].log()
    assert distance_to_uniform(free, math.log(0.0051), math.log(0.2)) < 0.03
    share = (dt <= 0.0051).double().mean()
    assert abs(share - math.log(0.0051 / 0.002) / math.log(100)) < 0.03
    assert distance_to_uniform(free.exp(), 0.0051, 0.2) > 0.1, "uniform would pass too"


def test_skip_and_norms_start_at_one_and_biases_at_zero(wide):
    for name, p in wide.state_dict().items():
        if name.endswith(".D") or "norm" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(p, torch.zeros_like(p)), name


def stds(model):
    return {
        name: float(p.detach().std())
        for name, p in model.named_parameters()
        if p.dim() >= 2 and "conv1d" not in name
    }


def writes_to_the_residual_stream(name):
    return name.endswith(
        (
            "o_proj.weight",
            "out_proj.weight",
            "down_proj.weight",
            "fc2_latent_proj.weight",
            "experts.down_proj",
        )
    )


def test_residual_projections_start_smaller_by_the_root_of_the_depth(wide):
    for name, std in stds(wide).items():
        expected = 0.0173 / 2 if writes_to_the_residual_stream(name) else 0.0173
        assert abs(std / expected - 1) < 0.05, (name, std, expected)


def test_rescaling_of_residual_projections_can_be_left_out(wide):
    torch.manual_seed(0)
    plain = HybridLM(wide.config.replace(rescale_prenorm_residual=False, mamba_num_heads=64))
    for name, std in stds(plain).items():
        assert abs(std / 0.0173 - 1) < 0.05, (name, std)


def test_a_fresh_bfloat16_model_is_drawn_in_float32():
    """Rounded once, at the end: softplus backwards in bfloat16 would lose dt."""
    torch.manual_seed(0)
    exact = HybridLM(small_config("ME"))
    torch.manual_seed(0)
    rounded = HybridLM(small_config("ME"), dtype=torch.bfloat16)
    for name, p in rounded.named_parameters():
        assert torch.equal(p, exact.get_parameter(name).bfloat16()), name


def rotated(x_BHLP):
    """Rotary positions, as most other models have them."""
    L, half = x_BHLP.shape[2], x_BHLP.shape[3] // 2
    angle = torch.arange(L)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = (torch.cat([f(angle)] * 2, -1).to(x_BHLP.dtype) for f in (torch.cos, torch.sin))
    return x_BHLP * cos + torch.cat([-x_BHLP[..., half:], x_BHLP[..., :half]], -1) * sin


def test_attention_has_no_positional_encoding(monkeypatch):
    """The last query sees a set: the order of the earlier tokens does not reach it."""
    layer = double(Attention(small_config("*")))
    x = normal(2, 12, 32, seed=2)
    shuffled = x[:, [*torch.randperm(11, generator=torch.Generator().manual_seed(3)).tolist(), 11]]
    assert error(layer(shuffled)[0][:, -1], layer(x)[0][:, -1]) < RIGHT

    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda q, k, v, **kw: sdpa(rotated(q), rotated(k), v, **kw),
    )
    assert error(layer(shuffled)[0][:, -1], layer(x)[0][:, -1]) > WRONG


def test_router_bias_chooses_but_does_not_weigh():
    scores = torch.tensor([[0.9, 0.6, 0.5, 0.2]], dtype=torch.float64)
    x, gate = torch.ones(1, 1, dtype=torch.float64), torch.logit(scores).T
    bias = torch.tensor([-1.0, 0.0, 0.0, 0.5], dtype=torch.float64)
    experts, weights, returned = route(x, gate, bias, top_k=2, scale=2.5)
    assert error(returned, scores) < RIGHT
    chosen = dict(zip(experts[0].tolist(), weights[0].tolist()))
    assert set(chosen) == {1, 3}, "unbiased scores would have chosen 0 and 1"
    assert chosen[3] == pytest.approx(2.5 * 0.2 / 0.8) and chosen[1] == pytest.approx(2.5 * 0.6 / 0.8)
    assert abs(chosen[3] - 2.5 * 0.7 / 1.3) > 0.1, "that would be the biased score's weight"


def test_router_weights_are_normalised_then_scaled():
    x, gate, bias = normal(50, 8, seed=1), normal(6, 8, seed=2), normal(6, seed=3)
    experts, weights, scores = route(x, gate, bias, top_k=3, scale=2.5)
    assert error(weights.sum(-1), torch.full((50,), 2.5, dtype=torch.float64)) < 1e-9
    plain = route(x, gate, bias, top_k=3, scale=2.5, normalise=False)
    assert error(plain[1], 2.5 * scores.gather(1, plain[0])) < RIGHT
    assert error(plain[1].sum(-1), weights.sum(-1)) > WRONG


def test_router_can_choose_below_zero():
    """Biased scores may all be negative; a mask that fills refused experts with 0 would then choose those."""
    scores, bias = (
        torch.tensor([[0.3, 0.6, 0.5]], dtype=torch.float64),
        torch.full((3,), -2.0, dtype=torch.float64),
    )
    experts, weights, _ = route(torch.ones(1, 1, dtype=torch.float64), torch.logit(scores).T, bias, 2, 1.0)
    assert sorted(experts[0].tolist()) == [1, 2]
    assert error(weights.sort().values, torch.tensor([[5 / 11, 6 / 11]], dtype=torch.float64)) < RIGHT


def test_router_scores_are_sigmoids_in_float32():
    x, gate, bias = (
        normal(40, 64, seed=1, dtype=torch.bfloat16),
        normal(8, 64, seed=2, dtype=torch.bfloat16),
        torch.zeros(8),
    )
    _, weights, scores = route(x, gate, bias, 2, 1.0)
    exact = torch.sigmoid(x.double() @ gate.double().T)
    assert scores.dtype == weights.dtype == torch.float32
    assert error(scores, exact) < 1e-6
    assert error(torch.sigmoid(x @ gate.T), exact) > WRONG, "bfloat16 scores would pass too"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(route(x, gate, bias, 2, 1.0)[2], scores)


def written_out_moe(
    moe, x_TD, router_sees=None, shared_sees=None, weight_at="output", scale_shared=False, act=None
):
    """LatentMoE, token by token and expert by expert; the keywords make it wrong."""
    act = act or (lambda v: torch.clamp(v, min=0) ** 2)
    E, K, router = len(moe.experts.up_proj), moe.gate.top_k, moe.gate
    down, up = moe.fc1_latent_proj.weight, moe.fc2_latent_proj.weight
    out = []
    for x in x_TD:
        seen = router_sees(x) if router_sees else x
        score = [1 / (1 + math.exp(-float(router.weight[e] @ seen))) for e in range(E)]
        biased = sorted(range(E), key=lambda e: -(score[e] + float(router.e_score_correction_bias[e])))[:K]
        total, y = sum(score[e] for e in biased), torch.zeros(len(down), dtype=x.dtype)
        for e in biased:
            w, latent = router.scale * score[e] / total, down @ x
            if weight_at == "input":
                y += moe.experts.down_proj[e] @ act(moe.experts.up_proj[e] @ (w * latent))
            else:
                y += (w if weight_at == "output" else 1.0) * (
                    moe.experts.down_proj[e] @ act(moe.experts.up_proj[e] @ latent)
                )
        shared = shared_sees(x) if shared_sees else x
        shared = moe.shared_experts.down_proj.weight @ act(moe.shared_experts.up_proj.weight @ shared)
        out.append(up @ y + shared * (router.scale if scale_shared else 1.0))
    return torch.stack(out)


@pytest.fixture(scope="module")
def moe():
    layer = double(MoE(small_config("E")))
    x = normal(1, 9, 32, seed=4)
    with torch.no_grad():
        return layer, x[0], layer(x)[0]


def test_router_and_shared_expert_see_the_full_width(moe):
    """Only the routed experts read the latent."""
    layer, x, y = moe
    assert layer.gate.weight.shape[1] == layer.shared_experts.up_proj.weight.shape[1] == 32
    assert layer.experts.up_proj.shape[2] == layer.experts.down_proj.shape[1] == 16

    def through_the_latent(v):
        return layer.fc2_latent_proj.weight @ (layer.fc1_latent_proj.weight @ v)

    assert error(y, written_out_moe(layer, x)) < RIGHT
    assert error(y, written_out_moe(layer, x, router_sees=through_the_latent)) > WRONG
    assert error(y, written_out_moe(layer, x, shared_sees=through_the_latent)) > WRONG


def test_shared_expert_is_neither_weighted_nor_scaled(moe):
    layer, x, y = moe
    assert error(y, written_out_moe(layer, x, scale_shared=True)) > WRONG


def test_combine_weights_apply_before_the_projection_up(moe):
    """fc2 runs once a token, on the weighted sum; the weights come after the experts' own nonlinearity."""
    layer, x, y = moe
    seen = []
    hook = layer.fc2_latent_proj.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0], output))
    )
    again = layer(x[None])[0]
    hook.remove()
    ((summed_TR, projected_TD),) = seen
    assert summed_TR.shape == (9, 16), "one row a token, not one a choice"
    weighted = written_out_moe(layer, x) - layer.shared_experts(x)
    assert error(projected_TD, weighted) < RIGHT
    assert error(summed_TR @ layer.fc2_latent_proj.weight.T, weighted) < RIGHT, "the weights are already in"
    assert error(again, y) < RIGHT
    assert error(y, written_out_moe(layer, x, weight_at="input")) > WRONG
    assert error(y, written_out_moe(layer, x, weight_at="nowhere")) > WRONG


def test_experts_and_mlp_are_squared_relu_without_a_gate(moe):
    layer, x, y = moe
    names = {name for name, _ in layer.named_parameters()}
    assert not [n for n in names if "gate_proj" in n or n.endswith("bias")]
    for wrong in (F.relu, F.silu, F.gelu, lambda v: F.silu(v) * v):
        assert error(y, written_out_moe(layer, x, act=wrong)) > WRONG

    mlp = double(MLP(32, 20))
    assert [name for name, _ in mlp.named_parameters()] == ["up_proj.weight", "down_proj.weight"]
    hidden = x @ mlp.up_proj.weight.T
    assert error(mlp(x), (hidden.clamp(min=0) ** 2) @ mlp.down_proj.weight.T) < RIGHT
    assert error(mlp(x), hidden.clamp(min=0) @ mlp.down_proj.weight.T) > WRONG


def written_out_mtp(block, embedded, hidden, order="embedding first", final="rmsnorm"):
    first, second = block.layers
    eps = first.enorm.eps
    e, h = rms(embedded, eps) * first.enorm.weight, rms(hidden, eps) * first.hnorm.weight
    x = torch.cat([e, h] if order == "embedding first" else [h, e], -1) @ first.eh_proj.weight.T
    x = x + first.mixer(rms(x, eps) * first.norm.weight)[0]
    x = x + second.mixer(rms(x, eps) * second.norm.weight)
    if final == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    return rms(x, eps) * second.final_layernorm.weight


def test_mtp_final_norm_subtracts_no_mean_unless_asked_to():
    """RMSNorm where the models were trained and served; llama.cpp's LayerNorm only by name."""
    embedded, hidden = normal(1, 7, 32, seed=1), normal(1, 7, 32, seed=2)
    assert HybridConfig.preset("tiny").mtp_final_norm == "rmsnorm"
    y = {}
    for final in ("rmsnorm", "layernorm"):
        block = double(MTPBlock(small_config("M", num_nextn_predict_layers=1, mtp_final_norm=final)))
        y[final] = block(embedded, hidden)[0]
        assert error(y[final], written_out_mtp(block, embedded, hidden, final=final)) < RIGHT
    assert error(y["rmsnorm"], y["layernorm"]) > WRONG


def test_mtp_reads_the_embedding_first_and_norms_both():
    embedded, hidden = normal(1, 7, 32, seed=1) * 3, normal(1, 7, 32, seed=2)
    block = double(MTPBlock(small_config("M", num_nextn_predict_layers=1)))
    y = block(embedded, hidden)[0]
    assert error(y, written_out_mtp(block, embedded, hidden)) < RIGHT
    assert error(y, written_out_mtp(block, embedded, hidden, order="hidden first")) > WRONG
    assert error(block(embedded * 100, hidden * 100)[0], y) < 1e-5, "its inputs' scale must not matter"


def test_rms_norm_subtracts_no_mean_and_works_in_float32():
    layer = HybridLM(small_config("M")).model.norm_f
    scramble(layer)
    x = normal(3, 5, 32, seed=1) + 2
    expected = rms(x, layer.eps) * layer.weight.double()
    assert error(layer(x), expected) < RIGHT
    assert error(F.layer_norm(x, (32,), layer.weight.double()), expected) > WRONG
    low = layer(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, (rms(x.bfloat16().float(), layer.eps) * layer.weight).bfloat16())


def test_the_recurrence_runs_in_float32_in_a_bfloat16_model(monkeypatch):
    """dt, A, the state and the products are float32 islands; the projections are not."""
    seen = {}

    def spy(x, dt, A, Bmat, Cmat, state, *rest):
        seen.update(x=x.dtype, dt=dt.dtype, A=A.dtype, Bmat=Bmat.dtype, Cmat=Cmat.dtype, state=state.dtype)
        return ssd_recurrent(x, dt, A, Bmat, Cmat, state)

    monkeypatch.setattr(mamba2, "ssd_chunked", spy)
    layer = Mamba2(small_config("M")).bfloat16()
    y, state = layer(normal(1, 6, 32, dtype=torch.bfloat16))
    assert set(seen.values()) == {torch.float32} and len(seen) == 6
    assert (
        y.dtype == torch.bfloat16
        and state.ssm_BHPN.dtype == torch.float32
        and state.conv_BKC.dtype == torch.bfloat16
    )
