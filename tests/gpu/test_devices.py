"""The model computes on a GPU what it computes on a CPU, by the fast forms and by those that other cards take.

Every test that can also runs on the CPU, so that a mistake in it shows without a GPU.
"""

import contextlib

import numpy as np
import pytest
import torch
from core_helpers import scramble, small_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from minimoe import HybridConfig, HybridLM, generate
from minimoe.data import Tokens
from minimoe.interop import load_hf, save_hf
from minimoe.layers import experts_grouped, experts_loop, moe, without_grouped_mm
from minimoe.train import Training, TrainOptions

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BOTH = pytest.mark.parametrize("device", DEVICES)
QUICK = TrainOptions(steps=4, batch=4, length=32, precision="float32")


@pytest.fixture(autouse=True)
def exact_float32():
    """No TF32 on the GPU, or float32 there would not be float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def model(device: str = "cpu", **changes) -> HybridLM:
    """The same weights on every device."""
    return scramble(HybridLM(small_config(num_nextn_predict_layers=1, **changes))).to(device)


def ids(batch: int = 2, length: int = 37) -> torch.Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def tokens() -> Tokens:
    return Tokens(np.random.default_rng(0).integers(0, 61, 4000).astype(np.uint16), 4000)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference as a part of the largest number."""
    one, other = (m.detach().cpu().double() for m in (one, other))
    return float((one - other).abs().max() / other.abs().max())


def gradients(ours: HybridLM, precision: torch.dtype | None = None) -> torch.Tensor:
    device = ours.lm_head.weight.device
    batch = ids(4, 33).to(device)
    ours.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype=precision or torch.bfloat16, enabled=precision is not None):
        main, mtp = ours.losses(batch[:, :-1], batch[:, 1:])
    (main + mtp).backward()
    return torch.cat([p.grad.flatten().double().cpu() for p in ours.parameters() if p.grad is not None])


@BOTH
def test_logits_are_the_definitions(device):
    """float64 on the CPU is the yardstick."""
    exact = model().double()(ids()).logits
    assert apart(model(device)(ids().to(device)).logits, exact) < 1e-4


@BOTH
def test_any_split_into_calls_gives_the_same_logits(device):
    ours, row = model(device), ids().to(device)
    whole, state, parts = ours(row).logits, None, []
    for part in row.split([1, 9, 1, 20, 6], 1):
        out = ours(part, state)
        state = out.state
        parts.append(out.logits)
    assert apart(torch.cat(parts, 1), whole) < 1e-4


@BOTH
def test_packed_documents_stay_apart(device):
    ours, row = model(device), ids(1, 30).to(device)
    segments = torch.tensor([[0] * 11 + [1] * 19], device=device)
    packed = ours(row, segment_ids=segments).logits
    assert apart(packed[:, 11:], ours(row[:, 11:]).logits) < 1e-4


@BOTH
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("context", [contextlib.nullcontext, without_grouped_mm], ids=["fast", "fallback"])
def test_experts_of_every_dtype_equal_the_loop(device, dtype, bound, context):
    random = torch.Generator().manual_seed(0)
    T, E, K, R, F_ = 96, 8, 2, 32, 48
    x, up, down = (torch.randn(shape, generator=random) for shape in ((T, R), (E, F_, R), (E, R, F_)))
    up, down = up / R**0.5, down / F_**0.5
    experts = torch.rand(T, E, generator=random).topk(K).indices.to(device)
    weights = torch.rand(T, K, generator=random)
    exact = experts_loop(x.double(), up.double(), down.double(), experts.cpu(), weights.double())
    with context():
        y = experts_grouped(*(m.to(device, dtype) for m in (x, up, down)), experts, weights.to(device))
    assert y.dtype == dtype and apart(y, exact) < bound


@BOTH
def test_without_grouped_mm_calls_none(device, monkeypatch):
    if not hasattr(moe.F, "grouped_mm"):
        pytest.xfail("this build of torch has no grouped_mm at all")
    calls, grouped_mm = [], moe.F.grouped_mm
    monkeypatch.setattr(moe.F, "grouped_mm", lambda *args, **words: calls.append(1) or grouped_mm(*args, **words))
    ours = HybridLM(HybridConfig.preset("tiny"), device=device)
    batch = torch.zeros(2, 32, dtype=torch.int64, device=device)

    def forward() -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return ours.loss(batch, batch)

    fast = forward()
    assert calls, "the fast form was not taken"
    calls.clear()
    with without_grouped_mm():
        slow = forward()
    assert not calls and abs(fast.item() - slow.item()) < 1e-2
    forward()
    assert calls, "the switch was not put back"


