"""Memory of a training step: what autograd is seen to keep, and the peak of a step, against arithmetic."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from minimoe import HybridConfig, HybridLM, catalog
from minimoe.data import Tokens
from minimoe.layers import attention
from minimoe.model import MAX_LOGIT_BYTES
from minimoe.sizing import count_parameters, largest_batch, training_bytes
from minimoe.sizing.activations import LOGITS
from minimoe.train import Training, TrainOptions

ROOT = Path(__file__).parents[2]
TINY = HybridConfig.preset("tiny")
CUT = HybridConfig.preset("base-12gb", hybrid_override_pattern="ME*M")  # its blocks, fewer of them


class Kept:
    """A tensor in autograd's hands."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def seen(config, batch, length, precision="float32", mtp=True, recompute=False, documents=None):
    """Bytes that are saved when the forward pass has ended: each storage once, weights not."""
    torch.manual_seed(0)
    model = HybridLM(config)
    model.model.recompute = recompute
    ids, targets = torch.randint(config.vocab_size, (2, batch, length))
    segments = None if documents is None else (torch.arange(length) * documents // length).expand(batch, length)
    mine = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor):
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        loss = model.losses(ids, targets, segment_ids=segments) if mtp else model.loss(ids, targets, segment_ids=segments)
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in alive}
    del loss  # until here it held the graph
    return sum(size for where, size in storages.items() if where not in mine)


def predicted(config, batch, length, **how):
    return training_bytes(config, batch, length, **{"precision": "float32", "device": "cpu"} | how).activations


HOWS = [
    {}, {"mtp": False}, {"documents": 3}, {"recompute": True}, {"recompute": True, "documents": 2, "mtp": False},
    {"precision": "bfloat16"}, {"precision": "bfloat16", "documents": 2}, {"precision": "bfloat16", "recompute": True},
]  # fmt: skip


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize(("preset", "batch", "length"), [
    ("tiny", 2, 64), ("tiny", 3, 50), ("small", 2, 130), ("small", 2, 64), ("awkward", 1, 100),
])  # fmt: skip
def test_what_autograd_keeps(preset, batch, length, how):
    """Chunks that fill the window and chunks that do not; a single chunk, whose state nobody reads."""
    config = HybridConfig.preset(preset)
    rel = 0.03 if how.get("precision") == "bfloat16" else 0.001  # how many rows are repeated depends on the routing
    assert predicted(config, batch, length, **how) == pytest.approx(seen(config, batch, length, **how), rel=rel)


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_latent_size": None}, {"norm_topk_prob": False}, {"n_groups": 8}, {"n_groups": 1}, {"num_key_value_heads": 4},
        {"hybrid_override_pattern": "M-*E", "intermediate_size": 96}, {"vocab_size": 65_536}, {"chunk_size": 40},
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_other_shapes(changes, precision):
    """With 65,536 words, 256 tokens have more than 64 MB of logits: they are sliced, and not kept."""
    config, how = HybridConfig.preset("tiny", **changes), {"precision": precision, "documents": 2}
    rel = 0.03 if precision == "bfloat16" else 0.01
    assert predicted(config, 4, 80, **how) == pytest.approx(seen(config, 4, 80, **how), rel=rel)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"documents": 2, "precision": "bfloat16"}, {"recompute": True}], ids=str)
def test_the_large_preset(how):
    config = HybridConfig.preset("base-12gb")
    assert predicted(config, 1, 160, **how) == pytest.approx(seen(config, 1, 160, **how), rel=0.03)


@pytest.mark.parametrize(("precision", "documents"), [("float32", None), ("float32", 2), ("bfloat16", 2)])
def test_attention_with_a_key_head_for_each_query_head(precision, documents, monkeypatch):
    """What is done on a GPU for grouped queries in float32 or with a mask, done here; the norms here keep the
    normalised vector as well."""
    config, batch, length = HybridConfig.preset("small", hybrid_override_pattern="*", num_nextn_predict_layers=0), 2, 128
    how = {"precision": precision, "documents": documents}
    monkeypatch.setattr(attention, "wants_equal_heads", lambda q_BHLP, mask: True)
    kept = seen(config, batch, length, mtp=False, **how)
    normalised = 2 * 4 * config.hidden_size * batch * length
    assert predicted(config, batch, length, device="cuda", **how) + normalised == pytest.approx(kept, rel=2e-3)


