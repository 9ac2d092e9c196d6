"""Everything that make does, for any system: python tools/dev.py TARGET (on Windows: py -3.11 tools/dev.py TARGET).

    book                  install into .venv, run one chapter here, render the rest from stored outputs
    run [02 03 ...]       execute chapters in place and store their outputs (all without a number)
    experiments [01 ...]  the sweeps behind the chapters' claims; they write results/
    bench                 side by side with other programs
    lab                   JupyterLab on the chapters
    test                  the gate
    test-full             everything: slow tests, every page at every size and theme, stale outputs

With --here the commands use the Python that runs this file (a conda environment, say) and install nothing.
llama-cpp-python is compiled (about five minutes on two cores); where that fails, the chapters say what is missing.
MINIMOE_EXTRAS names extras to install as well ("bnb", say), "-llama" among them leaves llama-cpp-python out, and
"llama" makes its failure ours. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import time
import venv

from common import ROOT, notebook_env

EXTRAS = ("book", "run", "grade", "dev")
LLAMA = "llama"
OLDEST, NEWEST = (3, 11), (3, 13)
NOTEBOOKS, PAGES = ROOT / "notebooks", ROOT / "book"  # chapters, and pages that are notebooks too


class Stop(Exception):
    """One line for the person at the terminal."""


def call(*command: object, env: dict[str, str] | None = None) -> None:
    """Run a command from the root; anything but success stops the target."""
    words = [str(c) for c in command]
    if (code := subprocess.run(words, cwd=ROOT, env=env).returncode) != 0:
        shown = " ".join([pathlib.Path(words[0]).name, *words[1:]])
        raise Stop(f"failed with exit code {code}: {shown}")


def supported(version: tuple[int, ...]) -> bool:
    return OLDEST <= tuple(version[:2]) <= NEWEST


def find_python() -> list[str]:
    """A supported Python: this one, or one on PATH."""
    if supported(sys.version_info):
        return [sys.executable]
    for minor in range(OLDEST[1], NEWEST[1] + 1):
        found = shutil.which(f"python3.{minor}")
        # a name on PATH may be a version manager's stub that only prints an error
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return [found]
    have = ".".join(map(str, sys.version_info[:3]))
    raise Stop(
        f"Python 3.{OLDEST[1]} to 3.{NEWEST[1]} is needed; this is {have} and PATH has no other. "
        "Install one, or name it: make PYTHON=/path/to/python3.11"
    )


def venv_python(folder: pathlib.Path) -> pathlib.Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def stamp(extras: tuple[str, ...]) -> str:
    """Changes when what should be installed changes."""
    h = hashlib.sha256(repr((extras, str(ROOT))).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        h.update((ROOT / name).read_bytes())
    return h.hexdigest()


def install() -> str:
    """Make .venv and install the book into it, unless that is done. Its Python's path."""
    folder = ROOT / ".venv"
    python, mark = venv_python(folder), folder / "minimoe-installed"
    asked = os.environ.get("MINIMOE_EXTRAS", "").replace(",", " ").split()
    extras = (*EXTRAS, *(e for e in asked if e not in (LLAMA, f"-{LLAMA}")))
    wanted = stamp((*EXTRAS, *asked))
    if mark.exists() and mark.read_text() == wanted and python.exists():
        return str(python)
    if not python.exists() or subprocess.run([python, "-c", "import pip"], capture_output=True).returncode:
        if folder.exists() and not mark.exists() and any(folder.iterdir()):
            raise Stop(f"{folder.name} is there and has no working pip; delete it, or use --here with your own Python")
        print(f"making {folder.name} with Python {sys.version.split()[0]}", flush=True)
        try:
            venv.create(folder, clear=True, with_pip=True, symlinks=os.name != "nt")
        except subprocess.CalledProcessError as e:
            raise Stop(f"cannot make {folder.name} ({e}); on Debian and Ubuntu: apt install python3-venv") from None
    print("installing into .venv: some minutes the first time", flush=True)
    start = time.perf_counter()
    call(
        python, "-m", "pip", "install", "-q", "--disable-pip-version-check",
        "-c", "constraints.txt", "-e", f".[{','.join(extras)}]",
    )  # fmt: skip
    if f"-{LLAMA}" not in asked:
        install_llama(python, must=LLAMA in asked)
    mark.write_text(wanted)
    print(f"installed in {time.perf_counter() - start:.0f} s", flush=True)
    return str(python)


def install_llama(python: pathlib.Path, must: bool) -> None:
    """Build llama-cpp-python. Without a compiler the book is whole but for the cells that run llama.cpp."""
    log = ROOT / "_build" / "llama-cpp-python.log"
    log.parent.mkdir(exist_ok=True)
    env = dict(os.environ)
    env.setdefault("CMAKE_ARGS", llama_options(cpu_flags()))
    print("building llama-cpp-python: about five minutes on two cores", flush=True)
    with open(log, "w", encoding="utf-8") as out:
        command = [
            str(python), "-m", "pip", "install", "--disable-pip-version-check", "-c", "constraints.txt",
            "-e", f".[{LLAMA}]",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT).returncode == 0
    if not done and must:
        raise Stop(f"llama-cpp-python could not be built; {log.relative_to(ROOT)} says why")
    if not done:
        print(f"llama-cpp-python could not be built ({log.relative_to(ROOT)} says why): going on without it", flush=True)


