"""CPU seconds of several things measured against each other, in turn, so that a change of the machine's pace meets
all of them alike. What the experiments and benchmarks share."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def cpu_seconds(work: Callable[[], object], calls: int = 1) -> float:
    """CPU seconds of one call of ``work``: this process, all its threads, averaged over ``calls``."""
    start = time.process_time()
    for _ in range(calls):
        work()
    return (time.process_time() - start) / calls


def in_turns(
    works: Mapping[Any, Callable[[], object]], repeats: int, least: float = 0.0
) -> dict[Any, list[float]]:
    """CPU seconds of each work, ``repeats`` times, one work after another within each repeat.

    A round before them pays for set-up and is dropped. A sample calls its work so often that it lasts about
    ``least`` seconds, judged by that round.
    """
    calls = {key: max(1, round(least / max(cpu_seconds(work), 1e-5))) for key, work in works.items()}
    runs: dict[Any, list[float]] = {key: [] for key in works}
    for _ in range(repeats):
        for key, work in works.items():
            runs[key].append(cpu_seconds(work, calls[key]))
    return runs


def summary(runs: Iterable[Sequence[float]]) -> dict[str, list[float]]:
    """Of each point's repeats the median ("seconds"), the least ("low") and the greatest ("high")."""
    runs = list(runs)
    return {
        "seconds": [statistics.median(r) for r in runs], "low": [min(r) for r in runs], "high": [max(r) for r in runs],
    }  # fmt: skip
