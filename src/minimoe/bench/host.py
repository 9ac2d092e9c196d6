"""What machine this is, asked without torch: operating system, CPU, memory, NVIDIA GPUs."""
from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def describe_host() -> dict[str, Any]:
    """Operating system, Python, CPU model, cores, RAM; numbers that cannot be found are None.

    ``cores`` is what this process may use (affinity and container quota), ``memory_bytes`` likewise.
    """
    return {
        "os": platform.platform(terse=True),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "physical_cores": physical_cores(),
        "memory_bytes": memory_bytes(),
    }


def cpu_model() -> str:
    """The CPU's marketing name, or the architecture where the system does not tell."""
    try:
        if sys.platform == "darwin":
            return _output(["sysctl", "-n", "machdep.cpu.brand_string"]).strip() or platform.machine()
        if sys.platform == "win32":
            import winreg

            path = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
                return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        return match.group(1).strip() if match else platform.processor() or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Logical cores this process may run on, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _first_line("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]):
        cores = min(cores, -(-int(quota[0]) // int(quota[1])))
    return max(1, cores)


def physical_cores() -> int | None:
    """Cores without hyper-threading, None if psutil is missing or cannot tell."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil.cpu_count(logical=False)


def memory_bytes() -> int | None:
    """RAM in bytes, or the container's limit where that is lower."""
    total: int | None
    try:
        import psutil

        total = int(psutil.virtual_memory().total)
    except ImportError:
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            total = None
    limit = _first_line("/sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if total and limit.isdigit() else total


def last_level_cache_bytes() -> int | None:
    """Size of the largest CPU cache, None where the system does not tell (Linux only)."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", _first_line(file))
        if match:
            sizes.append(int(match.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30}[match.group(2)])
    return max(sizes, default=None)


def nvidia_gpus() -> tuple[list[dict[str, Any]], str | None]:
    """NVIDIA's cards as ``nvidia-smi`` lists them, and why it failed if it did.

    Each card: ``name``, ``memory_bytes``, ``driver``, ``cuda`` (the newest CUDA that the driver supports, as
    "12.4", or None). ``([], None)`` means that there is no nvidia-smi: no NVIDIA driver is installed.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], None
    try:
        query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
        rows = _output([program, *query])
        header = _output([program])
    except (OSError, subprocess.SubprocessError) as error:
        text = getattr(error, "stdout", None) or getattr(error, "stderr", None) or str(error)
        return [], " ".join(str(text).split())
    cuda = re.search(r"CUDA(?: UMD)? Version:\s*([\d.]+)", header)
    cards = []
    for row in rows.splitlines():
        parts = [part.strip() for part in row.split(",")]
        if len(parts) == 3:
            mebibytes = parts[1].split(".")[0]
            cards.append({
                "name": parts[0], "memory_bytes": int(mebibytes) << 20 if mebibytes.isdigit() else None,
                "driver": parts[2], "cuda": cuda.group(1) if cuda else None,
            })  # fmt: skip
    return cards, None


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


def _first_line(file: str | Path) -> str:
    try:
        return Path(file).read_text(encoding="utf-8").split("\n")[0].strip()
    except OSError:
        return ""
