"""The released models on the meta device: totals to the digit, and transformers' own names and shapes."""

import time

import pytest
import torch
from hf_reference import transformers, transformers_config

from minimoe import HybridLM, catalog

# trunk without MTP, and the MTP block; router correction biases counted
TOTALS = {
    "nemotron-3-nano-30b-a3b": (31_577_940_288, 0),
    "nemotron-3-super-120b-a12b": (120_668_707_840, 2_942_325_248),
    "nemotron-3-ultra-550b-a55b": (549_308_993_536, 11_215_610_368),
    "nemotron-3-nano-4b": (3_973_556_832, 0),
    "nemotron-nano-9b-v2": (8_888_227_328, 0),
}


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_total_to_the_published_digit(name):
    start = time.process_time()
    sizes = {
        n: t.numel() for n, t in HybridLM(catalog.model(name).config, device="meta").state_dict().items()
    }
    assert time.process_time() - start < 5
    trunk, mtp = TOTALS[name]
    assert sum(n for key, n in sizes.items() if not key.startswith("mtp.")) == trunk
    assert sum(n for key, n in sizes.items() if key.startswith("mtp.")) == mtp


@pytest.mark.parametrize(
    "name",
    ["nemotron-3-nano-30b-a3b"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in TOTALS if n != "nemotron-3-nano-30b-a3b"],
)
def test_names_and_shapes_are_those_of_transformers(name):
    ours = HybridLM(catalog.model(name).config, device="meta")
    with torch.device("meta"):
        theirs = transformers.NemotronHForCausalLM(transformers_config(ours))
    assert {n: s for n, s in shapes(ours).items() if not n.startswith("mtp.")} == shapes(theirs)
