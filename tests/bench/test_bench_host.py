"""The machine, asked without torch."""

import os
import sys

import pytest

from minimoe.bench import host


def test_describe_host():
    about = host.describe_host()
    assert about["cores"] >= 1 and about["cpu"] and about["os"] and about["python"].startswith("3.")
    assert about["memory_bytes"] is None or about["memory_bytes"] > 1 << 28


def test_memory_without_psutil(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert host.physical_cores() is None
    if hasattr(os, "sysconf"):
        assert host.memory_bytes() > 1 << 28


def test_limits_of_a_container(monkeypatch):
    files = {"/sys/fs/cgroup/memory.max": "536870912", "/sys/fs/cgroup/cpu.max": "150000 100000"}
    monkeypatch.setattr(host, "_first_line", lambda file: files.get(str(file), ""))
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert host.memory_bytes() == 512 << 20
    assert host.usable_cores() == 2
    files["/sys/fs/cgroup/cpu.max"] = "max 100000"
    assert host.usable_cores() == 8


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A program of that name on PATH, with the answers that a test gives it."""
    if sys.platform == "win32":
        pytest.skip("needs a shell script on PATH")

    def write(rows="", header="", code=0):
        program = tmp_path / "nvidia-smi"
        answers = f"case $1 in --query*) printf '%s' '{rows}';; *) printf '%s' '{header}';; esac"
        program.write_text(f"#!/bin/sh\n{answers}\nexit {code}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return write


def test_no_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.nvidia_gpus() == ([], None)


def test_cards(nvidia_smi):
    nvidia_smi(
        "NVIDIA GeForce RTX 3060, 12288, 550.54.14\nNVIDIA H200, [N/A], 550.54.14\n",
        "| NVIDIA-SMI 550.54.14   Driver Version: 550.54.14   CUDA Version: 12.4 |",
    )
    cards, trouble = host.nvidia_gpus()
    assert trouble is None
    assert cards[0] == {
        "name": "NVIDIA GeForce RTX 3060", "memory_bytes": 12 << 30, "driver": "550.54.14", "cuda": "12.4",
    }  # fmt: skip
    assert cards[1]["memory_bytes"] is None


def test_a_driver_that_fails(nvidia_smi):
    nvidia_smi(rows="Failed to initialize NVML: Driver/library version mismatch\n", code=18)
    cards, trouble = host.nvidia_gpus()
    assert cards == [] and trouble == "Failed to initialize NVML: Driver/library version mismatch"
