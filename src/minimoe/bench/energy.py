"""Joules between two moments, from whatever counter this machine lets a program read.

nvml        the card's own counter (package nvidia-ml-py, if it is installed): exact, the whole card
nvidia-smi  power, asked for several times a second, where there is no such package: mean power times seconds
rapl        Intel's and AMD's counter of the processor package, which Linux shows to root only unless it is told otherwise

All of them count everything that the card or the processor does, for other programs too. Imports no torch.
"""
from __future__ import annotations

import contextlib
import importlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RAPL = Path("/sys/class/powercap")
SAMPLE_S = 0.1
LEAST_S = 1.0  # counters move in steps; a shorter window is mostly rounding


@dataclass
class Reading:
    """``joules`` of ``seconds``, by ``source``; or None and ``missing``, the reason."""

    source: str
    joules: float | None = None
    seconds: float = 0.0
    missing: str | None = None


class NoMeter(Exception):
    """This counter cannot be read here; one line that says why."""


@contextlib.contextmanager
def metered(device: str, uuid: str | None = None) -> Iterator[Reading]:
    """Energy of what happens inside, of a GPU (by ``uuid``) for "cuda", else of the processor. Never raises."""
    try:
        source, begin = _open(device, uuid)
    except NoMeter as why:
        yield Reading("none", missing=str(why))
        return
    reading, start, end = Reading(source), time.perf_counter(), begin()
    try:
        yield reading
    finally:
        try:
            reading.joules, reading.seconds = end(), time.perf_counter() - start
        except (NoMeter, OSError, ValueError) as why:
            reading.missing = str(why)
        if reading.joules is not None and reading.seconds < LEAST_S:
            reading.joules, reading.missing = None, f"{reading.seconds:.1f} s are too short for a counter that moves in steps"


def available(device: str, uuid: str | None = None) -> str | None:
    """Why there is no counter for this device; None if there is one."""
    try:
        _open(device, uuid)
    except NoMeter as why:
        return str(why)
    return None


def _open(device: str, uuid: str | None) -> tuple[str, Callable[[], Callable[[], float]]]:
    """A source, and what starts counting: it returns a function that ends it and tells joules."""
    if not device.startswith("cuda"):
        return "rapl", _rapl(RAPL)
    if uuid is None:
        raise NoMeter("which of the driver's cards this is could not be found out")
    with contextlib.suppress(ImportError):
        return "nvml", _nvml(importlib.import_module("pynvml"), uuid)
    return "nvidia-smi", _smi(uuid)


def _rapl(folder: Path) -> Callable[[], Callable[[], float]]:
    packages = [zone for zone in sorted(folder.glob("*-rapl:*")) if _read(zone / "name").startswith("package")]
    if not packages:
        raise NoMeter("no energy counter of the processor (RAPL) in /sys/class/powercap; virtual machines have none")
    try:
        for zone in packages:
            int((zone / "energy_uj").read_text())
    except PermissionError:
        raise NoMeter("the processor's energy counter is readable by root only: run as root, or make energy_uj in "
                      "/sys/class/powercap/intel-rapl:0 readable for all") from None
    except (OSError, ValueError) as error:
        raise NoMeter(f"the processor's energy counter cannot be read ({type(error).__name__})") from None

    def begin() -> Callable[[], float]:
        before = [int((zone / "energy_uj").read_text()) for zone in packages]

        def end() -> float:
            total = 0
            for zone, start in zip(packages, before):
                used = int((zone / "energy_uj").read_text()) - start
                if used < 0:  # it starts again at 0 when it is full
                    used += int(_read(zone / "max_energy_range_uj"))
                total += used
            return total / 1e6

        return end

    return begin


def _nvml(pynvml: Any, uuid: str) -> Callable[[], Callable[[], float]]:
    try:
        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
    except pynvml.NVMLError as error:
        raise NoMeter(f"NVML: {error}") from None

    def begin() -> Callable[[], float]:
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
        return lambda: (pynvml.nvmlDeviceGetTotalEnergyConsumption(card) - before) / 1e3  # millijoules

    return begin


def _smi(uuid: str) -> Callable[[], Callable[[], float]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        raise NoMeter("neither the package nvidia-ml-py nor nvidia-smi is there")

    def watts() -> float:
        query = [program, "-i", uuid, "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        return float(subprocess.run(query, check=True, capture_output=True, text=True, timeout=20).stdout)

    try:
        watts()
    except (OSError, subprocess.SubprocessError, ValueError):
        raise NoMeter("nvidia-smi does not tell this card's power") from None

    def begin() -> Callable[[], float]:
        samples: list[float] = []
        stop, start = threading.Event(), time.perf_counter()

        def sample() -> None:
            while not stop.wait(SAMPLE_S):
                with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
                    samples.append(watts())

        # a call each time, not nvidia-smi's own loop: that would outlive this process if it were killed
        reader = threading.Thread(target=sample, daemon=True)
        reader.start()

        def end() -> float:
            seconds = time.perf_counter() - start
            stop.set()
            reader.join()
            if len(samples) < 3:
                raise NoMeter(f"nvidia-smi told the power {len(samples)} times in {seconds:.1f} s, too few for a mean")
            return sum(samples) / len(samples) * seconds

        return end

    return begin


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
