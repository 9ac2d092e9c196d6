"""torch and llama.cpp: is a build there, does it suit this machine, and which one would?

Both are imported in a child process: a build for another CPU ends its process with an illegal instruction,
which no ``except`` catches. llama.cpp also has to compute there, as some builds import well and die in the first
prompt of a quantised file.
"""
from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ..ggml import amx
from ..ggml.child import LlamaDied
from ..ggml.library import LlamaError
from .finding import PIP, Finding

TORCH_WHEELS = "https://download.pytorch.org/whl"
LLAMA_WHEELS = "https://abetlen.github.io/llama-cpp-python/whl"
_FRESH = "--force-reinstall --no-cache-dir"
_SOURCE = '"llama-cpp-python>=0.3.36"'

_TORCH = """
import json, torch
found = dict(version=torch.__version__, cuda=torch.version.cuda, available=torch.cuda.is_available())
found.update(archs=[], cards=[], error=None)
if found["available"]:
    found["archs"] = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        found["cards"].append(dict(name=name, capability=capability))
    try:
        (torch.ones(8, device="cuda") * 2).sum().item()
    except Exception as error:
        found["error"] = str(error).splitlines()[0]
print(json.dumps(found))
"""
_LLAMA = """
import json, llama_cpp
print(json.dumps(dict(version=llama_cpp.__version__, offload=bool(llama_cpp.llama_supports_gpu_offload()))))
"""


def examine_torch(cards: list[dict[str, Any]]) -> Finding:
    """``cards`` as :func:`minimoe.bench.host.nvidia_gpus` lists them."""
    return check_torch(probe("torch", _TORCH), cards)


class Death(NamedTuple):
    """How a process ended ("SIGILL"), and whether it lives on without the buffers that use AMX."""

    how: str
    amx: bool


def examine_llama(cards: list[dict[str, Any]]) -> Finding:
    found = probe("llama_cpp", _LLAMA)
    death = try_llama() if isinstance(found, dict) else None
    return check_llama(found, cards, compiler(), death, amx.cpu_has_amx())


def try_llama() -> Death | None:
    """How the prompt of a quantised file ends llama.cpp in a child process; None if it does not, or cannot be tried."""
    try:
        amx.try_prefill()
        return None
    except LlamaDied as death:
        how = death.how
    except LlamaError:
        return None
    try:
        amx.try_prefill(extra_buffers=False)
        return Death(how, amx.amx_compiled())
    except LlamaError:
        return Death(how, False)


