"""Tasks whose answers a program can check, as conversations with a thought before the answer or without one.

A small model that has seen only text cannot be asked anything. These four give it something to do, give a thought
something to be worth, and give later chapters a score that needs no judge. Everything comes from a seed.

    calculate   "start 7; a add 5; b double; c take 3"  ->  "21"       thought: one line a step
    copy        "copy k q z f"                          ->  "k q z f"  thought: how many letters
    sort        "sort q c x a"                          ->  "a c q x"  thought: insertion sort, a line a letter
    brackets    "close ( [ { }"                         ->  "] )"      thought: what is open after each bracket
"""
from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from .batches import Tokens
from .tokenizer import Tokenizer

CLOSING = {"(": ")", "[": "]", "{": "}"}
LARGEST = 99  # totals of "calculate" stay within 0 to this: two digits at most


@dataclass(frozen=True)
class Example:
    """One question with the thought that solves it and the one right answer.

    size  how much there is to do: steps of calculate, letters of copy and sort, brackets
    """

    task: str
    question: str
    thought: str
    answer: str
    size: int

    def messages(self, thinking: bool) -> list[dict[str, str]]:
        """The finished conversation, for ``Tokenizer.encode_chat``."""
        reply = f"<think>\n{self.thought}\n</think>\n{self.answer}" if thinking else self.answer
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": reply}]

    def solved_by(self, reply: str) -> bool:
        """Whether ``reply``, what the model wrote after the prompt, ends in the answer; thoughts do not count."""
        return reply.split("</think>")[-1].strip() == self.answer

    @property
    def held_out(self) -> bool:
        """One question in twenty, chosen by its hash, is never trained on, whatever the seed."""
        return hashlib.sha256(self.question.encode()).digest()[0] % 20 == 0


def calculate(draw: random.Random, steps: int | None = None) -> Example:
    """A chain of 1 to 8 steps: each needs the result of the one before, so no layer can do them side by side."""
    steps = steps or draw.randint(1, 8)
    total = draw.randint(1, 20)
    question, thought = [f"start {total}"], []
    for label in string.ascii_lowercase[:steps]:
        number = draw.randint(1, 9)
        # add and take are drawn more often than double, which would drive totals out of range
        action = draw.choice([("add", "+", total + number), ("take", "-", total - number)] * 2 + [("double", "*", 2 * total)])
        if not 0 <= action[2] <= LARGEST:
            action = ("take", "-", total - number) if total > LARGEST // 2 else ("add", "+", total + number)
        name, sign, result = action
        question.append(f"{label} double" if name == "double" else f"{label} {name} {number}")
        thought.append(f"{label}: {total} {sign} {2 if name == 'double' else number} = {result}")
        total = result
    return Example("calculate", "; ".join(question), "\n".join(thought), str(total), steps)


def copy(draw: random.Random) -> Example:
    letters = draw.choices(string.ascii_lowercase, k=draw.randint(3, 16))
    return Example("copy", "copy " + " ".join(letters), f"{len(letters)} letters", " ".join(letters), len(letters))


def sort(draw: random.Random) -> Example:
    letters = draw.sample(string.ascii_lowercase, k=draw.randint(3, 8))
    prefixes = [" ".join(sorted(letters[: n + 1])) for n in range(len(letters))]
    return Example("sort", "sort " + " ".join(letters), "\n".join(prefixes), prefixes[-1], len(letters))


def brackets(draw: random.Random) -> Example:
    count = draw.randint(3, 12)
    given: list[str] = []
    open_: list[str] = []
    thought = []
    while len(given) < count or not open_:
        if open_ and (len(open_) == 5 or len(given) < count and draw.random() < 0.4):
            given.append(CLOSING[open_.pop()])
        else:
            open_.append(draw.choice(list(CLOSING)))
            given.append(open_[-1])
        thought.append(f"{given[-1]}: " + " ".join(open_))
    answer = " ".join(CLOSING[bracket] for bracket in reversed(open_))
    return Example("brackets", "close " + " ".join(given), "\n".join(line.rstrip() for line in thought), answer, len(given))


TASKS: dict[str, Callable[[random.Random], Example]] = {
    "calculate": calculate, "copy": copy, "sort": sort, "brackets": brackets,
}  # fmt: skip


def examples(
    count: int, seed: int = 0, tasks: Sequence[str] = tuple(TASKS), held_out: bool = False
) -> Iterator[Example]:
    """``count`` examples, the tasks in turn: those to train on, or with ``held_out`` those that no training sees.

    Raises ValueError for a task that there is not.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown or not tasks:
        raise ValueError(f"task {unknown[0] if unknown else ''!r} is unknown; there are {', '.join(TASKS)}")
    draw = random.Random(f"{seed} {held_out}")
    for number in range(count):
        make = TASKS[tasks[number % len(tasks)]]
        while (example := make(draw)).held_out != held_out:
            pass
        yield example


def task_tokens(tokenizer: Tokenizer, count: int, seed: int = 0, progress: bool = False) -> Tokens:
    """``count`` training examples in a row as Tokens, an end-of-text id after each; every second one has its thought.

    Which examples think is drawn, so that each task is seen both ways.
    """
    draw = random.Random(f"thinking {seed}")
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    rows, bytes_ = [], 0
    bar = tqdm(examples(count, seed), total=count, desc="making tasks", unit="example", disable=not progress, leave=False)
    for example in bar:
        messages = example.messages(thinking=draw.random() < 0.5)
        ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
        rows.append(np.array([*ids, tokenizer.eos_id], dtype=dtype))
        bytes_ += sum(len(message["content"]) for message in messages)
    return Tokens(np.concatenate(rows), bytes_)


def prompt(example: Example, tokenizer: Tokenizer, thinking: bool) -> list[int]:
    """What a model is given in order to answer."""
    return tokenizer.encode_chat(example.messages(thinking)[:1], thinking=thinking)
