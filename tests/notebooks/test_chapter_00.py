"""Chapter 00 is what `make book` runs on a reader's machine, so it has to go on where llama-cpp-python is missing."""

from __future__ import annotations

import json
import subprocess
import sys

import nb
import pytest
from common import ROOT, notebook_env

# A kernel's work without a kernel. Few tokens: whether the programs run is asked here, not how fast.
RUN = """
import json, sys
sys.modules["llama_cpp"] = None  # as if it were not installed
names = {}
for source in json.load(sys.stdin):
    exec(source, names)
    names["TOKENS"] = 4
print("MEASURED", sorted(names["rate"]))
"""


@pytest.fixture(scope="module")
def cells() -> dict[str, str]:
    (path,) = (ROOT / "notebooks").glob("00_*.ipynb")
    chapter = json.loads(path.read_text(encoding="utf-8"))
    return {c["id"]: "".join(c["source"]) for c in chapter["cells"] if c["cell_type"] == "code"}


def test_goes_on_without_llama_cpp(cells):
    """Every cell up to the measured speeds, but for the one that fills 1 GB to measure bandwidth."""
    names = list(cells)
    todo = [cells[name] for name in names[: names.index("speeds") + 1] if name != "bandwidth"]
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(todo), cwd=ROOT / "notebooks", capture_output=True, text=True,
        encoding="utf-8", env=notebook_env("ci") | {"MPLBACKEND": "agg", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if "llama" in line]
    assert len(said) == 1 and "llama-cpp-python is not installed" in said[0] and "pip install" in said[0]
    assert "MEASURED ['minimoe', 'read F32', 'read Q8_0', 'transformers']" in done.stdout


def test_the_page_shows_all_three_programs():
    """In the place of the reader's own measurement."""
    shown = nb.card("00_three_runtimes.json")["text/plain"]
    for program in ("minimoe", "transformers", "llama.cpp, F32", "llama.cpp, Q8_0"):
        assert f"\n{program}: " in f"\n{shown}", program
