"""The most memory that a process took: its resident set, torch's own count on CUDA, and what the driver says."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def peaks(device: str) -> dict[str, Any]:
    """Bytes by name, or a text that says why not.

    memory_resident        the most physical memory of this process since it began, Python and libraries included. A file
                           that is mapped counts as far as it was read
    memory_cuda_allocated  the most of torch's tensors at once
    memory_cuda_reserved   the most that torch took from the card, which is what another program misses
    memory_gpu_process     what the driver counts for this process at the moment, context and libraries included
    """
    found: dict[str, Any] = {"memory_resident": resident_peak() or "this system does not tell"}
    if device.startswith("cuda"):
        found |= _cuda(device) | {"memory_gpu_process": _by_driver()}
    return found


def _cuda(device: str) -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}  # llama.cpp does not allocate through torch
    return {
        "memory_cuda_allocated": torch.cuda.max_memory_allocated(device),
        "memory_cuda_reserved": torch.cuda.max_memory_reserved(device),
    }


def _by_driver() -> int | str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "there is no nvidia-smi"
    try:
        query = [program, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        rows = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed ({type(error).__name__})"
    mebibytes = [int(used) for pid, used in re.findall(r"^(\d+), (\d+)$", rows, re.M) if int(pid) == os.getpid()]
    # in a container the driver's process numbers are others than ours, and Windows tells no sizes
    return sum(mebibytes) << 20 if mebibytes else "nvidia-smi does not list this process"


def resident_peak() -> int | None:
    """Bytes of the most physical memory that this process has had; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would count what the parent was before this program began
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M)
        return int(found[1]) << 10 if found else None
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) if sys.platform == "darwin" else int(most) << 10  # bytes there, kilobytes elsewhere
