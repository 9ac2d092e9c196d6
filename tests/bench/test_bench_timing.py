import pytest

from minimoe.bench import timing


def test_works_take_turns_and_the_first_round_is_dropped():
    order = []
    runs = timing.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert "".join(order) == "ab" * 4
    assert {key: len(run) for key, run in runs.items()} == {"a": 3, "b": 3}


def test_short_calls_are_repeated_inside_a_sample(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(timing.time, "process_time", lambda: next(clock) * 0.01)  # each call seems to last 10 ms
    count = []
    timing.in_turns({"a": lambda: count.append(1)}, repeats=2, least=0.05)
    assert len(count) == 1 + 2 * 5


def test_seconds_are_those_of_one_call(monkeypatch):
    clock = iter([1.0, 4.0])
    monkeypatch.setattr(timing.time, "process_time", lambda: next(clock))
    assert timing.cpu_seconds(lambda: None, calls=6) == pytest.approx(0.5)


def test_summary_has_median_least_and_greatest_of_each_point():
    assert timing.summary([[3.0, 1.0, 2.0], [5.0]]) == {"seconds": [2.0, 5.0], "low": [1.0, 5.0], "high": [3.0, 5.0]}
