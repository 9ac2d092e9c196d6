"""How fast this device reads memory and multiplies matrices: the two bounds for every other time.

Peaks are measured, never looked up: a table knows neither the reader's card nor its clock, power limit and
neighbours. Rates are medians over repeats, so a moment in which another program runs does not decide. On one thread of
a CPU they are taken from CPU seconds, in which the time that other programs have the core does not count (what they take
of caches and memory does). With several threads, and on a GPU after everything launched has finished, the wall clock
counts: on a shared machine such a rate is too low.
"""
from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Timer

from ..errors import MinimoeError
from .host import describe_host, last_level_cache_bytes, memory_bytes, nvidia_gpus

MATMUL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Bandwidth:
    """Read bandwidth: ``bytes_per_second`` of the faster of the kernels in ``by_kernel``, by ``clock`` ("cpu", "wall")."""

    bytes_per_second: float
    kernel: str
    buffer_bytes: int
    by_kernel: dict[str, float]
    clock: str = "wall"

    @property
    def gb_per_second(self) -> float:
        """In units of 1e9 bytes a second, as data sheets print it."""
        return self.bytes_per_second / 1e9


@dataclass(frozen=True)
class MatmulRate:
    """Rate of an n x n by n x n product in one dtype; None with the reason where the device cannot do it."""

    dtype: str
    flop_per_second: float | None
    n: int | None
    reason: str | None = None
    clock: str = "wall"


