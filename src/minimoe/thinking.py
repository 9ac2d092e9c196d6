"""A thinking budget: how long a thought may be before it is closed for the model.

The models know no tag for it (there is no ``<thinking_budget>``); what NVIDIA's servers do is done here: past the
budget the thought ends at the next line end, and at the latest after a grace period, by putting the end-of-thought
tokens where the model would have put others.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import MinimoeError

if TYPE_CHECKING:
    from .data.tokenizer import Tokenizer


@dataclass(frozen=True)
class ThinkingBudget:
    """For ``generate(..., thinking_budget=...)``; the prompt must end inside a thought (thinking on).

    tokens     length of a thought after which it should end
    grace      tokens more that it may take to finish its line
    line_ends  ids of tokens that end a line
    closing    ids that end a thought after a finished line
    breaking   ids that end a thought in the middle of a line
    """

    tokens: int
    grace: int
    line_ends: frozenset[int]
    closing: tuple[int, ...]
    breaking: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, tokens: int, grace: int = 32) -> ThinkingBudget:
        """A budget in the vocabulary of ``tokenizer``, which must have the token ``</think>``."""
        if any(isinstance(n, bool) or not isinstance(n, int) for n in (tokens, grace)) or tokens < 1 or grace < 0:
            raise MinimoeError(f"a thinking budget of {tokens!r} tokens with grace {grace!r}: needs whole numbers, at least "
                               "1 and 0; to think not at all, use thinking=False in the chat template")
        if "</think>" not in tokenizer.special:
            raise MinimoeError("the tokenizer has no </think>, so a thought cannot be closed")
        end = tokenizer.special["</think>"]
        line_ends = {i for i in range(len(tokenizer)) if tokenizer.token_bytes(i).endswith(b"\n")}
        return cls(tokens, grace, frozenset(line_ends), (end,), (*tokenizer.encode("\n"), end))

    def forced(self, new: Sequence[int]) -> tuple[int, ...]:
        """The ids to put after the new ids ``new`` of a row: none while the thought may go on, or once it has ended."""
        if len(new) < self.tokens or self.closing[-1] in new:
            return ()
        if new[-1] in self.line_ends:
            return self.closing
        return self.breaking if len(new) >= self.tokens + self.grace else ()
