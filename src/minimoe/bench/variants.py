"""What is measured: a model in one runtime with its settings (a variant), and what it is asked to do (its tasks).
Imports no torch."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")
RUNTIMES = ("minimoe", "transformers", "llama.cpp")
SEED = 0  # every runtime reads random tokens of this seed


@dataclass(frozen=True)
class Task:
    """One thing that is timed; names and definitions are those of llama-bench where it has them.

    pp      read a prompt of ``tokens`` tokens, after ``depth`` others; nothing is sampled
    tg      write ``tokens`` tokens one by one, after ``depth`` others; the next one is drawn at random, not sampled
    serve   what a user waits for: a prompt of ``prompt`` tokens, then ``tokens`` tokens, each the likeliest one

    ``batch`` sequences go through the model together, each with so many tokens.
    """

    kind: str
    tokens: int
    depth: int = 0
    batch: int = 1
    prompt: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}{self.tokens}"


@dataclass(frozen=True)
class Variant:
    """A model in a runtime on a device; measured in processes of its own.

    path        the directory or file (it stays on this machine: only ``model`` goes into a card)
    format      of the weights: a dtype, or llama.cpp's name of a quant
    gpu_layers  llama.cpp: blocks in the GPU's memory, -1 for all; None elsewhere
    cpu_moe     llama.cpp: routed experts of blocks 0 to cpu_moe - 1 stay in the host's memory (its --n-cpu-moe)
    """

    runtime: str
    path: str
    model: str
    format: str
    device: str
    threads: int
    file_bytes: int
    gpu_layers: int | None = None
    cpu_moe: int = 0

    @property
    def about(self) -> dict[str, Any]:
        """What every row of a card repeats."""
        found = asdict(self)
        found.pop("path")
        return found

    @property
    def label(self) -> str:
        return f"{self.model} {self.format}, {self.runtime}, {self.device}, {plural(self.threads, 'thread')}"


@dataclass(frozen=True)
class Rates:
    """The device itself, which takes its turns among the variants."""

    device: str
    threads: int

    @property
    def label(self) -> str:
        return f"{self.device}, {plural(self.threads, 'thread')}: bandwidth, products, launches"


def alternate(items: Sequence[_T], rounds: int) -> list[list[_T]]:
    """The order of each round: as given, then backwards, and so on, so that a machine that grows slower or warmer
    meets the first as it meets the last. That holds for an even number of rounds only."""
    if rounds < 2 or rounds % 2:
        raise ValueError(f"rounds={rounds}: must be even and at least 2")
    return [list(items) if number % 2 == 0 else list(reversed(items)) for number in range(rounds)]


def tasks(
    pp: Sequence[int], tg: Sequence[int], depths: Sequence[int], batches: Sequence[int]
) -> list[Task]:
    """pp and tg at every depth and batch, then one serve of the first prompt and the first number of tokens."""
    found = [
        Task(kind, tokens, depth, batch)
        for depth in depths for batch in batches
        for kind, numbers in (("pp", pp), ("tg", tg)) for tokens in numbers
    ]  # fmt: skip
    return found + ([Task("serve", tg[0], prompt=pp[0])] if pp and tg else [])


def plural(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
