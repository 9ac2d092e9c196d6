"""Everything that is checked and measured on a GPU: one run of at most 25 minutes, without network.

    python tools/gpu.py                            all parts in this order; results in results/gpu/
    python tools/gpu.py --only base chapters       these parts; files of other parts stay
    python tools/gpu.py --list                     the parts, and the minutes that each gets of 25
    python tools/gpu.py --device cpu --quick       the same parts at toy size, to test this file

Each part is a process of its own (tools/gpu_parts.py) with a limit of its own: its share of the minutes that are left,
so what one part saves the later ones get. A part that fails or runs out of time says so in one line, keeps what it had
measured, and the next part goes on. Nothing needs to be installed: what is missing is named in the results. Torch is
held to 11 GB, as on a 12 GB card. PART.json: a part's numbers with machine, versions and commit; in card.json
result.card is a reader card (results/cards/README.md), in sweeps.json each entry's result is a file of results/.

--run DIR holds the training run of the last part; another call with the same DIR goes on from where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import ROOT, notebook_env

# Minutes of 25, in the order of how much their results would be missed.
PARTS = {
    "card": (4.5, "versions, and what minimoe bench measures: the device, the shipped model in each runtime"),
    "tests": (2.5, "the tests that need CUDA"),
    "base": (3.5, "training steps of base-12gb: tokens/s, MFU, memory, and what happens when memory runs out"),
    "fallbacks": (2.5, "the forms that other cards take: the same gradient, and their speed; torch.compile"),
    "benchmarks": (2.5, "beside other programs"),
    "sweeps": (3.0, "the experiments behind chapters that can run on a GPU"),
    "chapters": (4.0, "every chapter at its gpu size"),
    "training": (2.5, "a slice of the shipped model's training"),
}
CAP = 11e9  # bytes; a 12 GB card has 12.9e9, of which the driver and other programs keep some
LARGEST = 2 << 20  # bytes of one result file: eight of them are 16 MiB
TAIL = 20  # last lines of a failed part's output
LEAST = 5.0  # seconds below which a part is not begun


class Stop(Exception):
    """One line for the person at the terminal."""


def child(name: str, out: pathlib.Path, args: argparse.Namespace, seconds: float) -> list[str]:
    """The command of one part."""
    words = [sys.executable, str(ROOT / "tools" / "gpu_parts.py"), name, "--out", str(out), "--device", args.device,
             "--seconds", f"{seconds:.0f}", "--cap", f"{args.cap:.0f}", *(["--quick"] if args.quick else [])]  # fmt: skip
    if name == "chapters" and args.chapters:
        words += ["--chapters", *args.chapters]
    if name == "sweeps" and args.sweeps:
        words += ["--sweeps", *args.sweeps]
    if name == "training":
        words += ["--run", str(args.run.resolve()), f"--train={args.train}"]
    return words


def environment(args: argparse.Namespace, scratch: pathlib.Path) -> dict[str, str]:
    """The children's environment: the package from this checkout, no network, no bars, nothing into the reader's home."""
    cpu = args.device == "cpu"
    env = notebook_env("ci" if cpu or args.quick else "gpu")
    if not cpu and "CUDA_VISIBLE_DEVICES" in os.environ:
        env["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    elif not cpu:
        env.pop("CUDA_VISIBLE_DEVICES", None)  # the ci profile hides the card
    return env | {
        "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1",
        "MINIMOE_PREDICTIONS": str(scratch / "predictions.json"), "MINIMOE_CACHE": str(scratch / "cache"),
        "TMPDIR": str(scratch),
    }  # fmt: skip


def run(words: list[str], env: dict[str, str], limit: float, log: pathlib.Path) -> tuple[int | None, float]:
    """Run a part for at most ``limit`` seconds: its exit code (None: stopped) and its seconds. Output goes to ``log``."""
    start = time.perf_counter()
    with open(log, "wb") as out:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        code: int | None = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also on Ctrl-C
            stop(process)
    return code, time.perf_counter() - start


def stop(process: subprocess.Popen) -> None:
    """End a part and whatever it started."""
    if os.name == "nt":
        process.kill()
    else:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def probe(args: argparse.Namespace, env: dict[str, str], scratch: pathlib.Path) -> dict[str, Any]:
    """Machine, versions and commit, for all results. Raises Stop if the device cannot be used."""
    code, _ = run(child("machine", scratch / "machine.json", args, 60), env, 120, scratch / "machine.log")
    found = read(scratch / "machine.json")
    if code or not found.get("machine"):
        raise Stop(found.get("trouble") or last_line(scratch / "machine.log") or f"no answer from {args.device}")
    return found


def part(name: str, limit: float, args: argparse.Namespace, env: dict[str, str], scratch: pathlib.Path) -> dict[str, Any]:
    """Run one part; its record: ok, one line of trouble, seconds, and what it measured."""
    out, log = scratch / f"{name}.json", scratch / f"{name}.log"
    reserve = min(45.0, 0.2 * limit)  # a part ends by itself before it is ended
    code, seconds = run(child(name, out, args, limit - reserve), env, limit, log)
    found = read(out)
    trouble = found.pop("trouble", None)
    if code is None:
        trouble = f"stopped after {seconds:.0f} s, its share of the time"
    elif code and not trouble:
        trouble = last_line(log) or f"ended with exit code {code}"
    record: dict[str, Any] = {
        "part": name, "ok": not trouble, "trouble": trouble, "seconds": round(seconds, 1), "limit_s": round(limit, 1),
        "result": found,
    }  # fmt: skip
    return record | ({"tail": tail(log)} if trouble else {})


def read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def tail(log: pathlib.Path) -> list[str]:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.rstrip()[:300] for line in lines if line.strip()][-TAIL:]


def last_line(log: pathlib.Path) -> str:
    return (tail(log) or [""])[-1].strip()


def write(path: pathlib.Path, record: dict[str, Any]) -> None:
    """The record as JSON, whole or not at all; paths of this machine are left out."""
    text = json.dumps(record, indent=1)
    if len(text) > LARGEST:
        record = record | {"ok": False, "trouble": f"{len(text)} bytes of results are too many", "result": {}}
        text = json.dumps(record, indent=1)
    for folder, shown in ((str(ROOT), "."), (tempfile.gettempdir(), "TMP"), (sys.prefix, "PYTHON"), (str(pathlib.Path.home()), "~")):
        if len(folder) > 1:
            text = text.replace(json.dumps(folder)[1:-1], shown)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text + "\n", encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def everything(args: argparse.Namespace, start: float) -> bool:
    """All parts that are wanted; whether all of them went well."""
    wanted = [name for name in PARTS if not args.only or name in args.only]
    ok = True
    with tempfile.TemporaryDirectory(prefix="minimoe-gpu-") as folder:
        scratch = pathlib.Path(folder)
        env = environment(args, scratch)
        about = probe(args, env, scratch) | {
            "command": shlex.join(["tools/gpu.py", *args.words]), "quick": args.quick, "cap_bytes": args.cap,
            "budget_min": args.budget,
        }  # fmt: skip
        for number, name in enumerate(wanted):
            left = args.budget * 60 - (time.perf_counter() - start)
            limit = left * PARTS[name][0] / sum(PARTS[later][0] for later in wanted[number:])
            if limit < LEAST:
                record = {"part": name, "ok": False, "trouble": "not begun: no time left", "seconds": 0.0, "result": {}}
            else:
                print(f"{name}: up to {limit:.0f} s", flush=True)
                record = part(name, limit, args, env, scratch)
            write(args.out / f"{name}.json", about | record)
            print(f"{name}: {record['trouble'] or 'ok'} ({record['seconds']:.0f} s)", flush=True)
            ok = ok and record["ok"]
    print(f"results in {args.out}")
    return ok


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "gpu", metavar="DIR")
    p.add_argument("--budget", type=float, default=25.0, metavar="MINUTES")
    p.add_argument("--only", nargs="+", choices=PARTS, metavar="PART")
    p.add_argument("--list", action="store_true")
    p.add_argument("--device", default="cuda")
    p.add_argument("--quick", action="store_true", help="toy sizes")
    p.add_argument("--cap", type=float, default=CAP, metavar="BYTES", help="what torch may take (default: 11e9)")
    p.add_argument("--chapters", nargs="+", metavar="NN", help="only these")
    p.add_argument("--sweeps", nargs="+", metavar="NN", help="only these")
    p.add_argument("--run", type=pathlib.Path, default=ROOT / "_build" / "gpu-run", metavar="DIR")
    p.add_argument("--train", default="", metavar="OPTIONS", help='more options for minimoe train: --train="--steps 20000"')
    args = p.parse_args(argv)
    args.words = list(sys.argv[1:] if argv is None else argv)
    if not args.budget > 0 or not args.cap > 0:
        p.error("--budget and --cap must be above 0")
    return args


def main(argv: list[str] | None = None) -> int:
    start, args = time.perf_counter(), parse(argv)
    if args.list:
        for name, (minutes, about) in PARTS.items():
            print(f"{name:12} {minutes:4.1f} min  {about}")
        return 0
    try:
        return 0 if everything(args, start) else 1
    except Stop as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
