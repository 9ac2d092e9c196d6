"""How long a generation took. Imports no torch, so that every runtime can say it in the same words."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timings:
    """Wall seconds of the prompt (up to the first token's logits) and of each later step, whole batch."""

    prefill_s: float
    step_s: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Decoding steps a second: tokens a second of one row."""
        return len(self.step_s) / sum(self.step_s) if self.step_s else float("nan")
