"""Every finding of the doctor: what it sees, whether the book can run, and the command that mends it."""

import sys

import pytest

from minimoe import doctor
from minimoe.doctor import engines, packages
from minimoe.doctor.finding import PIP
from minimoe.ggml import child

CARD = {"name": "NVIDIA GeForce RTX 3060", "memory_bytes": 12 << 30, "driver": "550.54", "cuda": "12.4"}
TORCH = {"version": "2.13.0+cu126", "cuda": "12.6", "available": True, "archs": ["sm_80", "sm_86", "sm_90"],
         "cards": [{"name": "RTX 3060", "capability": [8, 6]}], "error": None}  # fmt: skip
CPU_TORCH = {
    "version": "2.13.0+cpu",
    "cuda": None,
    "available": False,
    "archs": [],
    "cards": [],
    "error": None,
}


@pytest.fixture
def on_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")


def test_a_line_is_level_topic_text_and_command():
    assert doctor.Finding("ok", "disk", "80 GB").line() == "ok   disk: 80 GB"
    assert (
        doctor.Finding("fix", "torch", "is not installed", "pip").line()
        == "fix  torch: is not installed -> pip"
    )


@pytest.mark.parametrize(
    ("version", "level"), [((3, 10), "fix"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "fix")]
)
def test_python(version, level):
    finding = doctor.check_python(version)
    assert finding.level == level
    assert bool(finding.command) == (level == "fix")


@pytest.mark.parametrize(("free", "level"), [(1_000_000_000, "fix"), (5_000_000_000, "note"), (10**11, "ok")])
def test_disk(free, level):
    assert doctor.check_disk(free).level == level


@pytest.mark.parametrize(("size", "level"), [(None, "note"), (2 << 30, "note"), (16 << 30, "ok")])
def test_memory(size, level):
    assert doctor.check_memory(size).level == level


def test_gpu():
    (found,) = doctor.check_gpu([CARD], None)
    assert found.level == "ok" and "12.0 GiB VRAM, driver 550.54, CUDA up to 12.4" in found.text
    (none,) = doctor.check_gpu([], None)
    (broken,) = doctor.check_gpu([], "version mismatch")
    assert none.level == broken.level == "note" and "version mismatch" in broken.text


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 6), ["sm_86"], True),
        ((8, 6), ["sm_80"], True),  # machine code of an earlier minor version
        ((8, 6), ["sm_89"], False),
        ((8, 6), ["sm_75"], False),
        ((8, 6), ["sm_75", "compute_75"], True),  # PTX
        ((12, 0), ["sm_90", "sm_100", "sm_120"], True),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((12, 0), ["compute_90a"], False),
        ((6, 1), ["sm_75", "compute_120"], False),
        ((8, 6), [], False),
    ],
)
def test_which_cards_a_build_runs_on(capability, archs, runs):
    assert engines.runs_on(capability, archs) is runs


def torch_with(**changes):
    return TORCH | changes


OLD_CARD = [{"name": "GTX 1080", "capability": [6, 1]}]
NEW_CARD = [{"name": "RTX 5090", "capability": [12, 0]}]


@pytest.mark.parametrize(
    ("found", "cards", "level", "text", "command"),
    [
        (
            None,
            [],
            "fix",
            "is not installed",
            "pip install torch --index-url https://download.pytorch.org/whl/cpu",
        ),
        (None, [CARD], "fix", "is not installed", "/cu126"),
        (None, [CARD | {"cuda": "13.1"}], "fix", "is not installed", "/cu130"),
        ("libcudart.so: not found", [], "fix", "libcudart", "--force-reinstall"),
        (CPU_TORCH, [], "ok", "2.13.0+cpu, CPU build", ""),
        (CPU_TORCH, [CARD], "note", "RTX 3060 idle: it has no CUDA code", "/cu126"),
        (torch_with(cuda="13.0", available=False), [CARD], "note", "supports CUDA 12.4 at most", "/cu126"),
        (TORCH, [CARD], "ok", "runs on RTX 3060 (sm_86)", ""),
        (torch_with(cards=OLD_CARD), [CARD | {"cuda": "13.0"}], "fix", "no code for the GTX 1080", "/cu126"),
        (torch_with(cards=NEW_CARD), [CARD], "fix", "no code for the RTX 5090 (sm_120)", "/cu128"),
        (torch_with(cards=NEW_CARD), [CARD | {"cuda": "13.0"}], "fix", "no code for the RTX 5090", "/cu130"),
        (
            torch_with(error="no kernel image"),
            [CARD],
            "fix",
            "fails on the RTX 3060 (sm_86): no kernel image",
            "/cu126",
        ),
        (torch_with(cuda=None, archs=["gfx1100"]), [], "ok", "ROCm, runs on RTX 3060", ""),
    ],
)
def test_torch(on_linux, found, cards, level, text, command):
    finding = engines.check_torch(found, cards)
    assert finding.level == level
    assert text in finding.text
    assert command in finding.command and bool(command) == bool(finding.command)


