"""A tiny model for all runtimes, and a card as a run makes it."""

import copy

import pytest
import torch
from core_helpers import scramble
from llama_files import plain_file, tiny_file  # noqa: F401

from minimoe import HybridConfig, HybridLM
from minimoe.interop import save_hf

ROW = {
    "runtime": "llama.cpp", "model": "small-Q8_0", "format": "Q8_0", "device": "cpu", "threads": 1, "file_bytes": 15_714_336,
    "gpu_layers": 0, "cpu_moe": 0, "test": "tg128", "unit": "tokens/s", "tokens": 128, "depth": 0, "batch": 1,
    "median": 700.0, "p10": 650.0, "p90": 720.0, "n": 10, "clock": "cpu", "busy": 0.99, "ceiling": 2800.0, "share": 0.25,
    "bound": "memory", "moved_bytes": 8e6, "flops": 1.4e7,
}  # fmt: skip
RATES = {
    "bandwidth": {"read_bytes_per_second": 14e9, "copy_bytes_per_second": 10e9, "buffer_bytes": 1 << 30, "kernel": "matvec",
                  "clock": "cpu", "cache_bytes": 300 << 20,
                  "by_size": [{"buffer_bytes": 7_900_000, "read_bytes_per_second": 22e9}]},
    "matmul": {"float32": {"flop_per_second": 150e9, "n": 2048, "clock": "cpu"},
               "float16": {"flop_per_second": None, "n": None, "clock": "cpu", "missing": "not implemented"}},
    "launch_latency_s": 3e-6, "round_trip_s": None,
}  # fmt: skip
CARD = {
    "schema": 1, "name": "a-machine", "date": "2026-11-22", "minimoe": "0.1.0", "commit": "0123456789ab",
    "machine": {"os": "Linux-6.1", "device": "cpu", "device_name": "Some CPU", "cores": 2, "driver": None},
    "versions": {"minimoe": "0.1.0", "llama-cpp-python": "0.3.36"},
    "settings": {"tasks": ["tg128"], "depths": [0], "batches": [1], "rounds": 2, "repeats": 5, "quick": False,
                 "load_before": 0.1, "threads_wait": "passive"},
    **RATES, "cpu_threads": {"1": RATES}, "rows": [ROW],
}  # fmt: skip


@pytest.fixture
def card():
    """Numbers are invented, keys are not: test_bench_command checks a real one by the same schema."""
    return copy.deepcopy(CARD)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A directory that minimoe and transformers open, with random weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_hf(scramble(HybridLM(HybridConfig.preset("tiny", num_nextn_predict_layers=0))), folder)
    return folder


@pytest.fixture(autouse=True)
def _as_it_was():
    """Runners of torch change settings of their whole process, which elsewhere is a child."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    assert torch.is_grad_enabled()  # or every test after it would train nothing
    torch.set_flush_denormal(False)
