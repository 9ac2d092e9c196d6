"""The catalogue: every entry is complete, and agrees with what its sources printed."""

import dataclasses
import json
from importlib import resources

import pytest

from minimoe import catalog
from minimoe.config import ConfigError, HybridConfig
from minimoe.sizing import count_parameters

NAMES = {
    "nemotron-3-nano-30b-a3b", "nemotron-3-super-120b-a12b", "nemotron-3-ultra-550b-a55b",
    "nemotron-3-nano-4b", "nemotron-nano-9b-v2", "nemotron-3.5-lightning-30b-a3b",
    "nemotron-labs-3-puzzle-75b-a9b", "qwen3-30b-a3b", "qwen3-nemotron-235b-a22b-genrm", "step-3.7-flash",
}  # fmt: skip
NO_CONFIG = {
    "nemotron-labs-3-puzzle-75b-a9b", "qwen3-30b-a3b", "qwen3-nemotron-235b-a22b-genrm", "step-3.7-flash",
}  # fmt: skip


def test_names():
    assert set(catalog.models()) == NAMES
    assert len(catalog.models()) == len(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_entries_are_complete(name):
    entry = catalog.model(name)
    assert entry.name == entry.spec.name == name
    assert "/" in entry.source
    assert entry.published
    for figure in entry.published.values():
        assert figure.value > 0 and figure.source
    assert (entry.config is None) == (name in NO_CONFIG)
    if entry.config is not None:
        assert isinstance(entry.config, HybridConfig)
        assert catalog.spec_from_config(entry.config, name) == entry.spec


@pytest.mark.parametrize("name", sorted(NAMES))
def test_published_figures_hold_for_the_shape(name):
    """To the digit where a source counts parameters or bytes, else to its last digit, rounded or cut off."""
    entry = catalog.model(name)
    count = count_parameters(entry.spec)
    computed = {
        "total_parameters": count.total,
        "total_parameters_with_mtp": count.total + count.mtp,
        "bf16_bytes": 2 * count.total,
        "bf16_bytes_with_mtp": 2 * (count.total + count.mtp),
        "active_parameters": count.active_with_head,
        "active_parameters_with_embeddings": count.active_with_embeddings,
    }
    if name == "nemotron-3-super-120b-a12b":  # its report leaves the routers out
        for key in ("total_parameters", "active_parameters", "active_parameters_with_embeddings"):
            computed[key] -= count.by_kind["router"]
    if name == "step-3.7-flash":  # bfloat16 with float32 router biases; each MTP module stores a head of its own
        routers = 2 * sum(b.experts for b in entry.spec.blocks if isinstance(b, catalog.MoE))
        heads = 2 * len(entry.spec.mtp) * entry.spec.vocab_size * entry.spec.hidden_size
        computed["checkpoint_bytes_without_mtp_heads"] = computed["bf16_bytes_with_mtp"] + routers
        computed["checkpoint_bytes"] = computed["bf16_bytes_with_mtp"] + routers + heads
    compared = 0
    for key, figure in entry.published.items():
        if key in computed:
            digits = str(figure.value).rstrip("0")  # 31600000000 was printed as 31.6 billion
            unit = 10 ** (len(str(figure.value)) - len(digits)) if len(digits) < 6 else 0
            assert abs(computed[key] - figure.value) <= unit, (key, computed[key], figure)
            compared += 1
    assert compared


def test_blocks_of_nano():
    spec = catalog.model("nemotron-3-nano-30b-a3b").spec
    assert [spec.count(kind) for kind in ("mamba2", "attention", "moe", "mlp")] == [23, 6, 23, 0]
    assert spec.blocks[0] == catalog.Mamba2(heads=64, head_dim=64, groups=8, state_size=128)
    assert spec.blocks[1] == catalog.MoE(128, 6, 1856, shared_width=3712, router_bias=True)
    assert spec.blocks[5] == catalog.Attention(heads=32, kv_heads=2, head_dim=128)
    assert spec.mtp == () and spec.context == 262_144


def test_lightning_is_nano_with_an_mtp_block():
    nano, lightning = (
        catalog.model(name) for name in ("nemotron-3-nano-30b-a3b", "nemotron-3.5-lightning-30b-a3b")
    )
    assert lightning.spec.blocks == nano.spec.blocks
    assert lightning.config == nano.config.replace(num_nextn_predict_layers=1)
    (mtp,) = lightning.spec.mtp
    assert [type(block) for block in mtp.blocks] == [catalog.Attention, catalog.MoE]


def test_layers_of_step():
    """A full layer, then three with a window, and more query heads in those; the first three MLPs are dense."""
    spec = catalog.model("step-3.7-flash").spec
    attention, mlps = spec.blocks[::2], spec.blocks[1::2]
    assert len(attention) == len(mlps) == 45
    full = catalog.Attention(64, 8, 128, qk_norm=True, head_gate=True)
    sliding = catalog.Attention(96, 8, 128, sliding_window=512, qk_norm=True, head_gate=True)
    assert list(attention) == [sliding if layer % 4 else full for layer in range(45)]
    dense = catalog.MLP(11_264, gated=True)
    assert mlps[:3] == (dense,) * 3
    assert set(mlps[3:]) == {catalog.MoE(288, 8, 1280, gated=True, shared_width=1280, router_bias=True)}
    assert spec.mtp == (catalog.MTP((sliding, dense)),) * 3


def test_puzzle_is_super_with_narrower_experts_and_a_smaller_state():
    """Every expert layer has a width and a top-k of its own: 5 widths, 7 top-k (llama.cpp#25444)."""
    puzzle, whole = (
        catalog.model(name).spec for name in ("nemotron-labs-3-puzzle-75b-a9b", "nemotron-3-super-120b-a12b")
    )
    experts = [block for block in puzzle.blocks if isinstance(block, catalog.MoE)]
    assert {e.width for e in experts} == {1280, 1536, 1792, 2048, 2688}
    assert {e.top_k for e in experts} == {4, 8, 10, 12, 14, 16, 18}
    assert puzzle.mtp == whole.mtp

    def restored(block):
        if isinstance(block, catalog.MoE):
            return dataclasses.replace(block, width=2688, top_k=22)
        return dataclasses.replace(block, state_size=128) if isinstance(block, catalog.Mamba2) else block

    assert tuple(map(restored, puzzle.blocks)) == whole.blocks


def test_the_reward_model_has_no_block_of_its_own():
    spec = catalog.model("qwen3-nemotron-235b-a22b-genrm").spec
    assert spec.blocks[0] == catalog.Attention(64, 4, 128, qk_norm=True)
    assert spec.blocks[1] == catalog.MoE(128, 8, 1536, gated=True)
    assert spec.blocks == spec.blocks[:2] * 94 and spec.mtp == ()


def test_shapes_are_shared_and_changed_by_name():
    data = {
        "vocab_size": 8, "hidden_size": 8, "shapes": {"E": {"kind": "moe", "experts": 4, "top_k": 2, "width": 6}},
        "layers": [{"times": 2, "blocks": ["E", {"like": "E", "top_k": 1}, {"kind": "mlp", "width": 3}]}],
    }  # fmt: skip
    spec = catalog.spec_from_dict("x", data)
    assert spec.blocks == (catalog.MoE(4, 2, 6), catalog.MoE(4, 1, 6), catalog.MLP(3)) * 2
    assert data["shapes"]["E"] == {"kind": "moe", "experts": 4, "top_k": 2, "width": 6}


def test_unknown_names_suggest_a_close_one_and_list_all():
    with pytest.raises(catalog.UnknownModel) as caught:
        catalog.model("Nemotron-3-Super-120B")
    message = str(caught.value)
    assert "'Nemotron-3-Super-120B'; did you mean nemotron-3-super-120b-a12b?" in message
    assert all(name in message for name in NAMES) and "\n" not in message
    with pytest.raises(catalog.UnknownModel) as caught:
        catalog.model("zzz")
    assert "did you mean" not in str(caught.value)


def test_data_files_are_used():
    """Every JSON file beside the index belongs to an entry, so none is shipped for nothing."""
    files = {
        item.name for item in resources.files("minimoe.catalog").iterdir() if item.name.endswith(".json")
    }
    index = json.loads(resources.files("minimoe.catalog").joinpath("models.json").read_text(encoding="utf-8"))
    beside_models = {"models.json", "devices.json", "files.json", "checkpoints.json"}
    assert files - beside_models == {item.get("config") or item["spec"] for item in index.values()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: catalog.Attention(heads=6, kv_heads=4, head_dim=8), "Attention.heads=6: must be divisible"),
        (lambda: catalog.Attention(heads=6, kv_heads=0, head_dim=8), "Attention.kv_heads=0"),
        (lambda: catalog.Attention(4, 4, 8, sliding_window=0), "Attention.sliding_window=0"),
        (
            lambda: catalog.Mamba2(heads=6, head_dim=8, groups=4, state_size=8),
            "Mamba2.heads=6: must be divisible",
        ),
        (lambda: catalog.MLP(width=1.5), "MLP.width=1.5"),
        (lambda: catalog.MoE(experts=4, top_k=5, width=8), "MoE.top_k=5: must be at most experts=4"),
        (lambda: catalog.MoE(experts=4, top_k=2, width=8, latent=0), "MoE.latent=0"),
        (lambda: catalog.ArchitectureSpec("x", 8, 8, ()), "ArchitectureSpec.blocks"),
        (
            lambda: catalog.ArchitectureSpec("x", 8, 8, (catalog.MoE(4, 2, 8, latent=8),)),
            "MoE.latent=8: must be below",
        ),
    ],
)
def test_impossible_blocks_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
