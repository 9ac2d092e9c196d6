"""The training loop: forward, backward, clip, step, log; and a run as something that can be stopped and continued."""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.batches import Batches, Tokens, split_documents
from ..model import HybridLM
from .balance import BalanceLoss, BiasUpdate
from .compiling import compiled
from .optimizers import adamw
from .options import Diverged, OutOfMemory, Step, TrainError, TrainOptions
from .precision import autocast
from .schedule import warmup_stable_decay
from .trouble import first_not_finite, out_of_memory
from .world import ProcessError, World

FREE = ("steps", "decay", "accumulate", "recompute", "compile")  # options that a continued run may change


class Loss(nn.Module):
    """The model with its losses as ``forward``: what distributed wrappers and torch.compile take hold of."""

    def __init__(self, model: HybridLM, balanced: bool = False) -> None:
        super().__init__()
        self.model = model
        self.routers = BalanceLoss(model) if balanced else None

    def forward(
        self, ids: Tensor, targets: Tensor, segment_ids: Tensor | None, mtp: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The model's loss, the MTP block's, and the routers' balance loss; None where it is not wanted."""
        if self.routers is not None:
            self.routers.forget()
        if mtp:
            main, guess = self.model.losses(ids, targets, segment_ids=segment_ids)
        else:
            main, guess = self.model.loss(ids, targets, segment_ids=segment_ids), None
        return main, guess, None if self.routers is None else self.routers.take(len(ids))


class Training:
    """A run: a model, its optimizer, its data and the number of the next step.

    ``step()`` does one step. ``state()`` is all that later steps depend on; a Training of the same model, data and
    options that is given it with ``restore`` goes on as if nothing had been between, to the last bit on one machine.

    world  the processes that share each step's windows (see distributed.py); by default this one alone
    """

    def __init__(
        self, model: HybridLM, tokens: Tokens | list[tuple[Tokens, float]], options: TrainOptions,
        world: World | None = None,
    ) -> None:
        self.model, self.options, self.world = model, options, world or World()
        if options.batch % (self.world.size * options.accumulate):
            raise TrainError(f"batch={options.batch}: must be a multiple of {self.world.size} processes times "
                             f"accumulate={options.accumulate}")
        self.batches = Batches(tokens, options.batch, options.length, options.seed)
        self.balance = BiasUpdate(model, options.balance, self.world)
        self.device = model.lm_head.weight.device
        self.with_mtp = model.mtp is not None and options.mtp_weight > 0
        blocks = [*model.model.layers, *([] if model.mtp is None else [model.mtp])]
        whole = Loss(model, balanced=options.balance_loss > 0 and bool(self.balance.routers))
        self.routers = whole.routers
        self.loss = self.world.wrap(whole, blocks, unused=model.mtp is not None and not self.with_mtp)
        self.optimizer = adamw(model, options.lr, options.weight_decay)  # now, because fsdp has put other parameters there
        self.end_id = model.config.eos_token_ids[0] if options.documents and model.config.eos_token_ids else None
        self.rows = options.batch // self.world.size  # windows a step that are this process's
        self.accumulate = options.accumulate
        self.rehearsed: tuple[int, bool] | None = None  # see _gradient_that_fits
        self.next_step, self.seconds, self.cpu_seconds = 0, 0.0, 0.0  # of the whole run, over all its parts
        self.load_peaks: list[float] = []  # of each router in the last step: its busiest expert over the mean
        model.model.recompute = options.recompute
        self._open = contextlib.ExitStack()
        if options.compile:
            self._open.enter_context(compiled(model))

    def step(self) -> Step:
        """One step of the optimizer; what it logs.

        Raises Diverged if the loss or the gradient stops being a number, and OutOfMemory if a single window does not
        fit; the weights are then those of the step before.
        """
        start, cpu, options, number = time.perf_counter(), time.process_time(), self.options, self.next_step
        lr = options.lr * warmup_stable_decay(number, options.steps, options.warmup, options.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        ids, targets = self.batches(number)
        segments = None
        if self.end_id is not None:
            segments, targets = split_documents(ids, targets, self.end_id)
        batch = tuple(None if part is None else part.to(self.device) for part in (ids, targets, segments))
        loss, mtp_loss, note = self._gradient_that_fits(batch)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        length = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()  # fsdp: each process knows a part
        if not math.isfinite(loss + mtp_loss + length):  # before clipping, which would spread it to all gradients
            raise Diverged(self._diverged(batch, loss, length))
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), options.clip, norm)
        self.optimizer.step()
        self.load_peaks = self.balance.step()
        self.next_step += 1
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu
        return Step(
            number, loss, self.next_step * ids.numel(), self.seconds, lr, length,
            mtp_loss if self.with_mtp else None, note,
        )  # fmt: skip

    def close(self) -> None:
        """Leave the model as any other: no counting, nothing recomputed, whole (in the first process)."""
        self._open.close()
        self.balance.close()
        if self.routers is not None:
            self.routers.close()
        self.model = self.world.whole(self.model)
        self.model.model.recompute = False

    # ------------------------------------------------------------------ the gradient of one step
    def _gradient(self, batch: tuple[Tensor, Tensor, Tensor | None], rehearsal: bool = False) -> list[float]:
        """Leave the whole batch's gradient in the parameters, part after part; its loss and MTP loss.

        rehearsal  compute the same, and send nothing to other processes
        """
        self.optimizer.zero_grad(set_to_none=True)
        counted = (batch[1] != -100).sum().clamp(min=1)
        loss = mtp_loss = torch.zeros((), device=self.device)
        for number, (ids, targets, segments) in enumerate(self._parts(batch), 1):
            with self.world.part(self.loss, send=number == self.accumulate and not rehearsal):
                with autocast(self.device, self.options.precision, self.model.config.hidden_size):
                    main, mtp, balance = self.loss(ids, targets, segments, self.with_mtp)
                    total = main if mtp is None else main + self.options.mtp_weight * mtp
                    total = total if balance is None else total + self.options.balance_loss * balance
                # of the batch's targets, because a part's loss is its own mean
                share = (targets != -100).sum().to(main.dtype) / counted
                (total * share * self.world.size).backward()  # because the mean over processes is taken
            loss = loss + main.detach() * share
            mtp_loss = mtp_loss if mtp is None else mtp_loss + mtp.detach() * share
        losses = torch.stack([loss, mtp_loss])
        return (losses if rehearsal else self.world.sum(losses)).tolist()

    def _parts(self, batch: tuple[Tensor, Tensor, Tensor | None]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        rank, size = self.world.rank, self.world.size
        ids, targets, segments = (None if part is None else part[rank::size].chunk(self.accumulate) for part in batch)
        return list(zip(ids, targets, segments or (None,) * self.accumulate, strict=True))

    def _gradient_that_fits(self, batch: tuple[Tensor, Tensor, Tensor | None]) -> tuple[float, float, str | None]:
        """:meth:`_gradient`, in smaller parts whenever memory runs out; and what to note about it.

        One of several processes whose memory runs out cannot answer the others, who wait for its gradient. So with ddp
        the first pass with parts of a size, and the first one beside the optimizer's moments, is rehearsed without
        them, and then all agree on smaller parts. Otherwise running out of memory ends the run.
        """
        note = None
        while True:
            kind = (self.accumulate, bool(self.optimizer.state))
            rehearsal = self.world.rehearses and self.rehearsed != kind
            losses = None
            try:
                losses = self._gradient(batch, rehearsal)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            # outside of the except clause, because the exception keeps every tensor of the failed pass alive
            if losses and not rehearsal:
                return *losses, note
            if self.world.size > 1 and not rehearsal:
                raise ProcessError(f"out of memory on {self.device} with {self.rows // self.accumulate} windows at once; "
                                   f"go on with --resume and --accumulate above {self.accumulate}, or a new run with less")
            self.optimizer.zero_grad(set_to_none=True)
            self.balance.forget()
            if rehearsal and not self.world.any(losses is None):
                self.rehearsed = kind
                continue
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            rows = self.rows // self.accumulate
            if rows == 1:
                raise OutOfMemory(f"out of memory on {self.device} with a single window of {self.options.length} tokens; "
                                 "choose a shorter length, a smaller preset, or recompute=True")
            self.accumulate = self._parts_at_least(self.accumulate + 1)
            note = (f"out of memory with {rows} windows at once; from here on {self.rows // self.accumulate} at once, "
                    f"{self.accumulate} times a step")

    def _parts_at_least(self, number: int) -> int:
        return next(n for n in range(min(number, self.rows), self.rows + 1) if self.rows % n == 0)

    def _diverged(self, batch: tuple[Tensor, Tensor, Tensor | None], loss: float, norm: float) -> str:
        def forward() -> None:
            with autocast(self.device, self.options.precision, self.model.config.hidden_size):
                for ids, targets, segments in self._parts(batch):
                    self.loss(ids, targets, segments, self.with_mtp)

        where = first_not_finite(self.model, forward)
        return (f"step {self.next_step}: loss {loss:.4g} and gradient norm {norm:.4g}, first in {where}; lower the learning "
                f"rate (now {self.options.lr:g}) or clip harder (now {self.options.clip:g})")

    # ------------------------------------------------------------------ stopping and going on
    def state(self) -> dict[str, Any]:
        """For :class:`Checkpoints`: tensors and plain values only. All processes ask, and the first one has the answer."""
        return {
            "next_step": self.next_step, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "accumulate": self.accumulate,
            "options": dataclasses.asdict(self.options), "config": self.model.config.to_dict(),
            "model": self.world.model_state(self.model), "optimizer": self.world.optimizer_state(self.optimizer),
            "random": {"cpu": torch.get_rng_state()}
            | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave.

        Raises TrainError, before anything is changed, if it is of another model or of other options; steps, decay,
        accumulate, recompute and compile may differ.
        """
        config = self.model.config.to_dict()
        _same("config", {key: state["config"].get(key) for key in config}, config)
        _same("options", state["options"], dataclasses.asdict(self.options), FREE)
        self.world.load_model_state(self.model, state["model"])
        # a copy, because the optimizer would go on working in the tensors that it is given
        self.world.load_optimizer_state(self.optimizer, copy.deepcopy(state["optimizer"]))
        torch.set_rng_state(state["random"]["cpu"].cpu())
        if "cuda" in state["random"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"].cpu(), self.device)
        self.next_step, self.seconds, self.cpu_seconds = (state[key] for key in ("next_step", "seconds", "cpu_seconds"))
        self.accumulate = self._parts_at_least(max(self.accumulate, state["accumulate"]))


def _same(what: str, saved: dict[str, Any], given: dict[str, Any], free: tuple[str, ...] = ()) -> None:
    for key, value in given.items():
        if key not in free and saved.get(key) != value:
            raise TrainError(f"the checkpoint was made with {what} {key}={saved.get(key)!r}, and now it is {value!r}; "
                             "give the same, or choose a new directory")


def train(
    model: HybridLM,
    tokens: Tokens | list[tuple[Tokens, float]],
    options: TrainOptions | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: bool = False,
) -> list[Step]:
    """Train ``model`` in place on random windows of ``tokens``; returns the log, a Step a step.

    tokens    Tokens, or several with shares, as Batches takes them
    on_step   called with each Step as soon as it is known; an exception that it raises ends the run
    progress  show a progress bar

    Raises TrainError if the loss stops being a number; the weights are then those of the step before.
    """
    training = Training(model, tokens, options or TrainOptions())
    log: list[Step] = []
    bar = tqdm(range(training.options.steps), desc="training", unit="step", disable=not progress, leave=False)
    try:
        for _ in bar:
            log.append(training.step())
            bar.set_postfix(loss=f"{log[-1].loss:.3f}", refresh=False)
            if on_step:
                on_step(log[-1])
    finally:
        training.close()
    return log
