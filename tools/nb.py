"""Run, normalise and check the notebooks.

    python tools/nb.py run notebooks/*.ipynb --jobs 2     execute in place, then normalise
    python tools/nb.py norm notebooks/*.ipynb             normalise only
    python tools/nb.py check notebooks/*.ipynb            fail on stale, failed or unnormalised notebooks

Outputs are stored in the notebook and are what the site shows. A cell tagged `volatile` measures something that
differs from run to run; its output is not stored. In its place the page gets the committed measurement that the
cell's metadata names (`minimoe: {card: FILE}`, a file under results/) or a line that says to run it. A card shows the
file's "card" ({label: text or number}), or the plain figures of its "numbers", and its machine, torch and commit.
"""

from __future__ import annotations

import argparse
import concurrent.futures as cf
import html
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import nbformat
from common import PROFILES, ROOT, notebook_env
from digest import digest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
CELL_KEEP = {"tags", "mystnb", "minimoe", "jupyter", "editable", "deletable"}
IMAGES = ("image/png", "image/svg+xml", "image/jpeg")
MAX_WIDTH, MAX_IMAGE, MAX_OUTPUT = 76, 150_000, 400_000


def card(name: str, root: pathlib.Path = ROOT) -> dict:
    """The output that stands on the page for a volatile cell: a measurement from results/, or a line of text."""
    if not name:
        text = "Differs from machine to machine: run this cell to see yours."
        return {"text/html": f'<p class="mm-volatile">{text}</p>', "text/plain": text}
    try:
        data = json.loads((root / "results" / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SystemExit(f"results/{name}: no readable card ({e})") from None
    shown = data.get("card") or {k: v for k, v in data.get("numbers", {}).items() if not isinstance(v, (dict, list))}
    rows = [(k, f"{v:.4g}" if isinstance(v, float) else str(v)) for k, v in shown.items()]
    machine = data.get("machine", {})
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] != 1) if "threads" in machine else ""
    torch = f"torch {machine['torch']}" if "torch" in machine else ""
    commit = f"commit {data['commit'][:12]}" if "commit" in data else ""
    origin = ", ".join(filter(None, ["measured on " + machine.get("device_name", "a machine"), threads, torch, commit]))
    body = "".join(f'<tr><th scope="row">{html.escape(k)}</th><td>{html.escape(v)}</td></tr>' for k, v in rows)
    return {
        "text/html": f'<div class="mm-card"><table class="mm-table"><tbody>{body}</tbody></table>'
        f"<p>{html.escape(origin)} (results/{html.escape(name)})</p></div>",
        "text/plain": "\n".join([*(f"{k}: {v}" for k, v in rows), origin]),
    }


def _outputs(cell: dict) -> list:
    """The cell's outputs as they are stored: no widget views, no stderr (progress bars, warnings), streams merged."""
    kept: list = []
    for o in cell.outputs:
        data = o.get("data", {})
        if WIDGET_VIEW in data:
            if "text/html" not in data:
                continue  # progress bars and plain widgets: nothing to show without a kernel
            del data[WIDGET_VIEW]
        if o.output_type == "stream":
            if o.name == "stderr":
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += o.text
                continue
        o.pop("transient", None)
        kept.append(o)
    return kept


def normalise(nb, keep_volatile: bool = False):
    """The same notebook whoever ran it, and when: fixed metadata, counts 1..n, only outputs that a page can show."""
    keep = {k: nb.metadata[k] for k in ("minimoe", "mystnb") if k in nb.metadata}
    nb.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": {"name": "python"}, **keep})
    nb.nbformat, nb.nbformat_minor = 4, 5
    count, ids = 0, set()
    for i, c in enumerate(nb.cells):
        c.metadata = nbformat.from_dict({k: v for k, v in c.metadata.items() if k in CELL_KEEP})
        c.source = c.source.rstrip()
        if not c.get("id") or c["id"] in ids:
            c["id"] = f"cell-{i:02d}"
        ids.add(c["id"])
        if c.cell_type != "code":
            continue
        count += 1
        if "tags" in c.metadata:
            tags = set(c.metadata.tags)
            if "volatile" in tags:  # so that nbval never compares it, in its strict mode either
                tags.add("nbval-ignore-output")
            c.metadata.tags = sorted(tags)
        c.outputs = _outputs(c)
        if c.execution_count is None:
            continue
        c.execution_count = count
        if "volatile" in c.metadata.get("tags", []) and not keep_volatile:
            data = card(c.metadata.get("minimoe", {}).get("card", ""))
            c.outputs = [nbformat.v4.new_output("display_data", data=data)]
        for o in c.outputs:
            if o.output_type == "execute_result":
                o.execution_count = count
    return nb


