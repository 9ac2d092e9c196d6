"""A generator function of this package in a Python process of its own, read as it runs.

Each variant is measured in a fresh process: no allocator that kept another's memory, no threads that still spin, no
library that another one imported, and a crash costs one row. (:mod:`minimoe.ggml.child` answers one question; here
results come one by one, so that what was measured before a crash counts.)
"""
from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import MinimoeError


class ChildError(MinimoeError):
    """The process ended before its work did; one line that says how."""


def stream(function: str, arguments: dict[str, Any], threads: int, timeout: float) -> Iterator[dict[str, Any]]:
    """What ``function`` ("minimoe.bench.worker:measure"), called with ``arguments``, yields in a child process.

    Arguments and items travel as JSON. ``threads`` is set for OpenMP before anything is imported. The child ends with
    this generator, with this process, and after ``timeout`` seconds.

    Raises ChildError if the function raised (with its line), if the process died, or for want of time.
    """
    package = Path(__file__).resolve().parents[2]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")])),
        # threads that wait must not spin: on a shared machine they take the core from those that work
        "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GGML_NO_BACKTRACE": "1",
        "PYTHONIOENCODING": "utf-8:replace",
    }  # fmt: skip
    request = json.dumps({"function": function, "arguments": arguments}).encode() + b"\n"
    with tempfile.TemporaryFile() as stderr:
        # -P: a file named json.py beside the reader's own is not ours
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=env,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )  # fmt: skip
        late = threading.Event()
        timer = threading.Timer(timeout, lambda: (late.set(), child.kill()))
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code says more
                child.stdin.write(request)
                child.stdin.flush()  # and stays open: its end tells the child that we are gone
            for line in child.stdout:
                item = json.loads(line)
                if "end" in item:
                    if item["end"]:
                        raise ChildError(item["end"])
                    return
                yield item
            code = child.wait()
            stderr.seek(0)
            said = _last_words(stderr.read().decode("utf-8", "replace"))
            how = f"no end within {timeout:.0f} s" if late.is_set() else f"its process ended with {how_it_ended(code)}"
            raise ChildError(how + (f" ({said})" if said and not late.is_set() else ""))
        finally:
            timer.cancel()
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()


def how_it_ended(code: int) -> str:
    """An exit code in words: "SIGILL", "exit code 1"."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
    return name + (", killed from outside, most likely for want of memory" if name == "SIGKILL" else "")


def _last_words(stderr: str) -> str:
    """Of what a dying process wrote, the line that tells."""
    from ..ggml.child import last_words

    return last_words(stderr, any_line=True)


def one_line(error: BaseException) -> str:
    """An exception as one line; its type too, where it is none of ours."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, MinimoeError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def _serve() -> None:
    """The child's side: a request from stdin, items to the stdout that it was born with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent decides, and ends us
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between
    request = json.loads(sys.stdin.buffer.readline())

    def watch() -> None:
        sys.stdin.buffer.read()  # until the parent closes it, or ends in whatever way
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    module, name = request["function"].split(":")
    end = ""
    try:
        for item in getattr(importlib.import_module(module), name)(**request["arguments"]):
            answers.write(json.dumps(item) + "\n")
    except Exception as error:
        end = one_line(error)
    answers.write(json.dumps({"end": end}) + "\n")
    answers.flush()
    os._exit(0)  # taking a model down is not worth the time, nor a crash


if __name__ == "__main__":
    _serve()
