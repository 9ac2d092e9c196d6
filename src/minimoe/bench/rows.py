"""From samples to the rows of a card: medians with their spread, each rate beside its ceiling. Imports no torch."""
from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .bounds import Demand, share
from .cards import read_rate
from .variants import Task, Variant

MEMORY = ("memory_resident", "memory_cuda_allocated", "memory_cuda_reserved", "memory_gpu_process")


@dataclass
class Samples:
    """What the processes of one variant told, a list entry a round."""

    variant: Variant
    tasks: Sequence[Task]
    items: list[dict[str, Any]] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)  # why a process ended early

    def of(self, task: Task) -> list[dict[str, Any]]:
        return [item for item in self.items if item.get("task") == task.__dict__]

    def whole(self, name: str) -> list[Any]:
        return [item[name] for item in self.items if name in item]


@dataclass(frozen=True)
class Peaks:
    """What the variant's device was measured to do: a card's "bandwidth", FLOP/s, and bytes/s of the host's memory."""

    bandwidth: Mapping[str, Any]
    flop_per_second: float | None
    ram: float | None = None


def rows(samples: Samples, demand: Demand | str, peaks: Peaks | str) -> list[dict[str, Any]]:
    """All rows of one variant. ``demand`` and ``peaks`` may be a reason why there is none; then rows have no ceiling."""
    found = []
    for task in samples.tasks:
        found += _serve_rows(samples, task) if task.kind == "serve" else [_rate_row(samples, task, demand, peaks)]
    return found + _memory_rows(samples) + _energy_rows(samples)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, p10 and p90 (linear between samples), and how many samples there are."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[8], "n": len(values)}


def _rate_row(samples: Samples, task: Task, demand: Demand | str, peaks: Peaks | str) -> dict[str, Any]:
    row = _head(samples, task.name, "tokens/s", task.tokens, task.depth, task.batch)
    items = samples.of(task)
    values = [task.batch * task.tokens / seconds for item in items for seconds in item.get("seconds", ())]
    if not values:
        return row | {"missing": _why(samples, items)}
    row |= spread(values) | _how(samples, items)
    if isinstance(demand, str) or isinstance(peaks, str):
        return row | {"no_ceiling": demand if isinstance(demand, str) else peaks}
    try:
        row |= _bounded(samples.variant, task, demand, peaks)
    except (ValueError, TypeError) as error:
        return row | {"no_ceiling": " ".join(str(error).split())}
    row["share"], refused = share(row["median"], row["ceiling"], row["bound"])
    if refused:
        for name in ("median", "p10", "p90", "n", "share"):
            del row[name]
        row["refused"] = refused
    return row


def _bounded(variant: Variant, task: Task, demand: Demand, peaks: Peaks) -> dict[str, Any]:
    blocks = ram_blocks(variant, demand)
    if variant.device != "cpu" and variant.runtime == "llama.cpp" and variant.gpu_layers not in (None, -1, 99):
        raise ValueError("weights are in two memories by layer, for which no ceiling is computed")
    return demand.bound(task, lambda size: read_rate(peaks.bandwidth, size)[0], peaks.flop_per_second, blocks, peaks.ram)


def ram_blocks(variant: Variant, demand: Demand) -> list[int] | None:
    """Blocks whose experts a variant leaves in the host's memory; None if it has one memory only."""
    if variant.device == "cpu" or not variant.cpu_moe:
        return None
    return sorted({t.block for t in demand.weights.tensors if t.kind == "routed_experts" and t.block < variant.cpu_moe})


def _serve_rows(samples: Samples, task: Task) -> list[dict[str, Any]]:
    items, found = samples.of(task), []
    for what, tokens in (("ttft", task.prompt), ("tpot", task.tokens), ("itl", task.tokens)):
        row = _head(samples, f"{what}{tokens}", "s", tokens, 0 if what == "ttft" else task.prompt, 1)
        values = [seconds for item in items for seconds in item.get("seconds", {}).get(what, ())]
        found.append(row | (spread(values) | _how(samples, items) if values else {"missing": _why(samples, items)}))
    return found


def _memory_rows(samples: Samples) -> list[dict[str, Any]]:
    told, found = samples.whole("memory"), []
    names = MEMORY[:1] if samples.variant.device == "cpu" else MEMORY
    for name in names:
        values = [memory[name] for memory in told if isinstance(memory.get(name), int)]
        reasons = [memory[name] for memory in told if isinstance(memory.get(name), str)]
        if not values and not reasons and told:
            continue  # not a way in which this runtime takes memory
        row = _head(samples, name, "bytes", 0, 0, 1)
        found.append(row | (spread(values) if values else {"missing": (reasons or [_why(samples, [])])[0]}))
    return found


def _energy_rows(samples: Samples) -> list[dict[str, Any]]:
    writing = next((task for task in samples.tasks if task.kind == "tg"), None)
    if writing is None:
        return []
    told = samples.whole("energy")
    values = [energy["joules"] / energy["tokens"] for energy in told if "joules" in energy]
    row = _head(samples, f"energy_{writing.name}", "J/token", writing.tokens, 0, 1)
    if values:
        return [row | spread(values) | {"note": f"counted by {told[0].get('source')}: all that the device did"}]
    reasons = [energy["missing"] for energy in told if energy.get("missing")]
    return [row | {"missing": (reasons or [_why(samples, [])])[0]}]


def _head(samples: Samples, test: str, unit: str, tokens: int, depth: int, batch: int) -> dict[str, Any]:
    return samples.variant.about | {"test": test, "unit": unit, "tokens": tokens, "depth": depth, "batch": batch}


def _how(samples: Samples, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The clock, which part of the wall time the process had the core ("busy", one thread), and notes."""
    notes = [f"{name}: {text}" for name, text in dict(p for item in items for p in item.get("notes", {}).items()).items()]
    clock = next(item["clock"] for item in items if "clock" in item)
    busy = {"busy": min(1.0, min(item["busy"] for item in items if "busy" in item))} if clock == "cpu" else {}
    notes += [f"one process ended early: {end}" for end in samples.ends[:1]]
    return {"clock": clock} | busy | ({"note": "; ".join(notes)} if notes else {})


def _why(samples: Samples, items: Sequence[dict[str, Any]]) -> str:
    reasons = [item["missing"] for item in items if item.get("missing")] + samples.ends
    return reasons[0] if reasons else "the process told nothing about it"
