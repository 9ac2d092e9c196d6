"""The training loop: forward, backward, clip, step, log."""
from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from tqdm.auto import tqdm

from ..data.batches import Batches, Tokens
from ..errors import MinimoeError
from ..model import HybridLM
from .optimizers import adamw
from .schedule import warmup_stable_decay

PRECISIONS = ("auto", "float32", "bfloat16")


class TrainError(MinimoeError):
    """A run that cannot start or go on; the message says what to change."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    batch, length  windows a step, and tokens in each
    lr             peak of the schedule; warmup and decay are shares of the steps (see warmup_stable_decay)
    clip           largest norm of all gradients together
    mtp_weight     what the MTP block's loss counts (0.3 in Nemotron 3 Super, 0.1 in Ultra); 0 leaves the block alone
    precision      "bfloat16": products in bfloat16, weights and sums in float32; "auto": that where it pays
    seed           of the batches; weights are drawn by whoever makes the model
    """

    steps: int = 300
    batch: int = 8
    length: int = 256
    lr: float = 2e-3
    warmup: float = 0.05
    decay: float = 0.3
    weight_decay: float = 0.1
    clip: float = 1.0
    mtp_weight: float = 0.3
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name}={getattr(self, name)}: must be 1 or more")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise TrainError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("weight_decay", "mtp_weight"):
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
    """One line of the log. ``tokens`` and ``seconds`` count from the start of the run; losses in nats a token."""

    step: int
    loss: float
    tokens: int
    seconds: float
    lr: float
    grad_norm: float
    mtp_loss: float | None = None

    def to_dict(self) -> dict[str, float | int]:
        """For JSON; without what was not measured."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def train(
    model: HybridLM,
    tokens: Tokens,
    options: TrainOptions | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: bool = False,
) -> list[Step]:
    """Train ``model`` in place on random windows of ``tokens``; returns the log, a Step a step.

    on_step   called with each Step as soon as it is known; an exception that it raises ends the run
    progress  show a progress bar

    Raises TrainError if the loss stops being a number; the weights are then those of the step before.
    """
    options = options or TrainOptions()
    device = model.lm_head.weight.device
    batches = Batches(tokens, options.batch, options.length, options.seed)
    optimizer = adamw(model, options.lr, options.weight_decay)
    context = autocast(device, options.precision, model.config.hidden_size)
    with_mtp = model.mtp is not None and options.mtp_weight > 0
    log: list[Step] = []
    start = time.perf_counter()
    bar = tqdm(range(options.steps), desc="training", unit="step", disable=not progress, leave=False)
    for step in bar:
        factor = warmup_stable_decay(step, options.steps, options.warmup, options.decay)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * factor
        ids, targets = (part.to(device) for part in batches(step))
        with context:
            if with_mtp:
                loss, mtp_loss = model.losses(ids, targets)
                total = loss + options.mtp_weight * mtp_loss
            else:
                total = loss = model.loss(ids, targets)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        if not torch.isfinite(norm):
            raise TrainError(f"step {step}: loss {loss.item():.4g} and gradient norm {norm.item():.4g}; "
                             f"lower the learning rate (now {options.lr:g}) or clip harder (now {options.clip:g})")
        optimizer.step()
        entry = Step(
            step, loss.item(), (step + 1) * ids.numel(), time.perf_counter() - start, options.lr * factor, norm.item(),
            mtp_loss.item() if with_mtp else None,
        )  # fmt: skip
        log.append(entry)
        bar.set_postfix(loss=f"{entry.loss:.3f}", refresh=False)
        if on_step:
            on_step(entry)
    return log


@torch.no_grad()
def evaluate(
    model: HybridLM, tokens: Tokens, batch: int = 8, length: int = 256, limit: int | None = None, progress: bool = False
) -> float:
    """Mean loss in nats a token over ``tokens``, read once in windows of ``length`` (the first ``limit`` batches).

    Bits per byte, which do not depend on the tokenizer, are ``loss * len(tokens) / tokens.bytes / ln 2``.
    """
    device = model.lm_head.weight.device
    total = count = 0.0
    windows = Batches(tokens, batch, length).in_order()[:limit]
    for ids, targets in tqdm(windows, desc="evaluating", unit="batch", disable=not progress, leave=False):
        total += model.loss(ids.to(device), targets.to(device)).item() * ids.numel()
        count += ids.numel()
    return total / count


def bits_per_byte(loss: float, tokens: Tokens) -> float:
    """``loss`` in nats a token -> bits a byte of text: ``loss / ln 2 * tokens / bytes``."""
    return loss / math.log(2) * len(tokens) / tokens.bytes


def autocast(device: torch.device, precision: str, width: int) -> torch.autocast:
    """The context of the forward pass of a model of ``width``; "auto" takes bfloat16 where it pays."""
    wanted = precision == "bfloat16" or precision == "auto" and bfloat16_pays(device, width)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def bfloat16_pays(device: torch.device, width: int) -> bool:
    """Whether training in bfloat16 is faster there: tensor cores, or a CPU's tile unit (AMX) and matrices wide enough.

    Measured on one AMX core, a step in bfloat16 takes 0.8 times as long as in float32 at width 512, and 2 times as
    long at width 128, where converting costs more than multiplying.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and width >= 512 and torch.cpu._is_amx_tile_supported()