@dataclass(frozen=True)
class DeviceReport:
    """A device with its two measured bounds; :meth:`to_dict` goes to JSON as it is."""

    machine: dict[str, Any]
    bandwidth: Bandwidth
    matmul: tuple[MatmulRate, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def default_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_device(name: str | None) -> torch.device:
    """The device of a name such as "cpu" or "cuda:1", or :func:`default_device` for None.

    Raises MinimoeError if this machine or this build of torch does not have it.
    """
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" is a device too, and holds nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MinimoeError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def describe(device: str | torch.device | None = None) -> dict[str, Any]:
    """The machine and the device that a figure was measured on, so that readers can compare theirs."""
    device = torch.device(device) if device is not None else default_device()
    about = describe_host() | {
        "device": str(device),
        "device_name": None,
        "device_memory_bytes": None,
        "driver": None,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        cards, _ = nvidia_gpus()
        about |= {
            "device_name": properties.name,
            "device_memory_bytes": properties.total_memory,
            "driver": cards[0]["driver"] if cards else None,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
    else:
        about["device_name"] = about["cpu"]
    return about


def measure_bandwidth(
    device: str | torch.device | None = None, seconds: float = 0.5, buffer_bytes: int | None = None
) -> Bandwidth:
    """Read bandwidth: bytes of a float32 buffer over the median time of reading it once.

    Two kernels read the same buffer, and the faster one counts: the sum of all numbers, and a matrix times a
    vector. Both read each number once, compute next to nothing with it and write next to nothing, so memory
    is what they wait for; a matrix times a vector is also what decoding a token does with every weight. Which
    of them is better written differs from library to library.

    What it does not show: writing and copying (a copy moves two bytes for each one stored), scattered reads
    such as an expert's rows, data in a cache, and, on a CPU, any other number of threads than
    ``torch.get_num_threads()``: one thread often cannot saturate the memory.

    Parameters
    ----------
    seconds
        time budget for both kernels together, not counting the buffer's allocation.
    buffer_bytes
        default: at least four times the largest cache that the system reports, at least 256 MiB (1 GiB on
        CUDA), at most a quarter of the free memory. A buffer that fits a cache measures the cache.
    """
    device = torch.device(device) if device is not None else default_device()
    clock, _ = clock_of(device)
    columns = 4096
    rows = max(1, (buffer_bytes or _buffer_bytes(device)) // (4 * columns))
    matrix = torch.ones(rows, columns, device=device)  # not empty: untouched pages have no memory behind them
    vector = torch.ones(columns, device=device)
    rates = {}
    for name, statement in (("sum", "matrix.sum()"), ("matvec", "matrix @ vector")):
        rates[name] = matrix.nbytes / median_seconds(statement, {"matrix": matrix, "vector": vector}, seconds / 2, device)
    best = max(rates, key=rates.__getitem__)
    return Bandwidth(rates[best], best, matrix.nbytes, rates, clock)


def measure_matmul(
    device: str | torch.device | None = None, dtype: torch.dtype = torch.float32, seconds: float = 0.5,
    max_n: int = 8192,
) -> MatmulRate:  # fmt: skip
    """Matrix product rate: 2 n^3 over the median time of one n x n by n x n product, in FLOP/s.

    n doubles from 256 while one product of the next size still fits the budget; the best size counts, since
    small ones are dominated by the call and large ones may throttle. float32 runs at the precision that
    ``torch.get_float32_matmul_precision()`` says ("highest" is without TF32). torch.int8 is multiplied by
    ``torch._int_mm``, with sums in int32, which is what quantised weights are computed with.

    A dtype that the device cannot multiply comes back with ``flop_per_second=None`` and the ``reason``.
    """
    device = torch.device(device) if device is not None else default_device()
    label, (clock, seconds_now) = str(dtype).removeprefix("torch."), clock_of(device)
    now = seconds_now or time.perf_counter
    statement = "torch._int_mm(a, b)" if dtype == torch.int8 else "a @ b"
    best: tuple[float, int] | None = None
    n, end = min(256, max_n), now() + seconds
    try:
        while True:
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            median = median_seconds(statement, {"torch": torch, "a": a, "b": b}, seconds / 8, device)
            rate = 2 * n**3 / median
            best = max(best or (rate, n), (rate, n))
            # the next size costs eight times as much, and a median wants a few of them
            if 2 * n > max_n or now() + 3 * 8 * median > end:
                return MatmulRate(label, *best, clock=clock)
            n *= 2
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        if best is not None:  # a larger size ran out of memory; what was measured stands
            return MatmulRate(label, *best, clock=clock)
        return MatmulRate(label, None, None, str(error).split("\n")[0], clock)


def measure(device: str | torch.device | None = None, seconds: float = 2.0) -> DeviceReport:
    """Describe a device and measure both bounds in about ``seconds`` seconds (and what allocation takes)."""
    start = time.perf_counter()
    device = torch.device(device) if device is not None else default_device()
    share = seconds / (1 + len(MATMUL_DTYPES))
    bandwidth = measure_bandwidth(device, share)
    matmul = tuple(measure_matmul(device, dtype, share) for dtype in MATMUL_DTYPES)
    return DeviceReport(describe(device), bandwidth, matmul, time.perf_counter() - start)


def clock_of(device: torch.device) -> tuple[str, Callable[[], float] | None]:
    """"cpu" and its clock for one thread of a CPU, else "wall" and None, which is Timer's own: it waits for CUDA.

    Windows counts CPU seconds in steps of 16 ms, so there it is the wall clock too.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1 and sys.platform != "win32":
        return "cpu", time.process_time
    return "wall", None


def median_seconds(statement: str, names: dict[str, Any], seconds: float, device: torch.device) -> float:
    """Median time of a statement, by :func:`clock_of`; Timer warms up, and waits for CUDA before and after."""
    _, clock = clock_of(device)
    threads = torch.get_num_threads()  # Timer's default is one
    timer = Timer(statement, globals=names, num_threads=threads, **({"timer": clock} if clock else {}))
    return timer.blocked_autorange(min_run_time=seconds).median


def _buffer_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return min(1 << 30, torch.cuda.mem_get_info(device)[0] // 4)
    wanted = max(256 << 20, 4 * (last_level_cache_bytes() or 0))
    free = memory_bytes() or wanted * 4
    try:
        import psutil

        free = min(free, psutil.virtual_memory().available)
    except ImportError:
        pass
    return min(wanted, free // 4)
