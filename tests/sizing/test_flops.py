"""FLOPs from arithmetic against torch's own counter, which watches the operators of a real pass."""

import pytest

from minimoe import HybridConfig, catalog
from minimoe.catalog import MLP, ArchitectureSpec, Attention, Mamba2, MoE
from minimoe.sizing import count_parameters, flops_per_token

LENGTH, ROWS = 128, 1  # two chunks at least: of a lone one, backward skips the state that nobody reads


def counted(config, backward, monkeypatch, mtp=True):
    """FLOPs a token by operator, and by module, of one pass with losses.

    The loop over experts, because the counter does not know grouped_mm; attention as plain products, because it does
    not know the fused kernel of CPUs.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from minimoe import HybridLM
    from minimoe.layers import moe

    monkeypatch.setattr(moe, "experts_grouped", moe.experts_loop)
    torch.manual_seed(0)
    model, ids = HybridLM(config), torch.randint(config.vocab_size, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = sum(model.losses(ids, ids)) if mtp else model.loss(ids, ids)
        if backward:
            loss.backward()
    modules = counter.get_flop_counts()
    operators = {str(op).removeprefix("aten."): n / (ROWS * LENGTH) for op, n in modules["Global"].items()}
    return operators, {name: sum(ops.values()) / (ROWS * LENGTH) for name, ops in modules.items()}


def masked_scores(config):
    """What plain products compute for keys that lie ahead, and this package does not count."""
    layers = config.hybrid_override_pattern.count("*") + config.num_nextn_predict_layers
    return layers * 4 * config.num_attention_heads * config.head_dim * (LENGTH - (LENGTH + 1) / 2)


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_forward_against_the_counter(preset, monkeypatch):
    config = HybridConfig.preset(preset)
    operators, _ = counted(config, False, monkeypatch)
    ours = flops_per_token(config, LENGTH)
    assert sum(operators.values()) - masked_scores(config) == pytest.approx(ours.forward, rel=1e-9)
    assert sum(ours.by_kind.values()) == ours.forward


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_training_is_three_forward_passes(preset, monkeypatch):
    config = HybridConfig.preset(preset)
    operators, _ = counted(config, True, monkeypatch)
    # Left out on both sides: the counter takes the gradient of a depthwise convolution for that of a dense one, if it
    # sees it at all. The forward pass has it right, see above.
    products = sum(number for name, number in operators.items() if not name.startswith("convolution"))
    convolution = 2 * config.conv_kernel * config.conv_dim * config.hybrid_override_pattern.count("M")
    ours = 3 * (flops_per_token(config, LENGTH).forward - convolution)
    assert products - 3 * masked_scores(config) == pytest.approx(ours, rel=1e-9)
    assert flops_per_token(config, LENGTH).training == 3 * flops_per_token(config, LENGTH).forward


def test_every_kind_of_layer_against_the_counter(monkeypatch):
    config = HybridConfig.preset("tiny", hybrid_override_pattern="MEM*E-", intermediate_size=96)
    _, modules = counted(config, False, monkeypatch)
    found = dict.fromkeys("ME*-", 0.0)
    for at, letter in enumerate(config.hybrid_override_pattern):
        found[letter] += modules[f"Trunk.layers.{at}.mixer"]
    ours = flops_per_token(config, LENGTH).by_kind
    one = masked_scores(config) / 2  # of two attention layers, the MTP block's among them
    assert found["M"] == ours["mamba2"] + ours["ssd"]
    assert found["E"] == ours["routed_experts"] + ours["shared_experts"] + ours["router"] + ours["latent"]
    assert found["*"] - one == pytest.approx(ours["attention"] + ours["attention_scores"])
    assert found["-"] == ours["mlp"]
    assert modules["MTPBlock"] - one == pytest.approx(ours["mtp"])
    assert modules["Linear"] == ours["head"] + ours["mtp_head"]


def test_without_mtp(monkeypatch):
    config = HybridConfig.preset("tiny")
    operators, _ = counted(config, False, monkeypatch, mtp=False)
    masked = masked_scores(config.replace(num_nextn_predict_layers=0))
    ours = flops_per_token(config, LENGTH, mtp=False)
    assert sum(operators.values()) - masked == pytest.approx(ours.forward, rel=1e-9)
    assert ours == flops_per_token(config.replace(num_nextn_predict_layers=0), LENGTH)


@pytest.mark.parametrize("name", ["nemotron-3-super-120b-a12b", "qwen3-30b-a3b", "step-3.7-flash"])
def test_a_token_alone_costs_two_operations_a_weight(name):
    """What the real models' weights cost is twice what count_parameters says is active, less norms and biases."""
    spec = catalog.model(name).spec
    kinds = flops_per_token(spec, 1, mtp=False).by_kind
    weights = sum(number for kind, number in kinds.items() if kind not in ("attention_scores", "ssd"))
    assert 0.999 < weights / (2 * count_parameters(spec).active_with_head) <= 1


def test_only_attention_grows_with_the_context():
    spec = catalog.model("nemotron-3-nano-30b-a3b").spec
    short, long = (flops_per_token(spec, length).by_kind for length in (1024, 4 * 1024))
    grown = {kind for kind in short if long[kind] != short[kind]}
    assert grown == {"attention_scores"} and long["attention_scores"] / short["attention_scores"] == pytest.approx(4, rel=1e-2)


def test_a_window_is_the_mean_over_its_queries():
    def scores(length, window):
        spec = ArchitectureSpec("x", 100, 64, (Attention(4, 2, 16, sliding_window=window),))
        return flops_per_token(spec, length).by_kind["attention_scores"]

    for length, window in ((5, 3), (3, 3), (2, 3), (7, None), (1, None)):
        seen = [min(t + 1, window or length) for t in range(length)]
        assert scores(length, window) == pytest.approx(4 * 4 * 16 * sum(seen) / length)


def test_what_only_a_spec_can_say():
    d = 64
    spec = ArchitectureSpec("x", 100, d, (MLP(32, gated=True), MoE(8, 2, 16, gated=True), Attention(4, 2, 16, head_gate=True)))
    kinds = flops_per_token(spec, 8).by_kind
    assert kinds["mlp"] == 2 * 3 * d * 32 and kinds["routed_experts"] == 2 * 3 * 2 * d * 16
    assert kinds["attention"] == 2 * d * (2 * 64 + 2 * 32 + 4)
    assert {"latent", "shared_experts", "mtp", "mtp_head"}.isdisjoint(kinds)
    mamba = ArchitectureSpec("x", 100, d, (Mamba2(8, 16, 2, 16),))
    full, short = (flops_per_token(mamba, length).by_kind["ssd"] for length in (128, 16))
    assert full - short == 2 * (128 - 16) * (2 * 16 + 8 * 16)  # a chunk is at most the sequence


def test_wrong_questions_are_refused():
    config = HybridConfig.preset("tiny")
    with pytest.raises(ValueError, match="length=0"):
        flops_per_token(config, 0)
    with pytest.raises(TypeError, match="got dict"):
        flops_per_token({}, 8)
