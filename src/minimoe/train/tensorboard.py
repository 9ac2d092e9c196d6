"""A run's curves for TensorBoard: ``minimoe train --tensorboard``, then ``tensorboard --logdir DIR``.

log.jsonl stays the record of a run; these files are for looking at it while it goes, or at many runs at once.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ..layers.moe import Router
from .loop import Training
from .meter import Meter
from .options import Step, TrainError

FOLDER = "tensorboard"


def summary_writer() -> type[Any]:
    """torch's SummaryWriter. Raises TrainError if the package that it needs is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
    return SummaryWriter


class TensorBoard:
    """Writes event files into ``folder``: give it to a run as ``on_step``, and close it at the end.

    Steps are the x axis. Curves: loss, mtp_loss, lr, grad_norm, tokens_per_second (the meter's median), and for each
    router expert_load: what its busiest expert got, as a multiple of the mean.

    The first step given makes the file, and tells TensorBoard that what an earlier file has from this step on is void:
    a run that goes on from a checkpoint has one point a step. Raises TrainError if the package is not installed or the
    folder cannot be written.
    """

    def __init__(self, folder: Path, training: Training, meter: Meter) -> None:
        self.folder, self.training, self.meter = folder, training, meter
        self.routers = [name for name, module in training.model.named_modules() if isinstance(module, Router)]
        self._make, self._writer = summary_writer(), None

    def __call__(self, step: Step) -> None:
        values = {
            "loss": step.loss, "mtp_loss": step.mtp_loss, "lr": step.lr, "grad_norm": step.grad_norm,
            "tokens_per_second": self.meter.tokens_per_second,
        }  # fmt: skip
        # a router that saw no token, as the MTP block's without an MTP loss, has a peak of 0
        values |= {f"expert_load/{name}": peak or None for name, peak in zip(self.routers, self.training.load_peaks, strict=True)}
        try:
            if self._writer is None:
                self._writer = self._make(str(self.folder), purge_step=step.step, flush_secs=10)
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step.step)
        except OSError as error:  # of now, or of the thread that writes
            raise self._trouble(error) from None

    def close(self) -> None:
        """Write what is still waiting."""
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            raise self._trouble(error) from None

    def _trouble(self, error: OSError) -> TrainError:
        return TrainError(f"{self.folder} could not be written ({error.strerror or error}); make room, or go on without --tensorboard")
