"""The book's own work on a device, for tools/gpu_parts.py: its chapters, and the training of the shipped model."""

from __future__ import annotations

import _thread
import ast
import contextlib
import io
import json
import linecache
import os
import pathlib
import shlex
import sys
import sysconfig
import threading
import types
from typing import Any

from common import ROOT
from gpu_shared import Report, Trouble, call, complain, memory, one_line, read_json

SHARD = 15 << 20  # bytes of weights in one file
FLAGS = ("steps", "batch", "length", "accumulate", "lr", "decay", "mtp_weight", "precision", "seed")
SWITCHES = ("recompute", "compile")


def chapters(report: Report) -> None:
    """Every chapter, each in a process of its own under the cap; executed copies are not kept."""
    books = sorted((ROOT / "notebooks").glob("*.ipynb"))
    if wanted := report.args.chapters:
        books = [book for book in books if book.name.startswith(tuple(wanted))]
    if not books:
        raise Trouble("notebooks/ has no such chapter")
    for number, book in enumerate(books):
        share = report.left() / (len(books) - number)
        out = report.args.out.parent / f"chapter-{book.stem}.json"
        words = [sys.executable, str(ROOT / "tools" / "gpu_parts.py"), "chapter", "--out", str(out), "--device", report.args.device,
                 "--cap", f"{report.args.cap:.0f}", "--chapters", str(book)]  # fmt: skip
        trouble, seconds = call(words, share)
        found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        trouble = found.pop("trouble", None) or trouble
        report.add("chapters", {"chapter": book.stem, "ok": not trouble, "trouble": trouble, "seconds": seconds} | found)
    complain(report, "chapters", "chapter")


def chapter(report: Report) -> None:
    """Run one notebook's cells in this process, as a kernel would, without needing one."""
    book = pathlib.Path(report.args.chapters[0])
    cells = [cell for cell in json.loads(book.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    main_module = sys.modules["__main__"] = types.ModuleType("__main__")
    main_module.__dict__["display"] = show  # a kernel has it built in
    os.chdir(book.parent)
    for number, cell in enumerate(cells, 1):
        try:
            run_cell("".join(cell["source"]), f"cell {number}", main_module.__dict__)
        except Exception as error:
            if "raises-exception" not in cell["metadata"].get("tags", []):
                raise Trouble(f"cell {number} of {len(cells)}: {one_line(error)}") from error
        report.put(cells=number, of=len(cells), **memory(report.args.device))


def run_cell(source: str, name: str, names: dict[str, Any]) -> None:
    """Execute a cell, and show its last expression as a notebook does."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # inspect reads functions there
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    if last is not None:
        show(eval(compile(ast.Expression(last.value), name, "eval"), names))


def show(*values: Any) -> None:
    """Make what a notebook would show, and drop it."""
    for value in values:
        if value is not None:
            html = getattr(value, "_repr_html_", None)
            (html or value.__repr__)()


def training(report: Report) -> None:
    """A slice of the shipped model's training: the recipe's options, going on from the run's newest checkpoint."""
    from minimoe import cli

    args = report.args
    recipe = json.loads((ROOT / "checkpoints" / "small" / "recipe.json").read_text(encoding="utf-8"))
    words = toy_training() if args.quick else train_words(recipe)
    words += ["--device", args.device, "--out", str(args.run), "--resume", *shlex.split(args.train)]
    report.put(command=shlex.join(["minimoe", "train", *words]))
    # as Ctrl-C would: the step comes to its end and everything is saved, which the rest of the time is for
    timer = threading.Timer(0.8 * report.left(), _thread.interrupt_main)
    timer.daemon = True
    timer.start()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.main(["train", *words])
    print(said.getvalue(), flush=True)
    ended = timer.finished.is_set()
    timer.cancel()
    log = args.run / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    result = read_json(args.run / "recipe.json")
    report.put(steps=len(lines), log=lines[:: max(1, len(lines) // 200)], result=result.get("result"), **memory(args.device))
    if not lines or code and not ended:
        raise Trouble((said.getvalue().splitlines() or [f"minimoe train ended with exit code {code}"])[-1])
    report.put(weights=ship(args.run, len(lines)))


def train_words(recipe: dict[str, Any]) -> list[str]:
    """The options of minimoe train that repeat ``recipe``."""
    from minimoe.train import TrainOptions

    words = ["--preset", recipe["preset"], "--save-every", "200"]
    default = TrainOptions()
    for name, value in recipe["options"].items():
        if name in FLAGS:
            words += [f"--{name.replace('_', '-')}", str(value)]
        elif name in SWITCHES:
            words += [f"--{name}"] if value else []
        elif value != getattr(default, name, value):
            raise Trouble(f"the recipe has {name}={value}, and minimoe train has no option for that")
    shares = [(part["name"], part["share"]) for part in recipe.get("sources", []) if "share" in part]
    for name, share in shares or [(recipe.get("corpus", {}).get("name", "stdlib"), 1.0)]:
        words += ["--data", f"{name}={share}"]
    return words


def toy_training() -> list[str]:
    """A little of the standard library: the same files at every call."""
    folder = pathlib.Path(sysconfig.get_path("stdlib")) / "email"
    return ["--preset", "tiny", "--steps", "20", "--batch", "2", "--length", "32", "--data", str(folder)]


def ship(run: pathlib.Path, steps: int) -> dict[str, Any]:
    """The weights in bfloat16, in files small enough to carry; where they are, and how large."""
    import torch

    from minimoe.interop import load_model, save_hf

    folder = run / f"weights-{steps:08d}"
    if not folder.exists():
        model, tokenizer = load_model(run)
        save_hf(model.to(torch.bfloat16), folder, tokenizer, max_shard_bytes=SHARD)
    return {"folder": folder.name, "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())}}
