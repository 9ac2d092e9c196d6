"""base-12gb under the cap that a 12 GB card sets: needs CUDA, and a larger card proves it as well."""

import numpy as np
import pytest
import torch

from minimoe import HybridConfig, HybridLM
from minimoe.data import Tokens
from minimoe.train import Training, TrainOptions

pytestmark = pytest.mark.gpu
CAP = 11e9


@pytest.fixture(autouse=True)
def capped():
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / torch.cuda.get_device_properties(0).total_memory))
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.empty_cache()


def training(**options) -> Training:
    torch.manual_seed(0)
    config = HybridConfig.preset("base-12gb")
    ids = np.random.default_rng(0).integers(3, config.vocab_size, 1 << 20, dtype=np.uint16)
    return Training(HybridLM(config, device="cuda"), Tokens(ids, len(ids)), TrainOptions(**options))


def test_a_step_of_base_12gb_fits():
    """Without anything done against it: 3.1 GB of weights, gradients and AdamW, and 1.8 MB a token."""
    run = training(batch=2, length=1024)
    steps = [run.step(), run.step()]
    assert all(np.isfinite(step.loss) for step in steps) and not any(step.note for step in steps)
    assert 3e9 < torch.cuda.max_memory_allocated() <= torch.cuda.max_memory_reserved() <= CAP


def test_with_recomputing_four_times_as_much_fits():
    run = training(batch=8, length=1024, recompute=True)
    steps = [run.step(), run.step()]
    assert all(np.isfinite(step.loss) for step in steps) and not any(step.note for step in steps)
    assert torch.cuda.max_memory_reserved() <= CAP


def test_recomputing_needs_less_memory():
    torch.manual_seed(0)
    ours = HybridLM(HybridConfig.preset("base-12gb"), device="cuda")
    ids = torch.randint(3, ours.config.vocab_size, (2, 1024), device="cuda")
    peaks = []
    for recompute in (False, True):
        ours.model.recompute = recompute
        ours.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = ours.loss(ids, ids)
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.75 * peaks[0]


def test_a_batch_that_does_not_fit_is_halved_and_training_goes_on():
    run = training(batch=64, length=1024)
    first, second = run.step(), run.step()
    assert "out of memory" in first.note and run.accumulate > 1 and np.isfinite([first.loss, second.loss]).all()
    assert torch.cuda.max_memory_reserved() <= CAP
