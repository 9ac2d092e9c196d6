"""The command line in processes of their own, to be killed, interrupted and starved.

A fork server imports torch once for all of them, so that a life costs tenths of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train_child_imports"])


def start(target: Callable[..., object], said: Path, *args: Any, **limits: int) -> multiprocessing.Process:
    """Run ``target(*args)`` in a new process; what it prints goes to the file ``said``, what it returns is its exit code.

    limits  bytes: address_space, or file_size of any file that it writes
    """
    before = os.environ.get("PYTHONPATH")  # the fork server, which starts now, must find this folder
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        process = _context.Process(target=_live, args=(target, said, args, limits), daemon=True)
        process.start()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return process


def command(words: Sequence[object], said: Path, **limits: int) -> multiprocessing.Process:
    """``minimoe`` with these words."""
    return start(_command, said, [str(word) for word in words], **limits)


def finished(words: Sequence[object], said: Path, **limits: int) -> str:
    """What ``minimoe`` printed; it must end with exit code 0."""
    process = command(words, said, **limits)
    process.join(300)
    assert process.exitcode == 0, (process.exitcode, said.read_text())
    return said.read_text()


def _command(words: list[str]) -> int:
    from minimoe import cli

    return cli.main(words)


def memory_of_command(words: list[str]) -> int:
    """``minimoe`` with these words, and a last line with the most address space that it had, in KiB."""
    code = _command(words)
    print(Path("/proc/self/status").read_text().split("VmPeak:")[1].split()[0])
    return code


def memory_of_steps(marks: tuple[int, ...]) -> int:
    """Train the tiny preset; print the largest resident set so far, in KiB, after each of these numbers of steps."""
    import resource

    import numpy as np
    import torch

    from minimoe import HybridConfig, HybridLM
    from minimoe.data import Tokens
    from minimoe.train import TrainOptions, train

    torch.manual_seed(0)
    noise = Tokens(np.random.default_rng(0).integers(0, 320, 40_000).astype(np.uint16), 40_000)

    def on_step(step: object) -> None:
        if step.step + 1 in marks:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    train(HybridLM(HybridConfig.preset("tiny")), noise, TrainOptions(steps=max(marks), batch=4, length=48), on_step)
    return 0


def _live(target: Callable[..., object], said: Path, args: tuple, limits: dict[str, int]) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    limit(**limits)
    code = target(*args)
    sys.stdout.flush()
    sys.exit(code)


def limit(**limits: int) -> None:
    """Set this process' limits, from now on."""
    import resource  # not on Windows

    names = {"address_space": resource.RLIMIT_AS, "file_size": resource.RLIMIT_FSIZE}
    for name, value in limits.items():
        resource.setrlimit(names[name], (value, value))
