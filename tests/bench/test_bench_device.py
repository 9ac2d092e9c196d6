"""The two bounds of a device. Speeds are not asserted, only what they are made of."""

import json
import sys
import time

import pytest

torch = pytest.importorskip("torch")

from minimoe.bench import device as bench  # noqa: E402


class FakeTimer:
    """A Timer whose statement takes the time that ``seconds(timer)`` says."""

    made: list["FakeTimer"] = []

    def seconds(self):
        return 1.0

    def __init__(self, statement, globals, num_threads, timer=None):
        self.statement, self.names, self.num_threads, self.timer = statement, globals, num_threads, timer
        FakeTimer.made.append(self)

    def blocked_autorange(self, min_run_time):
        self.budget = min_run_time
        exec(self.statement, dict(self.names))  # it must at least run
        return type("Measurement", (), {"median": self.seconds()})


@pytest.fixture
def timer(monkeypatch):
    FakeTimer.made = []
    monkeypatch.setattr(bench, "Timer", FakeTimer)
    return FakeTimer


def test_bandwidth_is_bytes_over_the_median_of_the_faster_kernel(timer, monkeypatch):
    monkeypatch.setattr(timer, "seconds", lambda self: 0.5 if "sum" in self.statement else 0.25)
    found = bench.measure_bandwidth("cpu", seconds=0.01, buffer_bytes=1 << 20)
    assert found.buffer_bytes == 1 << 20
    assert found.by_kernel == {"sum": (1 << 20) / 0.5, "matvec": (1 << 20) / 0.25}
    assert (found.kernel, found.bytes_per_second) == ("matvec", (1 << 20) / 0.25)
    assert found.gb_per_second == found.bytes_per_second / 1e9


def test_all_threads_are_timed(timer, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    bench.measure_bandwidth("cpu", seconds=0.01, buffer_bytes=1 << 16)
    assert [made.num_threads for made in timer.made] == [3, 3]


@pytest.mark.skipif(sys.platform == "win32", reason="counts CPU seconds in steps of 16 ms")
def test_one_thread_is_timed_in_cpu_seconds_and_several_by_the_wall(timer, monkeypatch):
    """On a shared core the wall clock also counts the neighbours' work."""
    for threads, clock, by in ((1, "cpu", time.process_time), (2, "wall", None)):
        timer.made.clear()
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        found = bench.measure_bandwidth("cpu", seconds=0.01, buffer_bytes=1 << 16)
        rate = bench.measure_matmul("cpu", torch.float32, seconds=0.01, max_n=16)
        assert found.clock == rate.clock == clock
        assert {made.timer for made in timer.made} == {by}


@pytest.mark.skipif(sys.platform == "win32", reason="counts CPU seconds in steps of 16 ms")
def test_time_in_which_the_process_waits_does_not_count(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    seconds = bench.median_seconds("sleep(0.02)", {"sleep": time.sleep}, 0.0, torch.device("cpu"))
    assert seconds < 0.01


def test_products_of_int8(timer, monkeypatch):
    monkeypatch.setattr(timer, "seconds", lambda self: 1e-3)
    rate = bench.measure_matmul("cpu", torch.int8, seconds=60.0, max_n=64)
    assert (rate.dtype, rate.flop_per_second, rate.reason) == ("int8", 2 * 64**3 / 1e-3, None)
    assert "_int_mm" in timer.made[0].statement


def test_the_buffer_is_larger_than_the_cache_and_smaller_than_memory(monkeypatch):
    monkeypatch.setattr(bench, "last_level_cache_bytes", lambda: 100 << 20)
    monkeypatch.setattr(bench, "memory_bytes", lambda: 1 << 50)
    monkeypatch.setitem(sys.modules, "psutil", None)  # what is free now would change from run to run
    assert bench._buffer_bytes(torch.device("cpu")) == 400 << 20
    monkeypatch.setattr(bench, "last_level_cache_bytes", lambda: None)
    assert bench._buffer_bytes(torch.device("cpu")) == 256 << 20
    monkeypatch.setattr(bench, "memory_bytes", lambda: 1 << 20)
    assert bench._buffer_bytes(torch.device("cpu")) == 1 << 18


def test_matmul_rate_counts_two_operations_a_multiply_add(timer, monkeypatch):
    monkeypatch.setattr(timer, "seconds", lambda self: 1e-3)
    rate = bench.measure_matmul("cpu", torch.float32, seconds=60.0, max_n=128)
    assert (rate.dtype, rate.n, rate.flop_per_second) == ("float32", 128, 2 * 128**3 / 1e-3)


def test_matmul_grows_only_while_the_budget_lasts_and_keeps_the_best_size(timer, monkeypatch):
    monkeypatch.setattr(timer, "seconds", lambda self: {256: 1e-4, 512: 1e-2}[self.names["a"].shape[0]])
    rate = bench.measure_matmul("cpu", torch.float32, seconds=0.2)
    assert [made.names["a"].shape[0] for made in timer.made] == [
        256,
        512,
    ]  # 1,024 would take 0.24 s for three
    assert rate.n == 256


def test_an_unsupported_dtype_is_reported_not_raised():
    rate = bench.measure_matmul("cpu", torch.bool, seconds=0.01, max_n=16)
    assert rate.flop_per_second is None and rate.n is None
    assert rate.dtype == "bool" and rate.reason and "\n" not in rate.reason


def test_a_size_that_runs_out_of_memory_does_not_lose_the_smaller_ones(timer, monkeypatch):
    def seconds(self):
        if self.names["a"].shape[0] > 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1e-4

    monkeypatch.setattr(timer, "seconds", seconds)
    rate = bench.measure_matmul("cpu", torch.float32, seconds=60.0)
    assert (rate.n, rate.reason) == (256, None)


def test_measure_reports_the_machine_and_goes_to_json(monkeypatch):
    monkeypatch.setattr(bench, "_buffer_bytes", lambda device: 1 << 16)
    report = bench.measure("cpu", seconds=0.05)
    data = json.loads(json.dumps(report.to_dict()))
    assert [rate["dtype"] for rate in data["matmul"]] == ["float32", "bfloat16", "float16"]
    assert data["bandwidth"]["bytes_per_second"] > 0
    assert data["machine"]["torch"] == torch.__version__
    assert data["machine"]["threads"] == torch.get_num_threads()
    assert {"cpu", "cores", "memory_bytes", "os", "python", "device_name"} <= data["machine"].keys()


def test_the_budget_is_what_the_timers_get(timer, monkeypatch):
    monkeypatch.setattr(bench, "_buffer_bytes", lambda device: 1 << 16)
    bench.measure("cpu", seconds=8.0)
    bandwidth, matmul = timer.made[:2], timer.made[2:]
    assert sum(made.budget for made in bandwidth) == 2.0
    assert len(matmul) == 3 and all(
        made.budget < 2.0 for made in matmul
    )  # a second each: no larger size fits


@pytest.mark.gpu
def test_cuda_is_waited_for():
    """A kernel that is only launched would seem faster than any card: 1 PB/s, 10 PFLOP/s."""
    report = bench.measure("cuda", seconds=1.0)
    assert report.bandwidth.bytes_per_second < 1e14
    assert all(rate.flop_per_second < 1e16 for rate in report.matmul if rate.flop_per_second)
    assert report.machine["device_memory_bytes"] > 0