def peak(config, batch, length, documents=False, mtp=True, **options):
    """Most bytes that are allocated during a step, beside weights and moments: torch's own record of its allocator."""
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, 50_000).astype("uint16")
    run = Training(
        HybridLM(config), Tokens(ids, len(ids)),
        TrainOptions(batch=batch, length=length, documents=documents, mtp_weight=0.3 * mtp, **options),
    )  # fmt: skip
    run.step()  # makes the moments
    run.optimizer.zero_grad(set_to_none=True)
    gc.collect()  # what is freed in between would count as less than nothing
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run.step()
    run.close()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = np.array([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(changes.cumsum().max())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"recompute": True}, {"accumulate": 2}, {"accumulate": 2, "recompute": True}, {"documents": True}, {"mtp": False}],
    ids=str,
)
@pytest.mark.parametrize(("config", "batch", "length"), [
    (TINY, 4, 64),
    pytest.param(HybridConfig.preset("small"), 4, 128, marks=pytest.mark.slow),
    pytest.param(CUT, 2, 128, marks=pytest.mark.slow),
], ids=["tiny", "small", "cut"])  # fmt: skip
def test_the_peak_of_a_step(config, batch, length, options, precision):
    """Of everything, weights and moments included, within 5 %."""
    options = options | {"precision": precision}
    how = options | {"documents": 1 if options.get("documents") else None}
    step = training_bytes(config, batch, length, device="cpu", **how)
    measured = step.weights + step.moments + peak(config, batch, length, **options)
    assert step.peak == pytest.approx(measured, rel=0.05)


def test_logits_in_slices():
    """More than 64 MB of them: made twice, slice by slice."""
    assert LOGITS == MAX_LOGIT_BYTES
    config = HybridConfig.preset("tiny", vocab_size=65_535)
    step = training_bytes(config, 4, 96, precision="float32", device="cpu")
    assert step.saved["head"] < LOGITS < 4 * 65_535 * 4 * 96 and step.peak_at == "head"
    measured = step.weights + step.moments + peak(config, 4, 96, precision="float32")
    assert step.peak == pytest.approx(measured, rel=0.05)


def test_what_the_experiment_measured():
    """experiments/10_pretrain.py watches every operator of a step: gradients and activations at their most."""
    kept = json.loads((ROOT / "results/10_pretrain.json").read_text())["numbers"]["kept"]
    ways = {"whole": {}, "in four parts": {"accumulate": 4}, "recomputed": {"recompute": True},
            "both": {"accumulate": 4, "recompute": True}}  # fmt: skip
    assert set(kept["parts"]) == set(ways)
    for name, how in ways.items():
        step = training_bytes(
            HybridConfig.preset(kept["preset"]), kept["batch"], kept["length"], precision="float32", device="cpu", **how
        )
        assert step.peak - step.weights - step.moments == pytest.approx(kept["parts"][name]["bytes"], rel=0.1), name


def test_sixteen_bytes_a_weight():
    step, count = training_bytes(TINY, 1, 2), count_parameters(TINY)
    biases = 3 * TINY.n_routed_experts  # moved without a gradient
    assert step.weights == 4 * (count.total + count.mtp)
    assert step.moments == 2 * step.gradients == 8 * (count.total + count.mtp - biases)
    assert training_bytes(TINY, 1, 2, mtp=False).gradients == 4 * (count.total - 2 * TINY.n_routed_experts)
    base = training_bytes(HybridConfig.preset("base-12gb"), 1, 2, precision="float32")
    assert base.peak > base.weights + base.gradients + base.moments > 3.08e9


def test_activations_grow_with_the_tokens_and_shrink_with_parts_and_recomputing():
    small = HybridConfig.preset("small")
    whole, twice, parts = (training_bytes(small, b, 256, accumulate=a).activations for b, a in ((4, 1), (8, 1), (8, 2)))
    assert parts == whole < twice < 2 * whole  # the copies of weights are made once
    kept, again = (training_bytes(small, 8, 256, recompute=r) for r in (False, True))
    assert again.peak < kept.peak and again.saved["mamba2"] == 3 * 4 * 512 * 8 * 256
    assert kept.saved["mtp"] == again.saved["mtp"]  # not a block of the trunk


def test_the_largest_batch_is_the_largest():
    config = HybridConfig.preset("base-12gb")
    for how in ({}, {"recompute": True}, {"precision": "float32", "documents": 3}, {"recompute": True, "accumulate": 4}):
        rows, parts = largest_batch(config, 1024, 12e9, **how), how.get("accumulate", 1)
        assert rows > 0 and training_bytes(config, rows * parts, 1024, **how).fits(12e9)
        assert not training_bytes(config, (rows + 1) * parts, 1024, **how).fits(12e9)
    assert largest_batch(config, 1024, 3e9) == 0
    step = training_bytes(config, 4, 1024)
    assert step.fits(step.peak, reserve=0) and not step.fits(step.peak, reserve=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch=0: must be 1 or more"),
        ({"length": -1}, "length=-1: must be 1 or more"),
        ({"accumulate": 3}, "accumulate=3: must divide batch=4"),
        ({"documents": 0}, "documents=0: must be 1 or more"),
        ({"precision": "fp8"}, "precision='fp8': must be one of float32, bfloat16"),
        ({"device": "tpu"}, "device='tpu': must be cpu or cuda"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError) as caught:
        training_bytes(TINY, **{"batch": 4, "length": 32} | change)
    assert str(caught.value) == message


def test_only_what_can_be_trained_here():
    with pytest.raises(TypeError, match="expected a HybridConfig, got ArchitectureSpec"):
        training_bytes(catalog.model("qwen3-30b-a3b").spec, 1, 128)


def test_needs_no_torch():
    code = "import sys; from minimoe.sizing import training_bytes; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
