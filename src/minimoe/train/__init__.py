"""Training: the loop, its schedule and its optimizer."""
from .loop import Step, TrainError, TrainOptions, evaluate, train
from .schedule import warmup_stable_decay

__all__ = ["Step", "TrainError", "TrainOptions", "evaluate", "train", "warmup_stable_decay"]