def test_macos_has_one_build_of_torch(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert engines.check_torch(None, []).command == PIP + " torch"


@pytest.mark.parametrize(
    ("found", "cards", "compiler", "level", "text", "command"),
    [
        (None, [], "/usr/bin/cc", "note", "not installed; ", 'pip install "llama-cpp-python>=0.3.36"'),
        (None, [], None, "note", "no C compiler", "llama-cpp-python/whl/cpu"),
        (None, [CARD], "/usr/bin/cc", "note", "not installed", "llama-cpp-python/whl/cu124"),
        (None, [CARD | {"cuda": "13.0"}], None, "note", "not installed", "llama-cpp-python/whl/cu130"),
        ("importing llama_cpp ends with SIGILL", [], None, "note", "SIGILL", "--force-reinstall"),
        ({"version": "0.3.36", "offload": False}, [], None, "ok", "0.3.36, without GPU offload", ""),
        ({"version": "0.3.36", "offload": False}, [CARD], None, "note", "RTX 3060 idle", "whl/cu124"),
        ({"version": "0.3.36", "offload": True}, [CARD], None, "ok", "with GPU offload", ""),
    ],
)
def test_llama(found, cards, compiler, level, text, command):
    finding = engines.check_llama(found, cards, compiler)
    assert finding.level == level
    assert text in finding.text
    assert command in finding.command and bool(command) == bool(finding.command)


BUILD = {"version": "0.3.36", "offload": False}
AMX, OTHER = engines.Death("SIGILL", True), engines.Death("SIGSEGV", False)


@pytest.mark.parametrize(
    ("death", "cards", "compiler", "words", "command"),
    [
        (AMX, [], "/usr/bin/cc", "dies in quantised prefill (SIGILL) on CPUs with AMX", "-DGGML_NATIVE=OFF"),
        (AMX, [], "/usr/bin/cc", "gcc before 13", '--no-binary llama-cpp-python "llama-cpp-python>=0.3.36"'),
        (AMX, [], "/usr/bin/cc", "minimoe turns those buffers off", "--force-reinstall --no-cache-dir"),
        (AMX, [CARD], "/usr/bin/cc", "AMX", "llama-cpp-python/whl/cu124"),  # a build of one's own has no CUDA
        (AMX, [], None, "AMX", "llama-cpp-python/whl/cpu"),
        (OTHER, [], "/usr/bin/cc", "dies in quantised prefill (SIGSEGV): built for another CPU", "-DGGML_NATIVE=OFF"),
    ],
)
def test_llama_that_dies_in_a_prompt(on_linux, death, cards, compiler, words, command):
    finding = engines.check_llama(BUILD, cards, compiler, death, cpu_has_amx=True)
    assert finding.level == "note" and words in finding.text and command in finding.command
    assert ("turns those buffers off" in finding.text) == death.amx


def test_llama_is_built_without_amx_where_the_cpu_has_it(monkeypatch):
    flag, source = 'CMAKE_ARGS="-DGGML_NATIVE=OFF" ', 'pip install "llama-cpp-python>=0.3.36"'
    for platform in ("linux", "darwin"):
        monkeypatch.setattr(sys, "platform", platform)
        assert engines.check_llama(None, [], "cc", cpu_has_amx=True).command == flag + PIP.removesuffix("pip install") + source
        assert flag not in engines.check_llama(None, [], "cc", cpu_has_amx=False).command
    monkeypatch.setattr(sys, "platform", "win32")  # neither cmd nor PowerShell reads NAME=value before a command
    command = engines.check_llama(None, [], "cl", cpu_has_amx=True).command
    assert command.startswith(PIP) and command.endswith("-C cmake.args=-DGGML_NATIVE=OFF")


def test_llama_is_tried_in_a_child(monkeypatch):
    """What happens here and now; and with children that really die."""
    found = engines.try_llama()
    assert found is None or found == engines.Death("SIGILL", True) and engines.amx.cpu_has_amx()
    real = engines.amx.try_prefill

    def dies(extra_buffers=True):
        return child.run("os:abort", "prefill")

    monkeypatch.setattr(engines.amx, "amx_compiled", lambda: True)
    monkeypatch.setattr(engines.amx, "try_prefill", dies)
    assert engines.try_llama() == engines.Death("SIGABRT", False)  # without the buffers too: it is not AMX
    monkeypatch.setattr(engines.amx, "try_prefill", lambda extra_buffers=True: dies() if extra_buffers else real(False))
    assert engines.try_llama() == engines.Death("SIGABRT", True)


def test_llama_that_cannot_be_tried_is_not_accused(monkeypatch):
    def refuses(extra_buffers=True):
        return child.run("minimoe.ggml.header:check_magic", "prefill", path="/nowhere")

    monkeypatch.setattr(engines.amx, "try_prefill", refuses)
    assert engines.try_llama() is None


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that a child process can import, with the body that a test gives it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":" if sys.platform != "win32" else ";")

    def write(body):
        (tmp_path / "patient.py").write_text(body)
        return "patient"

    return write


