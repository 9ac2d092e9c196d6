"""A function of this package, run in a Python process of its own.

llama.cpp checks with assertions that abort, and a build for another CPU ends in an illegal instruction; neither can
be caught, and in a notebook either would take the kernel along. In a child it becomes one line.
"""
from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from .library import LlamaError, log

_WINDOWS_DEATHS = {
    3: "SIGABRT", 0xC0000005: "SIGSEGV", 0xC000001D: "SIGILL", 0xC0000409: "SIGABRT", 0xC00000FD: "stack overflow",
    0xC0000135: "a missing DLL",
}  # fmt: skip


class LlamaDied(LlamaError):
    """The child process died. ``how`` is a signal's name or an exit code, ``said`` its last words."""

    def __init__(self, what: str, how: str, said: str) -> None:
        self.how, self.said = how, said
        super().__init__(f"{what}: llama.cpp ended with {how}" + (f" ({said})" if said else ""))


def run(function: str, what: str, /, timeout: float = 600, **arguments: Any) -> Any:
    """Call ``function`` ("minimoe.ggml.amx:prefill") in a child and return its answer.

    Arguments and answer travel as JSON. ``what`` begins the message of an error.

    Raises LlamaError with the child's own line if the function raised one, if it takes more than ``timeout``
    seconds, and LlamaDied if the process died.
    """
    package = Path(__file__).resolve().parents[2]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")])),
        "GGML_NO_BACKTRACE": "1", "PYTHONIOENCODING": "utf-8:replace",
    }  # fmt: skip
    request = json.dumps({"function": function, "arguments": arguments}).encode()
    try:
        # -P: a file named json.py beside the notebook is not ours
        child = subprocess.run(
            [sys.executable, "-P", "-m", __name__], input=request, capture_output=True, timeout=timeout, env=env,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise LlamaError(f"{what}: no answer from llama.cpp within {timeout:.0f} s") from None
    try:
        reply = json.loads(child.stdout)
    except ValueError:
        said = last_words(child.stderr.decode("utf-8", "replace"), any_line=child.returncode == 1)
        raise LlamaDied(what, _how(child.returncode), said) from None
    if "error" in reply:
        raise LlamaError(reply["error"])
    return reply["result"]


def _how(code: int) -> str:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return name + (", killed from outside, most likely for want of memory" if name == "SIGKILL" else "")
    known = _WINDOWS_DEATHS.get(code) if sys.platform == "win32" else None
    return known or f"exit code {code}"


def last_words(stderr: str, any_line: bool = False) -> str:
    """Of what a dying process wrote, the line that tells: an assertion, an exception's text, the last error.

    ``any_line``: failing those, the last line (of a Python traceback, for one).
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    patterns = [r"GGML_ASSERT|GGML_ABORT|fatal error", r"^what\(\):", r"^error: ", *([r"\w"] if any_line else [])]
    for pattern in patterns:
        found = [line for line in lines if re.search(pattern, line)]
        if found:
            last = re.sub(r"^(?:what\(\)|error):\s*", "", found[-1])
            return re.sub(r"^\S*[/\\]([\w.-]+):\d+: ", r"\1: ", last)
    return ""


def _answer() -> None:
    """The child's side: one request from stdin, one answer to the stdout that it was born with."""
    if sys.platform == "win32":  # no dialogue box when it dies
        ctypes.WinDLL("kernel32").SetErrorMode(0x0001 | 0x0002 | 0x8000)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what native code prints must not get between
    log.echo = os.dup(2)
    request = json.load(sys.stdin.buffer)
    module, name = request["function"].split(":")
    try:
        reply = {"result": getattr(importlib.import_module(module), name)(**request["arguments"])}
    except LlamaError as error:
        reply = {"error": str(error)}
    answers.write(json.dumps(reply))
    answers.flush()
    os._exit(0)  # taking a model down is not worth the time, nor a crash


if __name__ == "__main__":
    _answer()
