"""The page of reader cards, made from card files by the book's own directive."""

from __future__ import annotations

import copy
import html
import json
import os
import re
import subprocess
import sys

import pytest
from common import ROOT

RATES = {
    "bandwidth": {"read_bytes_per_second": 312.3e9, "copy_bytes_per_second": 290e9, "buffer_bytes": 1 << 30},
    "matmul": {"float32": {"flop_per_second": 9.1e12}, "bfloat16": {"flop_per_second": 24.6e12}, "float16": {"missing": "no"}},
    "launch_latency_s": 4.2e-6,
}
HOST = {
    "bandwidth": {"missing": "the process died"}, "matmul": {"float32": {"flop_per_second": 410e9}}, "launch_latency_s": None,
}  # fmt: skip
ROW = {
    "runtime": "llama.cpp", "model": "nano-Q4_0", "format": "Q4_0", "device": "cuda", "threads": 6, "file_bytes": 18_000_000_000,
    "gpu_layers": 99, "cpu_moe": 21, "test": "tg128", "unit": "tokens/s", "tokens": 128, "depth": 0, "batch": 1,
    "median": 41.25, "p10": 40.0, "p90": 42.0, "n": 10, "clock": "wall", "ceiling": 90.0, "share": 0.4583, "bound": "ram",
}  # fmt: skip


def without_figures(**changes):
    return {key: value for key, value in ROW.items() if key not in ("median", "p10", "p90", "n", "ceiling", "share", "bound")} | changes


def make_card(name="a-3060", date="2026-11-20", **changes):
    """Invented numbers; the build checks the form."""
    memory = {key: ROW[key] for key in ROW if key not in ("ceiling", "share", "bound", "clock")}
    memory |= {"test": "memory_gpu_process", "unit": "bytes", "tokens": 0, "median": 11.5e9, "p10": 11.5e9, "p90": 11.5e9}
    rows = [ROW, without_figures(test="pp512", refused="above what the device allows"),
            without_figures(runtime="minimoe", model="small", format="bfloat16", test="tg128", cpu_moe=0, gpu_layers=None,
                            missing="out of memory"), memory]  # fmt: skip
    return copy.deepcopy({
        "schema": 1, "name": name, "date": date, "minimoe": "0.1.0", "commit": "0123456789ab",
        "machine": {"os": "Linux-6.1", "device": "cuda", "device_name": "NVIDIA <3060>", "cpu": "Some CPU", "cores": 6,
                    "memory_bytes": 32e9, "driver": "550.1"},
        "versions": {"minimoe": "0.1.0", "torch": "2.13.0+cu126"},
        "settings": {"rounds": 2, "repeats": 5, "load_before": 0.1}, **RATES, "cpu_threads": {"6": HOST}, "rows": rows,
    } | changes)  # fmt: skip


@pytest.fixture
def page(tmp_path):
    """page(card, ...) -> the text of the page made from these cards, and Sphinx's warnings."""

    def build(*cards):
        folder = tmp_path / "src/results/cards"
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("no card")
        (tmp_path / "src/index.rst").write_text("Cards\n=====\n\n.. reader-cards::\n")
        for card in cards:
            (folder / f"{card['name']}.json").write_text(json.dumps(card))
        command = [sys.executable, "-m", "sphinx", "-q", "--no-color", "-C", "-D", "extensions=minimoe_cards", "-D", "html_theme=basic"]
        path = os.pathsep.join([str(ROOT / "book/_ext"), str(ROOT / "src")])
        done = subprocess.run([*command, str(tmp_path / "src"), str(tmp_path / "out")], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": path})  # fmt: skip
        return (tmp_path / "out/index.html").read_text(encoding="utf-8"), done.stderr

    return build


def tables(text):
    """Each table as rows of texts."""
    return [
        [[" ".join(html.unescape(re.sub(r"<[^>]+>", " ", cell)).split()) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)]
         for row in re.findall(r"<tr.*?</tr>", table, re.S)]
        for table in re.findall(r"<table.*?</table>", text, re.S)
    ]  # fmt: skip


def test_without_a_card_the_page_says_so(page):
    text, warnings = page()
    assert "There is no card yet" in text and warnings == "" and tables(text) == []


def test_one_card(page):
    text, warnings = page(make_card())
    assert warnings == "" and "There is one card so far" in text
    assert '<section id="card-a-3060">' in text and "NVIDIA &lt;3060&gt;, 2026-11-20" in text
    assert "Linux-6.1, Some CPU, 6 cores, 32 GB of memory, driver 550.1." in text and "torch 2.13.0+cu126" in text
    device, rates = tables(text)
    assert device == [
        ["on", "reads", "copies", "float32", "bfloat16", "float16", "smallest call"],
        ["NVIDIA <3060>", "312.3 GB/s", "290.0 GB/s", "9.1 TFLOP/s", "24.6 TFLOP/s", "-", "4.2 µs"],
        ["its CPU, 6 threads", "not measured", "not measured", "410 GFLOP/s", "-", "-", "-"],
    ]
    assert rates == [
        ["model", "program", "threads", "tg128", "pp512", "most memory"],
        ["nano-Q4_0, experts of 21 blocks in RAM", "llama.cpp", "6", "41.2 tokens/s, 46%", "refused", "11,500 MB"],
        ["small bfloat16", "minimoe", "6", "not measured", "", ""],
    ]


def test_several_cards_newest_first_with_an_overview(page):
    cpu = {"machine": {"device": "cpu", "device_name": "Old CPU"}, "cpu_threads": {"1": RATES, "4": RATES}, "rows": []}
    text, warnings = page(make_card("b", "2025-01-31", **cpu), make_card("c", "2026-12-01"), make_card("a", "2026-11-01"))
    assert warnings == "" and "There are 3 cards." in text
    assert re.findall(r'<section id="card-(\w)">', text) == ["c", "a", "b"]
    overview, *_, old = tables(text)
    assert [row[1] for row in overview[1:]] == ["2026-12-01", "2026-11-01", "2025-01-31"]
    assert overview[1][2:] == ["312.3 GB/s", "290.0 GB/s", "24.6 TFLOP/s", "41.2 tokens/s (nano-Q4_0, llama.cpp)"]
    assert overview[3][2:] == ["312.3 GB/s", "290.0 GB/s", "24.6 TFLOP/s", "-"]
    assert all(f'href="#card-{name}"' in text for name in "abc")
    assert [row[0] for row in old[1:]] == ["1 thread", "4 threads"]


def test_a_bad_card_fails_the_strict_build_with_one_line(page):
    _, warnings = page(make_card() | {"rows": [ROW | {"median": 95.0, "p90": 95.0}]})
    assert "ERROR: results/cards: a-3060.json: rows[0].median: is above its ceiling" in warnings


def test_every_committed_card_has_its_section(site):
    """On the book's own page."""
    text = (site.folder / "book/cards.html").read_text(encoding="utf-8")
    names = [path.stem for path in (ROOT / "results/cards").glob("*.json")]
    assert len(re.findall(r'<section id="card-', text)) == len(names)
    assert all(f"results/cards/{name}.json" in text for name in names)