@BOTH
@pytest.mark.parametrize(
    "context", [without_grouped_mm, lambda: sdpa_kernel([SDPBackend.MATH])], ids=["experts", "attention"]
)
def test_another_form_has_the_same_gradient(device, context):
    """In float32 to rounding; in bfloat16 it may be off by what bfloat16 itself is off.

    At fresh weights: at the scrambled ones' scale, rounding to bfloat16 sends tokens to other experts.
    """
    torch.manual_seed(0)
    ours = HybridLM(HybridConfig.preset("tiny")).to(device)
    exact = gradients(ours)
    fast = gradients(ours, torch.bfloat16)
    with context():
        assert apart(gradients(ours), exact) < 1e-4
        slow = gradients(ours, torch.bfloat16)
    rounding = float((fast - exact).norm() / exact.norm())
    assert 1e-4 < rounding < 0.2
    assert float((slow - fast).norm() / fast.norm()) < 4 * rounding


@BOTH
def test_recomputing_gives_the_same_gradient(device):
    ours = model(device)
    kept = gradients(ours)
    ours.model.recompute = True
    assert apart(gradients(ours), kept) < 1e-5


@BOTH
def test_accumulation_gives_the_same_step(device):
    runs = []
    for accumulate in (1, 4):
        training = Training(model(device), tokens(), TrainOptions(**{**vars(QUICK), "accumulate": accumulate}))
        runs.append([training.step() for _ in range(3)])
        training.close()
    for one, other in zip(*runs):
        assert one.loss == pytest.approx(other.loss, rel=1e-4) and one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)


@BOTH
def test_a_restored_run_goes_on_as_if_nothing_had_been(device, tmp_path):
    straight = Training(model(device), tokens(), QUICK)
    expected = [straight.step().loss for _ in range(4)]
    broken = Training(model(device), tokens(), QUICK)
    losses = [broken.step().loss for _ in range(2)]
    torch.save(broken.state(), tmp_path / "state.pt")
    resumed = Training(HybridLM(broken.model.config, device=device), tokens(), QUICK)
    resumed.restore(torch.load(tmp_path / "state.pt", map_location=device, weights_only=True))
    losses += [resumed.step().loss for _ in range(2)]
    # a GPU adds up in an order of its own: index_add is not deterministic there
    assert losses == pytest.approx(expected, rel=0 if device == "cpu" else 1e-4)


@BOTH
def test_training_in_the_devices_own_precision_learns(device):
    torch.manual_seed(0)
    period = Tokens((np.arange(4000) % 7 + 3).astype(np.uint16), 4000)
    ours = HybridLM(small_config(num_nextn_predict_layers=1), device=device)
    training = Training(ours, period, TrainOptions(steps=40, batch=4, length=24, lr=1e-2))
    losses = [training.step().loss for _ in range(40)]
    assert losses[0] > 3.5 and losses[-1] < 1.5
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


@BOTH
def test_greedy_text_is_the_cpus(device):
    prompts = [ids(1, 9)[0].tolist(), ids(1, 4)[0].tolist()]
    written = generate(model(device), prompts, max_new_tokens=12).ids
    assert written == generate(model(), prompts, max_new_tokens=12).ids
    assert written == [generate(model(device), [prompt], max_new_tokens=12).ids[0] for prompt in prompts]


@BOTH
def test_weights_go_to_disk_and_back(device, tmp_path):
    ours = model(device)
    save_hf(ours, tmp_path / "model")
    again = load_hf(tmp_path / "model", device=device)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))
    assert again.lm_head.weight.device.type == device


@BOTH
def test_a_model_in_float16_is_close(device):
    """No form of it may need bfloat16."""
    exact = model().double()(ids()).logits
    assert apart(model(device).half()(ids().to(device)).logits, exact) < 0.05