def write(nb, path: pathlib.Path) -> None:
    """All of the file or none of it, with the same line ends everywhere."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        tmp.write_text(nbformat.writes(nb).rstrip("\n") + "\n", encoding="utf-8", newline="\n")
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def actual_profile(profile: str) -> str:
    if profile != "auto":
        return profile
    code = "import minimoe; print(minimoe.profile())"
    r = subprocess.run([sys.executable, "-c", code], env=notebook_env(), capture_output=True, text=True)
    if r.returncode:
        raise SystemExit(f"minimoe.profile() failed: {r.stderr.strip().splitlines()[-1]}")
    return r.stdout.strip()


def run_one(path: str, profile: str, timeout: int, keep_volatile: bool) -> tuple[str, float, list[str]]:
    """Execute one notebook in place. Nothing is written unless every cell ran."""
    file = pathlib.Path(path)
    nb = nbformat.read(file, 4)
    for c in nb.cells:
        if c.cell_type == "code":
            c.execution_count = None  # so that an error can be placed by what has run this time
    start = time.perf_counter()
    client = NotebookClient(
        nb, timeout=timeout, kernel_name="python3", skip_cells_with_tag="nbval-skip",
        extra_arguments=["--log-level=40"], resources={"metadata": {"path": str(file.resolve().parent)}},
    )  # fmt: skip
    try:
        client.execute(env=notebook_env(profile))
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
        done = sum(c.cell_type == "code" and c.execution_count is not None for c in nb.cells)
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(e)).strip().splitlines()
        raise RuntimeError(f"{path}: code cell {done}: {text[-1] if text else type(e).__name__}") from None
    heard = []
    for i, c in enumerate(nb.cells):
        for o in c.get("outputs", []):
            if o.output_type == "stream" and o.name == "stderr" and o.text.strip():
                heard.append(f"{path}: cell {i}: stderr, not stored: {o.text.strip().splitlines()[-1][:100]}")
    nb = normalise(nb, keep_volatile)
    nb.metadata["minimoe"] = {"digest": digest(nb), "profile": profile}
    write(nb, file)
    return path, time.perf_counter() - start, heard


def _check_code(i: int, c: dict, bad: list[str]) -> None:
    tags = set(c.metadata.get("tags", []))
    for line in c.source.splitlines():
        if len(line) > MAX_WIDTH:
            bad.append(f"cell {i}: a line of {len(line)} characters; a page shows {MAX_WIDTH}")
        if line.lstrip().startswith(("%", "!")):
            bad.append(f"cell {i}: {line.strip()[:30]!r}: nbval passes a cell whose magic fails; use Python")
    if c.execution_count is None and c.source.strip() and "nbval-skip" not in tags:
        bad.append(f"cell {i}: not executed")
    if {"volatile", "nbval-check-output"} <= tags:
        bad.append(f"cell {i}: both volatile and nbval-check-output")
    alt = c.metadata.get("mystnb", {}).get("image", {}).get("alt")
    for o in c.outputs:
        data = o.get("data", {})
        if o.output_type == "error" and "raises-exception" not in tags:
            bad.append(f"cell {i}: stored {o.ename}")
        if o.output_type == "stream" and o.name == "stderr":
            bad.append(f"cell {i}: stored stderr")
        if WIDGET_VIEW in data:
            bad.append(f"cell {i}: a stored widget view (give it a static twin, or do not leave it as the output)")
        for kind in IMAGES:
            if kind in data and not alt:
                bad.append(f"cell {i}: image without mystnb.image.alt in the cell's metadata")
            if len(data.get(kind, "")) > MAX_IMAGE:
                bad.append(f"cell {i}: image of {len(data[kind]):,} bytes; at most {MAX_IMAGE:,}")
        if len(json.dumps(o)) > MAX_OUTPUT:
            bad.append(f"cell {i}: output of more than {MAX_OUTPUT:,} bytes")


def check_one(path: str, allow_stale: bool = False) -> list[str]:
    """What is wrong with a stored notebook, a line each."""
    raw = pathlib.Path(path).read_text(encoding="utf-8")
    nb = nbformat.reads(raw, 4)
    bad: list[str] = []
    stored = nb.metadata.get("minimoe", {})
    if not allow_stale and stored.get("digest") != digest(nb):
        bad.append("stale: cells, package code, pins or results changed since the outputs were stored; make run")
    if stored.get("profile") != "ci":
        bad.append(f"outputs of profile {stored.get('profile')!r}; stored ones come from 'ci': make run")
    for i, c in enumerate(nb.cells):
        if c.cell_type == "code":
            _check_code(i, c, bad)
    if not allow_stale or not any("volatile" in c.metadata.get("tags", []) for c in nb.cells):
        if nbformat.writes(normalise(nb)).rstrip("\n") + "\n" != raw:
            bad.append("not normalised: python tools/nb.py norm " + path)
    return bad


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", choices=["run", "norm", "check"])
    p.add_argument("paths", nargs="+")
    p.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    p.add_argument("--timeout", type=int, default=900, help="seconds a cell may take")
    p.add_argument("--profile", choices=[*PROFILES, "auto"], default="ci", help="auto: what this machine allows")
    p.add_argument("--keep-volatile", action="store_true", help="leave measured times in (for a copy, not for git)")
    p.add_argument("--allow-stale", action="store_true", help="check everything but staleness")
    a = p.parse_args(argv)
    try:
        if a.what == "run":
            profile, failed = actual_profile(a.profile), 0
            with cf.ProcessPoolExecutor(min(a.jobs, len(a.paths))) as pool:
                todo = [pool.submit(run_one, x, profile, a.timeout, a.keep_volatile) for x in a.paths]
                for f in cf.as_completed(todo):
                    try:
                        path, seconds, heard = f.result()
                        print(*heard, f"{path}: {seconds:.1f} s ({profile})", sep="\n", flush=True)
                    except RuntimeError as e:
                        failed = 1
                        print(e, file=sys.stderr, flush=True)
            return failed
        if a.what == "norm":
            for x in a.paths:
                write(normalise(nbformat.read(x, 4)), pathlib.Path(x))
            return 0
        problems = [f"{x}: {m}" for x in a.paths for m in check_one(x, a.allow_stale)]
        print(*problems, sep="\n", end="\n" if problems else "")
        return 1 if problems else 0
    except (OSError, nbformat.reader.NotJSONError, nbformat.ValidationError) as e:
        print(f"{type(e).__name__}: {str(e).splitlines()[0]}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
