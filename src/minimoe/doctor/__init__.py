"""Can the book run on this machine, and what would mend it? Works without torch and NVIDIA's driver."""
from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from ..bench.host import describe_host, nvidia_gpus
from .engines import examine_llama, examine_torch
from .finding import PURGE, Finding
from .packages import check_packages, declared_requirements

__all__ = ["Finding", "examine"]

SUPPORTED_PYTHON = ((3, 11), (3, 13))
DISK_NEEDED, DISK_COMFORTABLE = 2e9, 15e9  # bytes: the site and its outputs; a quantised Nano-9B and room


def examine() -> list[Finding]:
    """Everything that is known about this machine, in reading order."""
    host, (cards, trouble) = describe_host(), nvidia_gpus()
    return [
        check_python(sys.version_info[:2]),
        Finding("ok", "system", f"{host['os']}, {host['machine']}"),
        Finding("ok", "CPU", f"{host['cpu']}, {host['cores']} usable cores"),
        check_memory(host["memory_bytes"]),
        *check_gpu(cards, trouble),
        examine_torch(cards),
        *check_packages(declared_requirements()),
        examine_llama(cards),
        check_disk(shutil.disk_usage(Path.cwd()).free),
    ]


def check_python(version: tuple[int, int]) -> Finding:
    low, high = SUPPORTED_PYTHON
    text = f"{platform.python_version()} at {sys.executable}"
    if low <= version <= high:
        return Finding("ok", "Python", text)
    wanted = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    return Finding("fix", "Python", f"{text}; the book needs {wanted}", "conda env create -f environment.yml")


def check_memory(size: int | None) -> Finding:
    if size is None:
        return Finding("note", "RAM", "this system does not tell")
    text = f"{size / 2**30:.1f} GiB"
    if size < 4e9:
        return Finding("note", "RAM", f"{text}; chapters need up to 4 GB, close other programs first")
    return Finding("ok", "RAM", text)


def check_gpu(cards: list[dict[str, Any]], trouble: str | None) -> list[Finding]:
    if trouble:
        text = f"nvidia-smi fails ({trouble}); restart the machine, then reinstall the driver"
        return [Finding("note", "GPU", text)]
    if not cards:
        return [Finding("note", "GPU", "no NVIDIA driver; chapters run on the CPU, with smaller settings")]
    findings = []
    for card in cards:
        size = card["memory_bytes"]
        vram = "unknown VRAM" if size is None else f"{size / 2**30:.1f} GiB VRAM"
        cuda = f", CUDA up to {card['cuda']}" if card["cuda"] else ""
        findings.append(Finding("ok", "GPU", f"{card['name']}, {vram}, driver {card['driver']}{cuda}"))
    return findings


def check_disk(free: int) -> Finding:
    text = f"{free / 1e9:.0f} GB free here"
    if free < DISK_NEEDED:
        return Finding("fix", "disk", f"{text}; the book needs 2 GB", PURGE)
    if free < DISK_COMFORTABLE:
        return Finding("note", "disk", f"{text}; enough for the book, real models take 3 to 25 GB")
    return Finding("ok", "disk", text)
