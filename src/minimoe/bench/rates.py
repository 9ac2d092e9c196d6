"""The device's part of a reader card: reading, copying, multiplying, and what one call costs.

Each figure is a median within one process; a card takes the best of several processes, since a peak is what is being
looked for. (One process that met a slow moment would make the models look better than they are.)
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .device import MATMUL_DTYPES, clock_of, measure_bandwidth, measure_matmul, median_seconds
from .host import last_level_cache_bytes

QUICK_BYTES = 64 << 20


def measure_rates(
    device: str, threads: int, seconds: float, sizes: Sequence[int] = (), quick: bool = False
) -> Iterator[dict[str, Any]]:
    """One part of the card after the other: {"bandwidth": ...}, {"matmul": ...}, {"launch": ...}.

    seconds  for the whole, without allocation
    sizes    buffers to read besides the large one: models that fit a cache are held against the cache's bandwidth
    quick    a buffer that may well fit the cache, so that a try takes seconds
    """
    where = torch.device(device)
    if where.type == "cpu":
        torch.set_num_threads(threads)
    dtypes = (*MATMUL_DTYPES, torch.int8)
    share = seconds / (3 + 2 * len(dtypes) + 0.25 * len(sizes))  # products get two: their best size has to be found
    large = measure_bandwidth(where, share, QUICK_BYTES if quick else None)
    found: dict[str, Any] = {
        "read_bytes_per_second": large.bytes_per_second, "buffer_bytes": large.buffer_bytes, "kernel": large.kernel,
        "copy_bytes_per_second": copy_bandwidth(where, share, large.buffer_bytes // 2),
        "clock": large.clock, "cache_bytes": cache_bytes(where),
        "by_size": [
            {"buffer_bytes": buffer, "read_bytes_per_second": measure_bandwidth(where, share / 4, buffer).bytes_per_second}
            for buffer in sizes if buffer < large.buffer_bytes
        ],
    }  # fmt: skip
    yield {"bandwidth": found}
    rates = [measure_matmul(where, dtype, 2 * share) for dtype in dtypes]
    yield {"matmul": {
        rate.dtype: {"flop_per_second": rate.flop_per_second, "n": rate.n, "clock": rate.clock}
        | ({"missing": rate.reason} if rate.flop_per_second is None else {})
        for rate in rates
    }}  # fmt: skip
    yield {"launch": launch_times(where, share)}


def copy_bandwidth(device: torch.device, seconds: float, buffer_bytes: int) -> float:
    """Bytes read plus bytes written a second, of a copy from one buffer to another of that size.

    Many CPUs read a line before they overwrite it, so the memory moves up to half as much again.
    """
    source = torch.ones(max(1, buffer_bytes // 4), device=device)
    target = torch.empty_like(source).copy_(source)  # a first write, so that its pages exist
    names = {"source": source, "target": target}
    return 2 * source.nbytes / median_seconds("target.copy_(source)", names, seconds, device)


def launch_times(device: torch.device, seconds: float) -> dict[str, Any]:
    """What the smallest operator costs.

    launch_latency_s  a call among many in a row, none of which is waited for: the most operators a second, as its
                      inverse. On a CPU, which computes at once, the whole cost of a call
    round_trip_s      a call whose result is waited for, as the next token is; on a CPU the same as above, hence None
    """
    one = torch.zeros(1, device=device)
    found = {"launch_latency_s": median_seconds("one.add_(1)", {"one": one}, seconds / 2, device), "round_trip_s": None}
    if device.type != "cpu":
        found["round_trip_s"] = median_seconds("one.add_(1).item()", {"one": one}, seconds / 2, device)
    return found | {"clock": clock_of(device)[0]}


def cache_bytes(device: torch.device) -> int | None:
    """The largest cache, None where nobody tells."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", None)
    return last_level_cache_bytes()