def test_probe_reads_the_last_line(module):
    name = module("print('a library that greets')")
    assert engines.probe(name, "import patient; print('{\"version\": 1}')") == {"version": 1}
    assert engines.probe("no_such_module_here", "") is None


def test_probe_survives_what_an_import_can_do(module):
    assert engines.probe(module("raise OSError('libcudart.so.13: cannot open')"), "import patient") == (
        "OSError: libcudart.so.13: cannot open"
    )
    assert engines.probe(module(""), "import patient") == "importing patient ends without an answer"
    assert "more than 0 s" in engines.probe(
        module("import time; time.sleep(60)"), "import patient", timeout=0.2
    )


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_probe_survives_a_build_for_another_cpu(module):
    name = module("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert engines.probe(name, "import patient") == "importing patient ends with SIGILL"


def test_requirements(monkeypatch):
    versions = {"numpy": "2.4.6", "Sphinx": "7.4.7", "matplotlib": "3.9.1", "bitsandbytes": "0.50.2"}
    monkeypatch.setattr(packages, "installed", versions.get)
    assert packages.satisfied("numpy>=2")
    assert packages.satisfied("Sphinx>=7.4,<8")
    assert not packages.satisfied("Sphinx<7.4.7")
    assert packages.satisfied("numpy==2.4.6") and not packages.satisfied("numpy==2.4.7")
    assert not packages.satisfied("matplotlib>=3.10")  # 10 is more than 9
    assert not packages.satisfied("tqdm")

    declared = {
        "": ["numpy>=2", "torch>=2.6"],
        "run": ["matplotlib>=3.10", "tqdm>=4.66"],
        "bnb": ["bitsandbytes>=0.50"],
    }
    run, site, bnb = packages.check_packages(declared)
    assert (run.level, run.text) == ("fix", "missing or of another version: matplotlib, tqdm")
    assert run.command == PIP + ' "matplotlib>=3.10" "tqdm>=4.66"'
    assert (bnb.level, bnb.text) == ("ok", "bitsandbytes 0.50.2")
    assert packages.check_packages(declared | {"bnb": ["bitsandbytes>=0.51"]})[2].level == "note"


def test_a_folder_that_is_not_installed():
    (finding,) = packages.check_packages(None)
    assert finding.level == "fix" and "-e" in finding.command


def test_requirements_are_read_from_the_installed_metadata(monkeypatch):
    lines = ["numpy>=2", 'transformers>=5.23; extra == "run"', "nbval>=0.11 ; extra == 'grade'"]
    monkeypatch.setattr(packages.importlib.metadata, "requires", lambda name: lines)
    assert packages.declared_requirements() == {
        "": ["numpy>=2"], "run": ["transformers>=5.23"], "grade": ["nbval>=0.11"],
    }  # fmt: skip


def test_examine_covers_everything_in_order(monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: ([CARD], None))
    monkeypatch.setattr(engines, "probe", lambda module, code: {"torch": CPU_TORCH}.get(module))
    monkeypatch.setattr(doctor, "declared_requirements", lambda: {})
    findings = doctor.examine()
    assert [finding.topic for finding in findings] == [
        "Python", "system", "CPU", "RAM", "GPU", "torch", "packages", "site", "bitsandbytes",
        "llama-cpp-python", "disk",
    ]  # fmt: skip
    assert {finding.level for finding in findings} <= {"ok", "note", "fix"}
