"""From samples to rows: what counts, what is missing, and what is refused."""

import pytest

from minimoe.bench.rows import Peaks, Samples, rows, spread
from minimoe.bench.variants import Task, Variant

TG, PP, SERVE = Task("tg", 100), Task("pp", 50, 0, 4), Task("serve", 4, prompt=50)
BANDWIDTH = {"read_bytes_per_second": 1e9, "by_size": [], "cache_bytes": None}


class FixedDemand:
    """A model that needs 1 MB a step; the real ones are in test_bench_bounds."""

    class weights:
        tensors = ()

    def bound(self, task, read, flop_per_second, blocks, ram):
        return {"ceiling": read(1e6) / 1e6, "bound": "memory", "moved_bytes": 1e6, "flops": 1.0}


def samples(items, ends=(), tasks=(TG,)):
    variant = Variant("minimoe", "/somewhere/tiny", "tiny", "float32", "cpu", 1, 123)
    return Samples(variant, tasks, list(items), list(ends))


def timed(task, seconds, **more):
    return {"task": task.__dict__, "seconds": seconds, "clock": "cpu", "busy": 0.97} | more


def rate_row(items, ends=(), task=TG, peaks=None):
    return rows(samples(items, ends, (task,)), FixedDemand(), peaks or Peaks(BANDWIDTH, None))[0]


def test_spread_is_linear_between_samples():
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3.0, "p10": pytest.approx(1.4), "p90": pytest.approx(4.6), "n": 5}
    assert spread([7.0]) == {"median": 7.0, "p10": 7.0, "p90": 7.0, "n": 1}


def test_samples_of_all_rounds_are_one_median():
    row = rate_row([timed(TG, [0.2, 0.5]), timed(TG, [0.25], busy=0.4)])
    assert (row["median"], row["n"], row["unit"]) == (400.0, 3, "tokens/s")
    assert (row["ceiling"], row["share"], row["bound"]) == (1000.0, 0.4, "memory")
    assert (row["clock"], row["busy"], row["file_bytes"]) == ("cpu", 0.4, 123)
    assert "path" not in row


def test_a_batch_counts_the_tokens_of_all_sequences():
    assert rate_row([timed(PP, [2.0])], task=PP)["median"] == 4 * 50 / 2.0


def test_more_than_the_measured_peak_is_refused_not_printed():
    row = rate_row([timed(TG, [0.08, 0.09])])
    assert "median" not in row and "share" not in row
    assert "118% of what the device's measured bandwidth allows" in row["refused"] and "\n" not in row["refused"]
    exact = rate_row([timed(TG, [0.1])])
    assert exact["share"] == 1.0 and "refused" not in exact


def test_a_peak_counts_where_the_bytes_fit_a_cache():
    cached = Peaks(BANDWIDTH | {"by_size": [{"buffer_bytes": 900_000, "read_bytes_per_second": 4e9}]}, None)
    assert rate_row([timed(TG, [0.08])], peaks=cached)["ceiling"] == 4000.0


def test_a_process_that_died_costs_its_own_samples():
    row = rate_row([timed(TG, [0.5])], ends=["its process ended with SIGKILL"])
    assert row["n"] == 1 and row["note"] == "one process ended early: its process ended with SIGKILL"
    row = rate_row([], ends=["its process ended with SIGILL"])
    assert row["missing"] == "its process ended with SIGILL" and "median" not in row


def test_a_task_that_failed_says_why_and_the_others_count():
    items = [{"task": PP.__dict__, "missing": "out of memory"}, timed(TG, [0.5])]
    one, other, *_ = rows(samples(items, tasks=(PP, TG)), FixedDemand(), Peaks(BANDWIDTH, None))
    assert one["missing"] == "out of memory" and other["median"] == 200.0


@pytest.mark.parametrize(("demand", "peaks", "why"), [("no such family", None, "no such family"), (FixedDemand(), "died", "died")])
def test_without_a_ceiling_the_figure_stays_and_says_why(demand, peaks, why):
    row = rows(samples([timed(TG, [0.5])]), demand, peaks or Peaks(BANDWIDTH, None))[0]
    assert row["median"] == 200.0 and row["no_ceiling"] == why and "ceiling" not in row


def test_serve_is_three_rows_and_every_gap_counts():
    times = {"ttft": [0.1, 0.3], "tpot": [0.02, 0.04], "itl": [0.01, 0.02, 0.03, 0.04, 0.04, 0.04]}
    first, average, gaps, *_ = rows(samples([timed(SERVE, times)], tasks=(SERVE,)), FixedDemand(), "none")
    assert (first["test"], first["median"], first["tokens"]) == ("ttft50", 0.2, 50)
    assert (average["test"], average["median"], average["n"]) == ("tpot4", pytest.approx(0.03), 2)
    assert (gaps["test"], gaps["n"]) == ("itl4", 6)


def test_memory_and_energy():
    items = [
        {"memory": {"memory_resident": 300}}, {"energy": {"joules": 6.0, "tokens": 300, "seconds": 2.0, "source": "rapl"}},
        {"memory": {"memory_resident": 500}},
    ]  # fmt: skip
    memory, energy = rows(samples([timed(TG, [0.5]), *items]), FixedDemand(), "none")[1:]
    assert (memory["test"], memory["median"], memory["unit"]) == ("memory_resident", 400, "bytes")
    assert (energy["test"], energy["median"], energy["unit"]) == ("energy_tg100", 0.02, "J/token")
    assert "rapl" in energy["note"]
    items = [{"memory": {"memory_resident": "nobody tells"}}, {"energy": {"missing": "root only"}}]
    memory, energy = rows(samples(items), FixedDemand(), "none")[1:]
    assert memory["missing"] == "nobody tells" and energy["missing"] == "root only"
