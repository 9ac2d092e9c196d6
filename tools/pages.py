"""Build the site from a staged copy of the sources.

    python tools/pages.py                       all pages from stored outputs, into _build/html
    python tools/pages.py --live 02_attention   the same, with one chapter executed here first

The copy keeps the git tree clean: executed notebooks and Sphinx's leftovers stay under _build/.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys

from common import ROOT, notebook_env

SOURCES = ("_config.yml", "book", "notebooks", "results", "checkpoints")
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".*.tmp")


def stage(target: pathlib.Path) -> pathlib.Path:
    """A fresh copy of what the pages are made from."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=LEFT_OUT)
        elif source.exists():
            shutil.copy2(source, target / name)
    return target


def build(source: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Render `source` strictly; the pages are in the folder that comes back. Raises CalledProcessError."""
    for old in ("html", ".doctrees", "jupyter_execute"):
        shutil.rmtree(out / "_build" / old, ignore_errors=True)
    # not the jupyter-book script: it is beside Python in a venv, elsewhere in a conda environment on Windows
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", "."]
    command += ["--toc", "book/_toc.yml", "--path-output", str(out), "-W", "-n", "--keep-going", "-q"]
    r = subprocess.run(command, cwd=source, capture_output=True, text=True, encoding="utf-8", env=notebook_env())
    if r.returncode:
        log = (r.stdout + r.stderr).strip().splitlines()
        wrong = [x for x in log if "WARNING" in x or "ERROR" in x or "rror:" in x]
        raise subprocess.CalledProcessError(r.returncode, "jupyter-book build", "\n".join(wrong or log[-30:]))
    return out / "_build" / "html"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--live", metavar="CHAPTER", help="execute this chapter in the copy, at this machine's size")
    a = p.parse_args()
    source = stage(ROOT / "_build" / "src")
    if a.live:
        chapter = source / "notebooks" / f"{a.live}.ipynb"
        run = [sys.executable, "tools/nb.py", "run", str(chapter.relative_to(ROOT))]
        if subprocess.run([*run, "--profile", "auto", "--keep-volatile"], cwd=ROOT).returncode:
            return 1
    try:
        html = build(source, ROOT)
    except subprocess.CalledProcessError as e:
        print(e.output, file=sys.stderr)
        return 1
    print(f"\nThe book: {(html / 'index.html').as_uri()}")
    here = html.relative_to(ROOT).as_posix()
    print(f"Or serve it: {pathlib.Path(sys.executable).name} -m http.server -d {here} 8000")
    return 0


if __name__ == "__main__":
    sys.exit(main())
