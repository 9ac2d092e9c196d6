"""In the child process: one variant, opened and timed. What it yields goes to the parent as JSON.

Definitions are llama-bench's: a warm-up, then so many repeats, each from the same state; what tokenizers and samplers
do is not counted. The clock is CPU seconds for one thread of a CPU, in which the time that other programs have the core
does not count, and wall seconds for several threads and for GPUs, after the device has finished.
"""
from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .energy import available, metered
from .footprint import peaks
from .process import one_line
from .variants import Task, Variant

PACKAGES = {"minimoe": "torch", "transformers": "transformers", "llama.cpp": "llama-cpp-python"}
ENERGY_S = 2.0
Clock = Callable[[], float]


def device_rates(
    device: str, threads: int, seconds: float, sizes: Sequence[int], quick: bool
) -> Iterator[dict[str, Any]]:
    """A child that measures the device itself."""
    from .rates import measure_rates

    yield {"versions": _versions("torch")}
    yield from measure_rates(device, threads, seconds, sizes, quick)


def describe_device(device: str | None) -> Iterator[dict[str, Any]]:
    """A child that says what there is, so that the parent need not import torch."""
    import torch

    from .device import describe, pick_device

    where = pick_device(device)
    uuid = str(getattr(torch.cuda.get_device_properties(where), "uuid", "")) if where.type == "cuda" else ""
    yield {
        "machine": describe(where), "device": str(where),
        "uuid": uuid if not uuid or uuid.startswith("GPU-") else f"GPU-{uuid}", "versions": _versions("torch"),
    }  # fmt: skip


def measure(
    variant: dict[str, Any], tasks: Sequence[dict[str, Any]], repeats: int, uuid: str | None = None, energy_s: float = ENERGY_S
) -> Iterator[dict[str, Any]]:
    """Open the variant, then one item a task: {"task", "seconds": [...], "busy"} or {"task", "missing"}; then memory and
    energy. A task that fails (most often for want of memory) does not end the others."""
    what, todo = Variant(**variant), [Task(**task) for task in tasks]
    runner = _open(what)
    yield {"versions": _versions(PACKAGES[what.runtime])}
    name, clock = clock_for(what.device, what.threads)
    for task in todo:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            times = _serve(runner, task, repeats, clock) if task.kind == "serve" else _repeat(runner, task, repeats, clock)
        except Exception as error:
            yield {"task": task.__dict__, "missing": one_line(error)}
            continue
        busy = (time.process_time() - cpu) / (time.perf_counter() - wall)
        yield {"task": task.__dict__, "seconds": times, "clock": name, "busy": busy, "notes": _notes(runner, task)}
    yield {"memory": peaks(what.device)}
    writing = next((task for task in todo if task.kind == "tg"), None)
    if writing is not None:
        yield {"energy": _energy(runner, writing, what.device, uuid, energy_s)}


def clock_for(device: str, threads: int) -> tuple[str, Clock]:
    """Its name, "cpu" or "wall", and the clock. Runners wait for their device before they return."""
    if device == "cpu" and threads == 1 and sys.platform != "win32":  # Windows counts in steps of 16 ms
        return "cpu", time.process_time
    return "wall", time.perf_counter


def _open(variant: Variant) -> Any:
    if variant.runtime == "llama.cpp":
        from .llama import LlamaRunner

        return LlamaRunner(variant.path, variant.threads, variant.gpu_layers or 0, variant.cpu_moe)
    from .runners import open_runner

    return open_runner(variant.runtime, variant.path, variant.device, variant.threads, variant.format)


def _repeat(runner: Any, task: Task, repeats: int, clock: Clock) -> list[float]:
    """Seconds of each repeat of "pp" or "tg"."""
    runner.start(task.batch, task.depth, task.tokens)

    def work(tokens: int = task.tokens) -> float:
        runner.begin()
        start = clock()
        if task.kind == "pp":
            runner.read(tokens)
        else:
            for _ in range(tokens):
                runner.step()
        return clock() - start

    runner.choose(task.kind, lambda: work(task.tokens if task.kind == "pp" else min(8, task.tokens)))
    work(task.tokens if task.kind == "pp" else 1)  # the warm-up that llama-bench makes
    return [work() for _ in range(repeats)]


def _serve(runner: Any, task: Task, repeats: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds to the first token, of each gap between two tokens, and of a gap on average (a number a repeat)."""
    times: dict[str, list[float]] = {"ttft": [], "tpot": [], "itl": []}
    runner.start(1, 0, task.prompt + task.tokens)
    for number in range(repeats + 1):
        runner.use("pp")
        runner.begin()
        marks = [clock()]
        runner.read(task.prompt)
        runner.use("tg")
        ids = runner.likeliest()
        marks.append(clock())
        for _ in range(task.tokens - 1):
            runner.step(ids)
            ids = runner.likeliest()
            marks.append(clock())
        if number:  # the first pays for set-up
            gaps = [b - a for a, b in zip(marks[1:], marks[2:])]
            times["ttft"].append(marks[1] - marks[0])
            times["tpot"].append(sum(gaps) / len(gaps))
            times["itl"] += gaps
    return times


def _notes(runner: Any, task: Task) -> dict[str, str]:
    """What the runner says; of a prompt with its answer what it said to each, where that differs."""
    if task.kind != "serve":
        return dict(runner.notes)
    runner.use("pp")
    prompt = dict(runner.notes)
    runner.use("tg")
    return {name: text if prompt.get(name) == text else f"{prompt.get(name)}, then {text}" for name, text in runner.notes.items()}


def _energy(runner: Any, task: Task, device: str, uuid: str | None, seconds: float) -> dict[str, Any]:
    """Joules a token of writing from an empty context, for about ``seconds`` seconds."""
    if why := available(device, uuid):
        return {"missing": why}
    tokens, end = 0, time.perf_counter() + seconds
    try:
        runner.start(1, 0, task.tokens)
        with metered(device, uuid) as reading:
            while time.perf_counter() < end:
                runner.begin()
                for _ in range(task.tokens):
                    runner.step()
                tokens += task.tokens
    except Exception as error:
        return {"missing": one_line(error)}
    if reading.joules is None:
        return {"missing": reading.missing}
    return {"joules": reading.joules, "tokens": tokens, "seconds": reading.seconds, "source": reading.source}


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "torch" in sys.modules:
        found["torch"] = str(sys.modules["torch"].__version__)  # with the build, "+cpu" or "+cu128"
    if "llama-cpp-python" in packages and os.environ.get("LLAMA_CPP_LIB_PATH"):
        found["llama.cpp"] = "another build than the package's (LLAMA_CPP_LIB_PATH)"
    return found
