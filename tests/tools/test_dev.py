"""tools/dev.py and the files that must agree with it."""

import re
import subprocess
import sys
import tomllib

import dev
import pytest
import yaml
from common import ROOT
from digest import pins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_environment_installs_what_dev_installs():
    env = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [d["pip"] for d in env["dependencies"] if isinstance(d, dict)]
    assert pip == ["-c constraints.txt", f"-e .[{','.join(dev.EXTRAS)}]"]
    (python,) = [d for d in env["dependencies"] if isinstance(d, str) and d.startswith("python=")]
    assert tuple(map(int, python.removeprefix("python=").split("."))) == dev.OLDEST
    assert {d for d in env["dependencies"] if isinstance(d, str)} == {python, "pip"}


def test_extras_and_versions_agree_with_pyproject():
    assert set(PROJECT["optional-dependencies"]) == {*dev.EXTRAS, "tensorboard", "datasets", "llama", "bnb"}
    assert PROJECT["requires-python"] == f">=3.{dev.OLDEST[1]},<3.{dev.NEWEST[1] + 1}"


def test_every_dependency_has_a_pin_that_it_accepts():
    pinned = pins()
    for line in PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), []):
        r = Requirement(line)
        assert r.specifier.contains(pinned[canonicalize_name(r.name)]), line


def test_constraints_are_exact_and_sorted():
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if not x.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9.-]+==[0-9][0-9a-z.]*", x) for x in lines)
    assert lines == sorted(lines, key=str.lower)


def test_make_has_the_targets_of_dev():
    make = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"tools/dev.py ([\w-]+)", make)) - {"book"} | {"book"} == set(dev.TARGETS) - {"install"}


@pytest.mark.parametrize(("version", "ok"), [((3, 10, 13), False), ((3, 11, 0), True), ((3, 13, 9), True), ((3, 14), False)])
def test_supported(version, ok):
    assert dev.supported(version) is ok


def test_an_old_python_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    monkeypatch.setenv("PATH", "")
    assert dev.main(["test"]) == 1
    err = capsys.readouterr().err
    assert "Python 3.11 to 3.13 is needed; this is 3.10.1" in err and err.count("\n") == 1


def test_another_python_on_path_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    monkeypatch.setattr(dev.shutil, "which", lambda name: sys.executable if name == "python3.12" else None)
    assert dev.find_python() == [sys.executable]


def test_chapters_by_number(monkeypatch, tmp_path):
    for name in ("02_attention", "03_state", "assignments/A1_scan"):
        (tmp_path / "notebooks" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "notebooks" / f"{name}.ipynb").touch()
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.setattr(dev, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(dev, "PAGES", tmp_path / "book")
    (tmp_path / "book").mkdir()
    for name in ("calculator.ipynb", "intro.md"):
        (tmp_path / "book" / name).touch()
    assert dev.chapters([]) == ["notebooks/02_attention.ipynb", "notebooks/03_state.ipynb", "book/calculator.ipynb"]
    assert dev.chapters(["calc"]) == dev.chapters(["book/calculator.ipynb"]) == ["book/calculator.ipynb"]
    assert dev.chapters(["03"]) == dev.chapters(["notebooks/03_state.ipynb"]) == ["notebooks/03_state.ipynb"]
    assert dev.chapters(["assignments/A1"]) == ["notebooks/assignments/A1_scan.ipynb"]
    with pytest.raises(dev.Stop, match="no chapter '07'"):
        dev.chapters(["07"])
    assert dev.live_chapter() == "02_attention"
    (tmp_path / "notebooks/00_ten.ipynb").touch()
    assert dev.live_chapter() == "00_ten"


def test_a_failing_command_stops_with_one_line(monkeypatch, capsys):
    monkeypatch.setitem(dev.TARGETS, "lab", lambda py, args: dev.call(py, "-c", "raise SystemExit(3)"))
    assert dev.main(["--here", "lab"]) == 1
    assert "failed with exit code 3" in capsys.readouterr().err


def test_the_stamp_follows_what_is_installed(monkeypatch, tmp_path):
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("a")
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    before = dev.stamp(("book",))
    assert dev.stamp(("book", "llama")) != before
    (tmp_path / "constraints.txt").write_text("b")
    assert dev.stamp(("book",)) != before


def test_a_processor_with_amx_gets_the_portable_llama():
    assert "-DGGML_NATIVE=OFF" in dev.llama_options("flags : avx2 amx_bf16 amx_tile amx_int8")
    assert "NATIVE" not in dev.llama_options("flags : avx2 avx512f") and "NATIVE" not in dev.llama_options("")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for pip")
@pytest.mark.parametrize("must", [False, True])
def test_without_a_compiler_the_rest_is_installed(monkeypatch, tmp_path, capsys, must):
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$CMAKE_ARGS: no compiler"; exit 1\n')
    python.chmod(0o755)
    if must:
        with pytest.raises(dev.Stop, match="could not be built"):
            dev.install_llama(python, must=True)
    else:
        dev.install_llama(python, must=False)
        out = capsys.readouterr().out
        assert out.splitlines()[-1].startswith("llama-cpp-python could not be built (_build/llama-cpp-python.log")
    assert "LLAVA_BUILD=OFF: no compiler" in (tmp_path / "_build/llama-cpp-python.log").read_text().replace(" -DGGML_NATIVE=OFF", "")


def test_runs_without_anything_installed():
    """dev.py is what installs, so it may import only the standard library."""
    r = subprocess.run([sys.executable, "-S", "-E", str(ROOT / "tools/dev.py"), "--help"], capture_output=True, text=True)
    assert r.returncode == 0 and "test-full" in r.stdout
