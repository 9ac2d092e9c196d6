"""torch.compile where it pays in training: the Mamba-2 mixers.

A mixer makes some forty passes over memory that a compiler joins into a few. Experts stay as they are: their grouped
product has no compiled form in float32 on a CPU, and the lengths of its runs change with every batch. Attention is one
fused call already.
"""
from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..layers import Mamba2
from ..model import HybridLM
from ..state import MambaState, Span


@contextmanager
def compiled(model: HybridLM) -> Iterator[bool]:
    """Within this context, training steps of ``model`` run its Mamba-2 mixers compiled.

        with compiled(model):
            train(model, ...)

    The first step of each shape waits for the compiler, half a minute or more. Calls without gradients and calls that
    continue a state (evaluation, generation) stay as they are, since each new length would be compiled anew. Weights
    and names do not change; numbers agree to rounding. Yields whether it compiles: without a compiler (C++ for a CPU,
    Triton for a GPU) it warns in one line and changes nothing.
    """
    missing = missing_compiler(model.lm_head.weight.device)
    if missing:
        warnings.warn(f"training goes on without torch.compile: {missing}", stacklevel=3)
        yield False
        return
    mixers = [module for module in model.modules() if isinstance(module, Mamba2)]
    fast = torch.compile(Mamba2.forward, dynamic=False)  # one for all: their weights are its inputs
    for mixer in mixers:
        mixer.forward = functools.partial(_forward, fast, mixer)
    try:
        yield True
    finally:
        for mixer in mixers:
            del mixer.forward  # the class's own shows again


def _forward(
    fast, mixer: Mamba2, x_BLD: Tensor, state: MambaState | None = None, span: Span | None = None
) -> tuple[Tensor, MambaState]:
    training = torch.is_grad_enabled() and state is None
    return (fast if training else Mamba2.forward)(mixer, x_BLD, state, span)


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this device, as a clause for a message; None if nothing."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "Triton is not installed (it comes with torch on Linux)"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "cl" if os.name == "nt" else "g++")
    return None if shutil.which(compiler) else f"there is no C++ compiler {compiler}; install one or set CXX"