def cpu_flags() -> str:
    """What the processor can do, as Linux lists it; empty elsewhere."""
    try:
        return pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def llama_options(flags: str) -> str:
    """CMake options. gcc 12 compiles ggml's AMX code so that quantised prompts die with SIGILL
    (ggml-org/llama.cpp#26954), so a processor with AMX gets the portable build; LLaVA is not used."""
    return "-DLLAVA_BUILD=OFF" + (" -DGGML_NATIVE=OFF" if "amx_int8" in flags else "")


def _notebooks(pattern: str) -> list[str]:
    return [p.relative_to(ROOT).as_posix() for folder in (NOTEBOOKS, PAGES) for p in sorted(folder.glob(pattern))]


def chapters(wanted: list[str]) -> list[str]:
    """Notebook paths for "02" or "02_attention" or "assignments/A1" or "calculator", all of them for nothing."""
    every, found = _notebooks("*.ipynb"), []
    for w in wanted:
        hits = _notebooks(f"{w.removesuffix('.ipynb').removeprefix('notebooks/').removeprefix('book/')}*.ipynb")
        if not hits:
            raise Stop(f"no chapter {w!r} in notebooks/; there are {', '.join(pathlib.Path(e).stem for e in every) or 'none'}")
        found += hits
    return found if wanted else every


def live_chapter() -> str:
    """The chapter that `book` executes: 00 where there is one."""
    for pattern in ("00_*.ipynb", "02_attention.ipynb"):
        if hits := sorted(NOTEBOOKS.glob(pattern)):
            return hits[0].stem
    raise Stop("notebooks/ has neither 00_*.ipynb nor 02_attention.ipynb")


def book(py: str, args: list[str]) -> None:
    call(py, "tools/pages.py", "--live", live_chapter(), env=notebook_env())


def run(py: str, args: list[str]) -> None:
    call(py, "tools/nb.py", "run", *chapters(args), env=notebook_env("ci"))


def scripts(py: str, folder: str, wanted: list[str]) -> None:
    todo = sorted((ROOT / folder).glob("[!_]*.py"))
    todo = [p for p in todo if not wanted or any(p.name.startswith(w) for w in wanted)]
    if not todo:
        raise Stop(f"nothing to run in {folder}/" + (f" for {' '.join(wanted)}" if wanted else ""))
    for p in todo:
        print(f"{folder}/{p.name}", flush=True)
        call(py, p, env=notebook_env())


def experiments(py: str, args: list[str]) -> None:
    scripts(py, "experiments", args)


def bench(py: str, args: list[str]) -> None:
    call(py, "benchmarks/run_all.py", *args, env=notebook_env())


def lab(py: str, args: list[str]) -> None:
    call(py, "-m", "jupyterlab", "notebooks", *args, env=notebook_env())


def pytest(py: str, marks: str, args: list[str]) -> None:
    where = ["tests", *(folder.name for folder in (NOTEBOOKS, PAGES) if any(folder.glob("*.ipynb")))]
    # loadfile: a notebook's cells are one file and must stay with one kernel
    call(
        py, "-m", "pytest", "-m", marks, "-n", "2", "--dist", "loadfile", "-q",
        "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "900", *(args or where),
        env=notebook_env("ci"),
    )  # fmt: skip


def test(py: str, args: list[str]) -> None:
    pytest(py, "not slow and not gpu and not download", args)


def test_full(py: str, args: list[str]) -> None:
    pytest(py, "not gpu and not download", args)
    # apart, because the ci profile above hides the GPU; without one they are skipped, with the reason
    call(py, "-m", "pytest", "-m", "gpu and not download", "-q", "-rs", "tests", env=notebook_env())


TARGETS = {
    "book": book, "run": run, "experiments": experiments, "bench": bench, "lab": lab,
    "test": test, "test-full": test_full, "install": lambda py, args: None,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--here", action="store_true", help="use this Python as it is")
    p.add_argument("target", choices=TARGETS)
    p.add_argument("args", nargs="*", help="chapters, experiments, or what to pass on")
    a, extra = p.parse_known_args(argv)
    a.args += extra
    try:
        python = find_python()
        if python != [sys.executable]:
            print(f"this is Python {sys.version.split()[0]}; going on with {python[0]}", flush=True)
            return subprocess.run([*python, __file__, *(argv if argv is not None else sys.argv[1:])]).returncode
        TARGETS[a.target](sys.executable if a.here else install(), a.args)
    except Stop as e:
        print(f"{a.target}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
