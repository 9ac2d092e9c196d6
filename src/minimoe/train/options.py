"""What a run is told, and what it tells: TrainOptions and Step."""
from __future__ import annotations

from dataclasses import asdict, dataclass

from ..errors import MinimoeError

PRECISIONS = ("auto", "float32", "bfloat16")


class TrainError(MinimoeError):
    """A run that cannot start or go on; the message says what to change."""


class Diverged(TrainError):
    """The loss or a gradient is not a number; the weights are those of the step before, which led there."""


class OutOfMemory(TrainError):
    """Not even one window fits; the weights are those of the step before."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    batch, length  windows a step, and tokens in each
    accumulate     parts that a step's batch is cut into, one after another: less memory, the same gradient
    lr             peak of the schedule; warmup and decay are shares of the steps (see warmup_stable_decay)
    clip           largest norm of all gradients together
    mtp_weight     what the MTP block's loss counts (0.3 in Nemotron 3 Super, 0.1 in Ultra); 0 leaves the block alone
    balance        how far a router's correction bias moves a step (see BiasUpdate); 0 leaves the biases alone
    balance_loss   what the routers' balance loss counts (see balance_loss; 1e-4 in Nemotron 3); 0 leaves it out
    documents      end-of-text ids end a document: nothing passes from one to the next, and its first token is not
                   guessed; False reads each window as one text
    precision      "bfloat16": products in bfloat16, weights and sums in float32; "auto": that where it pays
    recompute      keep only each block's input for the backward pass and compute the rest again: less memory, about
                   a third more time (activation checkpointing)
    compile        fuse each block's operations with torch.compile where there is a compiler
    seed           of the batches; weights are drawn by whoever makes the model
    """

    steps: int = 300
    batch: int = 8
    length: int = 256
    accumulate: int = 1
    lr: float = 2e-3
    warmup: float = 0.05
    decay: float = 0.3
    weight_decay: float = 0.1
    clip: float = 1.0
    mtp_weight: float = 0.3
    balance: float = 1e-3
    balance_loss: float = 0.0
    documents: bool = True
    precision: str = "auto"
    recompute: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length", "accumulate"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name}={getattr(self, name)}: must be 1 or more")
        if self.batch % self.accumulate:
            raise TrainError(f"accumulate={self.accumulate}: must divide batch={self.batch}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise TrainError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("weight_decay", "mtp_weight", "balance", "balance_loss"):
            if not getattr(self, name) >= 0:
                raise TrainError(f"{name}={getattr(self, name)}: must be 0 or above")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise TrainError(f"warmup={self.warmup}, decay={self.decay}: shares of the run, at most 1 together")
        if not 0 <= self.seed < 2**63:
            raise TrainError(f"seed={self.seed}: must be 0 or above, and below 2**63")
        if self.precision not in PRECISIONS:
            raise TrainError(f"precision={self.precision!r}: must be one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Step:
    """One line of the log. ``tokens`` and ``seconds`` count from the start of the run; losses in nats a token.

    note  what happened besides, such as a smaller micro-batch after running out of memory
    """

    step: int
    loss: float
    tokens: int
    seconds: float
    lr: float
    grad_norm: float
    mtp_loss: float | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, float | int | str]:
        """For JSON; without what was not measured."""
        return {key: value for key, value in asdict(self).items() if value is not None}
