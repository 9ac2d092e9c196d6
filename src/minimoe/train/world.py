"""The processes of a run, as the loop sees them. Here: one process, which has nobody to ask (others: distributed.py)."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..bench.device import pick_device
from ..errors import MinimoeError
from ..model import HybridLM
from .options import TrainError

START = "torchrun --nproc-per-node 2 -m minimoe train"


class ProcessError(MinimoeError):
    """One process of several cannot go on, and the others know nothing of it: nothing can be saved any more."""


class World:
    """This process, alone.

    rank, size  its number, and how many processes there are
    parallel    how they share the work: "ddp", "fsdp", or None for one process
    first       whether it is the one that writes files and talks
    rehearses   whether they can find out before a step whether its batch fits in the memory of each
    """

    rank, size, parallel, rehearses = 0, 1, None, False

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    @property
    def first(self) -> bool:
        return self.rank == 0

    # ------------------------------------------------------------------ agreeing
    def sum(self, x: Tensor) -> Tensor:
        """``x`` added up over all processes, in place."""
        return x

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in at least one process."""
        return flag

    def on_first(self, do: Callable[[], Any]) -> Any:
        """``do()`` in the first process alone; all get what it returns, or the TrainError that it raises."""
        return do()

    def check_same(self, what: str, value: Any) -> None:
        """Raise TrainError in all processes unless ``value`` is the same in all of them."""

    # ------------------------------------------------------------------ model and optimizer
    def wrap(self, loss: nn.Module, blocks: list[nn.Module], unused: bool) -> nn.Module:
        """``loss`` as all processes compute it together, each from its rows; its gradients are means over processes.

        blocks  what fsdp puts together at one time, besides what lies outside of them
        unused  whether some parameters get no gradient
        """
        return loss

    def part(self, loss: nn.Module, send: bool) -> AbstractContextManager[None]:
        """Around one part of a step: whether its gradients, and those of the parts before it, are sent."""
        return nullcontext()

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """``model.state_dict()`` of whole tensors; with fsdp on the CPU, and empty but in the first process."""
        return model.state_dict()

    def load_model_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        model.load_state_dict(state)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """``optimizer.state_dict()`` of whole tensors; with fsdp on the CPU, and empty but in the first process."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        optimizer.load_state_dict(state)

    def whole(self, model: HybridLM) -> HybridLM:
        """``model`` with whole weights, in the first process; with fsdp the others keep their parts."""
        return model

    def leave(self) -> None:
        """The last thing that processes do together."""


@contextmanager
def processes(device: str | None = None, parallel: str | None = None) -> Iterator[World]:
    """The World that torchrun started this process in, or that of one process.

    device    "cpu", "cuda" or None (CUDA if there is one)
    parallel  "ddp", "fsdp" or None (ddp, if there are several)

    Raises TrainError if ``parallel`` is asked for without torchrun.
    """
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # the sign that torch documents
    if torchrun and os.environ["WORLD_SIZE"] != "1":
        from .distributed import joined

        with joined(device, parallel or "ddp") as world:
            yield world
    elif parallel and not torchrun:
        raise TrainError(f"--parallel {parallel}: there is one process only; start several with {START} ...")
    else:
        yield World(pick_device(device))
