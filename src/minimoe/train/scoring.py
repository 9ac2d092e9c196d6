"""How many tasks a model solves: it is asked, it answers, a program checks."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from ..data.tasks import Example, examples, prompt
from ..data.tokenizer import Tokenizer
from ..generation import generate
from ..model import HybridLM

END_OF_THOUGHT = "</think>"


@dataclass(frozen=True)
class Reply:
    """What a model wrote to one example.

    text      without the token that ended it
    tokens    how many ids it wrote, the one that ended it included
    finished  whether it ended by itself
    """

    example: Example
    thinking: bool
    text: str
    tokens: int
    finished: bool

    @property
    def thought(self) -> str | None:
        """What stands before the end of the thought; None if there is no such end."""
        before, end, _ = self.text.partition(END_OF_THOUGHT)
        return before.strip() if end else None

    @property
    def answer(self) -> str:
        return self.text.split(END_OF_THOUGHT)[-1].strip()

    @property
    def solved(self) -> bool:
        """Finished with the right answer; where none was asked for, without a thought."""
        return self.finished and (self.thinking or self.thought is None) and self.example.solved_by(self.text)

    @property
    def thought_right(self) -> bool:
        """Whether the thought is the example's, to the letter."""
        return self.thought == self.example.thought


def distinct(count: int, task: str, seed: int = 0, held_out: bool = True) -> list[Example]:
    """``count`` examples of one task, no question twice: a model that takes the likeliest token answers the same
    question in the same way, so asking it again would count one fact twice.

    Raises ValueError if there seem to be fewer questions than that.
    """
    found: dict[str, Example] = {}
    for example in examples(50 * count, seed, [task], held_out):
        found.setdefault(example.question, example)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"task {task!r} has fewer than {count} different questions: {len(found)} were found; ask for fewer")


def ask(
    model: HybridLM, tokenizer: Tokenizer, examples: Sequence[Example], thinking: bool, batch: int = 128,
    max_new_tokens: int | None = None, temperature: float = 0.0, seed: int | None = 0, progress: bool = False,
) -> list[Reply]:
    """The model's replies, in the examples' order.

    max_new_tokens  default: 16 more than the longest right reply needs
    """
    end = tokenizer.special["<|im_end|>"]
    prompts = [prompt(example, tokenizer, thinking) for example in examples]
    if max_new_tokens is None:
        whole = [tokenizer.encode_chat(e.messages(thinking), add_generation_prompt=False) for e in examples]
        max_new_tokens = 16 + max((len(ids) - len(given) for ids, given in zip(whole, prompts, strict=True)), default=0)
    replies = []
    for at in tqdm(range(0, len(prompts), batch), desc="asking", unit="batch", disable=not progress, leave=False):
        g = generate(
            model, prompts[at : at + batch], max_new_tokens, temperature, stop=[end], seed=None if seed is None else seed + at
        )
        for example, ids, reason in zip(examples[at : at + batch], g.ids, g.finish_reason, strict=True):
            finished = reason == "stop"
            replies.append(Reply(example, thinking, tokenizer.decode(ids[:-1] if finished else ids), len(ids), finished))
    return replies


def score_tasks(model: HybridLM, tokenizer: Tokenizer, examples: Sequence[Example], thinking: bool) -> list[bool]:
    """Which examples the model solves, taking the likeliest token each time."""
    return [reply.solved for reply in ask(model, tokenizer, examples, thinking)]


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a share (95 % with z = 1.96): unlike ``p +- z sqrt(p (1 - p) / n)`` it stays within 0 to 1
    and has a width when none or all are right. (0, 1) if nothing was asked."""
    if not asked:
        return 0.0, 1.0
    p, extra = right / asked, z * z / asked
    middle, half = p + extra / 2, z * math.sqrt((p * (1 - p) + extra / 4) / asked)
    return max(0.0, (middle - half) / (1 + extra)), min(1.0, (middle + half) / (1 + extra))