def probe(module: str, code: str, timeout: float = 180) -> dict[str, Any] | str | None:
    """What ``code`` prints as JSON in a child process, a sentence if it fails, None without the module."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"importing {module} takes more than {timeout:.0f} s"
    if child.returncode < 0:
        return f"importing {module} ends with {signal.Signals(-child.returncode).name}"
    if child.returncode:
        return (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
    try:
        return json.loads(child.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return f"importing {module} ends without an answer"


def torch_command(
    cards: list[dict[str, Any]], capability: tuple[int, int] | None = None, again: bool = True
) -> str:
    """The pip command for the build of torch that suits the driver and, if it is known, the capability."""
    command = f"{PIP} {_FRESH} torch" if again else f"{PIP} torch"
    if sys.platform == "darwin":  # PyPI has the only build for macOS
        return command
    return f"{command} --index-url {TORCH_WHEELS}/{_torch_build(cards, capability)}"


def _driver_is_13(cards: list[dict[str, Any]]) -> bool:
    return int((cards[0]["cuda"] or "12").split(".")[0]) >= 13


def _torch_build(cards: list[dict[str, Any]], capability: tuple[int, int] | None) -> str:
    if not cards:
        return "cpu"
    cuda_13 = _driver_is_13(cards)
    if capability and capability >= (10, 0) and not cuda_13:
        return "cu128"  # the last builds for CUDA 12 that know Blackwell
    if capability and capability < (7, 5):
        return "cu126"  # CUDA 13 has left out cards older than Turing
    return "cu130" if cuda_13 else "cu126"


def runs_on(capability: tuple[int, int], archs: list[str]) -> bool:
    """Whether a build for ``archs`` ("sm_86", "compute_90") has code for a card of this compute capability.

    Machine code runs on later minor versions of its major version (sm_80 on 8.6), "sm_90a" on exactly that
    card; PTX ("compute_") is compiled for any later card.
    """
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if match is None:
            continue
        kind, version, suffix = match.group(1), (int(match.group(2)), int(match.group(3))), match.group(4)
        if version == capability:
            return True
        if not suffix and version < capability and (kind == "compute" or version[0] == capability[0]):
            return True
    return False


def check_torch(found: dict[str, Any] | str | None, cards: list[dict[str, Any]]) -> Finding:
    if found is None:
        return Finding("fix", "torch", "is not installed", torch_command(cards, again=False))
    if isinstance(found, str):
        return Finding("fix", "torch", found, torch_command(cards))
    build = f"CUDA {found['cuda']}" if found["cuda"] else "ROCm" if found["available"] else "CPU build"
    text = f"{found['version']}, {build}"
    if not found["available"]:
        if not cards:
            return Finding("ok", "torch", text)
        card, reason = cards[0], "it has no CUDA code"
        if found["cuda"]:
            reason = f"the driver supports CUDA {card['cuda']} at most"
        text = f"{text}, leaves the {card['name']} idle: {reason}"
        return Finding("note", "torch", text, torch_command(cards))
    for card in found["cards"]:
        capability = tuple(card["capability"])
        name = f"{card['name']} (sm_{capability[0]}{capability[1]})"
        # a chapter would choose the gpu profile and stop at the first kernel, so this one must be mended
        mend = torch_command(cards, capability)
        if found["cuda"] and not runs_on(capability, found["archs"]):
            archs = " ".join(found["archs"])
            return Finding("fix", "torch", f"{text}, has no code for the {name}, only {archs}", mend)
        if found["error"]:
            return Finding("fix", "torch", f"{text}, fails on the {name}: {found['error']}", mend)
        text += f", runs on {name}"
    return Finding("ok", "torch", text)


def compiler() -> str | None:
    """A C compiler that pip could build llama-cpp-python with."""
    names = ("cl", "clang", "gcc") if sys.platform == "win32" else ("cc", "gcc", "clang")
    found = next((path for path in map(shutil.which, names) if path), None)
    # Visual Studio's own compiler is rarely on PATH
    vswhere = Path("C:/Program Files (x86)/Microsoft Visual Studio/Installer/vswhere.exe")
    return found or (str(vswhere) if vswhere.exists() else None)


def check_llama(
    found: dict[str, Any] | str | None, cards: list[dict[str, Any]], compiler: str | None, death: Death | None = None,
    cpu_has_amx: bool = False,
) -> Finding:
    topic = "llama-cpp-python"
    build = "cpu" if not cards else "cu130" if _driver_is_13(cards) else "cu124"
    wheel = f"{PIP} --prefer-binary llama-cpp-python --extra-index-url {LLAMA_WHEELS}/{build}"
    if found is None:
        tools = "" if compiler else ", and no C compiler to build it with"
        source = f"{PIP} {_SOURCE}"
        command = wheel if cards or compiler is None else _without_native(source) if cpu_has_amx else source
        return Finding("note", topic, f"not installed{tools}; the last chapters need it", command)
    again = wheel.replace("--prefer-binary", f"{_FRESH} --prefer-binary")
    if isinstance(found, str):
        return Finding("note", topic, found, again)
    version = found["version"]
    if death:
        rebuilt = _without_native(f"{PIP} {_FRESH} --no-deps --no-binary llama-cpp-python {_SOURCE}")
        text = f"{version}, dies in quantised prefill ({death.how}): built for another CPU"
        if death.amx:
            text = (f"{version}, dies in quantised prefill ({death.how}) on CPUs with AMX, which gcc before 13 compiles "
                    "wrongly; minimoe turns those buffers off, other programs do not")
        return Finding("note", topic, text, again if cards or compiler is None else rebuilt)
    if cards and not found["offload"]:
        return Finding("note", topic, f"{version}, a CPU build: leaves the {cards[0]['name']} idle", again)
    return Finding("ok", topic, f"{version}, {'with' if found['offload'] else 'without'} GPU offload")


def _without_native(command: str) -> str:
    """The pip command, building for any CPU of the last ten years (AVX2) instead of exactly this one."""
    if sys.platform == "win32":  # cmd and PowerShell set variables differently; pip 23.1 needs none
        return f"{command} -C cmake.args=-DGGML_NATIVE=OFF"
    return f'CMAKE_ARGS="-DGGML_NATIVE=OFF" {command}'
