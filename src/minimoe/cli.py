"""The command line: ``minimoe COMMAND``. Imports no torch, nor any command but the one that is asked for."""
from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .errors import MinimoeError

COMMANDS = {
    "doctor": "check this machine, and say what would mend it",
    "inspect": "parameters and state of a model, from its shape",
    "plan": "will a model fit, in which quant, and how fast can it be",
    "train": "train a small model on text that is already here",
    "generate": "continue a text with a model",
    "bench": "how fast this machine is, and models on it; compare measured machines",
    "export": "the same weights for another program: a directory to GGUF, or back",
}

ALIASES = {"fit": "plan"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 1 with one line on stderr. Wrong arguments exit with 2."""
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            if sys.stdout:  # None if the shell closed it
                sys.stdout.flush()  # here, where a closed pipe can still be caught, not at exit
    except BrokenPipeError:
        # The reader of our output has left (`minimoe ... | head`); point what is still buffered at nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell reports for a program that SIGPIPE ended
    except MinimoeError as error:
        return _fail(error)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except KeyboardInterrupt:
        return 130


def _run(argv: list[str]) -> int:
    parser = _Parser(prog="minimoe", description="Nemotron 3's arithmetic at any size.")
    parser.add_argument("--version", action="version", version=f"minimoe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if word in COMMANDS or word in ALIASES), None)
    for name, summary in COMMANDS.items():
        aliases = [alias for alias, command in ALIASES.items() if command == name]
        command = commands.add_parser(name, aliases=aliases, help=summary, description=summary)
        if name == ALIASES.get(chosen, chosen):
            module = importlib.import_module(f".commands.{name}", __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return args.run(args)


def _fail(error: object) -> int:
    print(f"minimoe: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1
