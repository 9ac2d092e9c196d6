"""Training: the loop, its schedule, its optimizer, its checkpoints."""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .balance import BiasUpdate
from .checkpoint import Checkpoints
from .evaluation import bits_per_byte, evaluate
from .loop import Training, train
from .options import Diverged, OutOfMemory, Step, TrainError, TrainOptions
from .schedule import warmup_stable_decay

# what only some runs want, loaded on first use
_WHERE = {"LivePlot": "live", "Meter": "meter", "TensorBoard": "tensorboard"}

__all__ = [
    "BiasUpdate", "Checkpoints", "Diverged", "OutOfMemory", "Step", "TrainError", "TrainOptions", "Training", "bits_per_byte",
    "evaluate", "train", "warmup_stable_decay", *_WHERE,
]  # fmt: skip

if TYPE_CHECKING:
    from .live import LivePlot
    from .meter import Meter
    from .tensorboard import TensorBoard


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
