"""A whole benchmark: what takes part, in which order, and the card that comes of it. Imports no torch.

Everything is measured in child processes that take turns (see :mod:`minimoe.bench.variants`); a process that dies costs
its own rows.
"""
from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import __version__
from ..errors import MinimoeError
from .bounds import Demand, demand
from .cards import SCHEMA, UNKNOWN_CACHE, anonymous
from .host import describe_host, last_level_cache_bytes
from .process import ChildError, one_line, stream
from .rows import Peaks, Samples, ram_blocks, rows
from .variants import Rates, Task, Variant, alternate

WORKER = "minimoe.bench.worker"
TORCH_DTYPES = ("float32", "bfloat16", "float16")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure. ``seconds``: for the device alone, in each of its processes; ``timeout``: for a process."""

    variants: Sequence[Variant]
    tasks: Sequence[Task]
    devices: Sequence[Rates]
    rounds: int = 2
    repeats: int = 5
    seconds: float = 4.0
    energy_s: float = 2.0
    quick: bool = False
    timeout: float = 3600.0


def ask_device(name: str | None) -> dict[str, Any]:
    """{"machine", "device", "uuid", "versions"} of the device named (None: CUDA if there is one), asked in a child. ``uuid``
    is for the driver's counters, and goes into no card.

    Raises MinimoeError if there is no such device.
    """
    if name == "cpu":
        host = describe_host()
        machine = host | {"device": "cpu", "device_name": host["cpu"], "device_memory_bytes": None, "driver": None}
        return {"machine": machine, "device": "cpu", "uuid": "", "versions": {}}
    try:
        return next(stream(f"{WORKER}:describe_device", {"device": name}, 1, 300))
    except ChildError as error:
        raise MinimoeError(str(error)) from None


def run(plan: Plan, about: dict[str, Any], say: Say = lambda text: None) -> dict[str, Any]:
    """Measure everything and return the card, without its name. ``about`` is :func:`ask_device`'s answer."""
    demands = {variant: _demand(variant) for variant in plan.variants}
    sizes = _sizes(plan, demands)
    parts: dict[Rates, list[dict[str, Any]]] = {device: [] for device in plan.devices}
    ends: dict[Rates, list[str]] = {device: [] for device in plan.devices}
    samples = {variant: Samples(variant, plan.tasks) for variant in plan.variants}
    load = _load()
    items: list[Rates | Variant] = [*plan.devices, *plan.variants]
    for number, order in enumerate(alternate(items, plan.rounds), start=1):
        for item in order:
            say(f"round {number} of {plan.rounds}: {item.label}")
            if isinstance(item, Rates):
                _collect(_rates_child(plan, item, sizes[item]), parts[item], ends[item])
            else:
                _collect(_variant_child(plan, item, about), samples[item].items, samples[item].ends)
    found = {device: best_rates(parts[device], ends[device]) for device in plan.devices}
    table = []
    for variant in plan.variants:
        table += rows(samples[variant], demands[variant], _peaks(variant, demands[variant], found))
    told = [item["versions"] for kept in (*parts.values(), *(s.items for s in samples.values())) for item in kept
            if "versions" in item]  # fmt: skip
    return _card(plan, about, found, told, table, load)


def best_rates(parts: Sequence[dict[str, Any]], ends: Sequence[str]) -> dict[str, Any]:
    """Of several processes' figures of one device the best each, since a peak is what is looked for."""
    why = anonymous((list(ends) or ["it was not measured"])[0])
    bandwidths = [part["bandwidth"] for part in parts if "bandwidth" in part]
    matmuls = [part["matmul"] for part in parts if "matmul" in part]
    launches = [part["launch"] for part in parts if "launch" in part]
    bandwidth: dict[str, Any] = {"missing": why}
    if bandwidths:
        bandwidth = dict(max(bandwidths, key=lambda b: b["read_bytes_per_second"]))
        bandwidth["copy_bytes_per_second"] = max(b["copy_bytes_per_second"] for b in bandwidths)
        by_size: dict[int, float] = {}
        for entry in (entry for b in bandwidths for entry in b["by_size"]):
            size = entry["buffer_bytes"]
            by_size[size] = max(by_size.get(size, 0.0), entry["read_bytes_per_second"])
        bandwidth["by_size"] = [{"buffer_bytes": size, "read_bytes_per_second": by_size[size]} for size in sorted(by_size)]
    matmul = {
        dtype: max((m[dtype] for m in matmuls if dtype in m), key=lambda rate: rate["flop_per_second"] or 0.0)
        for dtype in (matmuls[0] if matmuls else ())
    }  # fmt: skip
    for rate in matmul.values():
        if "missing" in rate:
            rate["missing"] = anonymous(rate["missing"])
    trips = [launch["round_trip_s"] for launch in launches if launch["round_trip_s"] is not None]
    return {
        "bandwidth": bandwidth, "matmul": matmul, "round_trip_s": min(trips, default=None),
        "launch_latency_s": min((launch["launch_latency_s"] for launch in launches), default=None),
    }  # fmt: skip


def _collect(items: Iterator[dict[str, Any]], kept: list[dict[str, Any]], ends: list[str]) -> None:
    try:
        for item in items:
            kept.append(item)  # one by one: what came before an early end stays
    except ChildError as error:
        ends.append(str(error))


def _rates_child(plan: Plan, device: Rates, sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    arguments = {
        "device": device.device, "threads": device.threads, "seconds": plan.seconds, "sizes": list(sizes), "quick": plan.quick,
    }  # fmt: skip
    return stream(f"{WORKER}:device_rates", arguments, device.threads, plan.timeout)


def _variant_child(plan: Plan, variant: Variant, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    arguments = {
        "variant": asdict(variant), "tasks": [asdict(task) for task in plan.tasks], "repeats": plan.repeats,
        "uuid": about["uuid"] or None, "energy_s": plan.energy_s,
    }  # fmt: skip
    return stream(f"{WORKER}:measure", arguments, variant.threads, plan.timeout)


def _demand(variant: Variant) -> Demand | str:
    try:
        return demand(variant)
    except (MinimoeError, ValueError, TypeError, OSError) as error:
        return anonymous(one_line(error))


def _sizes(plan: Plan, demands: dict[Variant, Demand | str]) -> dict[Rates, list[int]]:
    """Buffers to read on each device: what the passes of its models move, as far as that fits a cache."""
    most = 4 * (last_level_cache_bytes() or UNKNOWN_CACHE)
    sizes: dict[Rates, set[int]] = {device: set() for device in plan.devices}
    for variant, needs in demands.items():
        if isinstance(needs, str):
            continue
        for task in plan.tasks:
            if task.kind != "serve":
                moved, passes = needs.traffic(task)
                size = _round_down(moved / passes)
                if variant.device != "cpu" or size < most:
                    sizes.setdefault(_device_of(variant), set()).add(size)
    return {device: sorted(sizes[device]) for device in plan.devices}


def _round_down(size: float) -> int:
    """Two leading digits, so that tasks of about one size share a buffer; a smaller one is read no slower."""
    step = 10 ** max(0, len(str(int(size))) - 2)
    return max(1 << 14, int(size) // step * step)


def _peaks(variant: Variant, needs: Demand | str, found: dict[Rates, dict[str, Any]]) -> Peaks | str:
    """The bounds of a variant's device, or why there are none. A CPU with several threads is at least as fast as with
    fewer, which counts where another program disturbed the measurement with all of them."""
    own = [
        rates for device, rates in found.items()
        if device.device == variant.device and (variant.device != "cpu" or device.threads <= variant.threads)
    ]  # fmt: skip
    if not any(device == _device_of(variant) for device in found):
        return "this device was not measured with so many threads"
    whole = [rates for rates in own if "missing" not in rates["bandwidth"]]
    if not whole:
        return f"no measured bandwidth: {own[0]['bandwidth']['missing']}"
    bandwidth = dict(max((rates["bandwidth"] for rates in whole), key=lambda b: b["read_bytes_per_second"]))
    bandwidth["by_size"] = [entry for rates in whole for entry in rates["bandwidth"]["by_size"]]
    ram = None
    if not isinstance(needs, str) and ram_blocks(variant, needs):
        hosts = [rates["bandwidth"] for device, rates in found.items() if device.device == "cpu"]
        ram = max((host.get("read_bytes_per_second", 0.0) for host in hosts), default=0.0)
        if not ram:
            return "no measured bandwidth of the host's memory"
    flops: dict[str, float] = {}
    for dtype, rate in ((dtype, rate["flop_per_second"]) for rates in own for dtype, rate in rates["matmul"].items()):
        flops[dtype] = max(flops.get(dtype, 0.0), rate or 0.0)
    flops = {dtype: rate for dtype, rate in flops.items() if rate}
    if variant.format in TORCH_DTYPES:
        return Peaks(bandwidth, flops.get(variant.format), ram)
    return Peaks(bandwidth, max(flops.values(), default=None), ram)  # llama.cpp multiplies in whatever type is fast


def _device_of(variant: Variant) -> Rates:
    """The measurement that a variant is held against: a GPU is as fast whatever the number of the host's threads."""
    return Rates(variant.device, variant.threads if variant.device == "cpu" else 1)


def _card(
    plan: Plan, about: dict[str, Any], found: dict[Rates, dict[str, Any]], told: Sequence[dict[str, str]],
    table: list[dict[str, Any]], load: float | None,
) -> dict[str, Any]:
    versions = {"minimoe": __version__, **about["versions"]}
    for one in told:
        versions |= one
    machine = {name: value for name, value in about["machine"].items() if name not in ("threads", "torch", "torch_cuda")}
    machine["os"] = "-".join(machine["os"].split("-")[:2])  # the rest may be somebody's own name for a kernel
    cpu = {str(device.threads): rates for device, rates in found.items() if device.device == "cpu"}
    own = [rates for device, rates in found.items() if device.device == about["device"]]
    best = max(own, key=lambda rates: rates["bandwidth"].get("read_bytes_per_second", 0.0))
    for row in table:
        for name in ("missing", "note", "no_ceiling"):
            if name in row:
                row[name] = anonymous(row[name])
    return {
        "schema": SCHEMA, "date": datetime.date.today().isoformat(), "minimoe": __version__, "commit": _commit(),
        "machine": machine, "versions": versions,
        "settings": {
            "tasks": [task.name + (f" after {task.prompt}" if task.prompt else "") for task in plan.tasks
                      if task.depth == plan.tasks[0].depth and task.batch == plan.tasks[0].batch],
            "depths": sorted({task.depth for task in plan.tasks}), "batches": sorted({task.batch for task in plan.tasks}),
            "rounds": plan.rounds, "repeats": plan.repeats, "quick": plan.quick, "load_before": load,
            "threads_wait": "passive",
        },
        **best, "cpu_threads": cpu, "rows": table,
    }  # fmt: skip


def _load() -> float | None:
    """How many other programs wanted a core during the last minute; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _commit() -> str:
    from .report import commit

    return commit()
