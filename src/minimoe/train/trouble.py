"""When a run goes wrong: which errors mean that memory ran out, and where a number first stopped being one."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the device's memory is full: CUDA's way, those of torch on a CPU, or Python's own."""
    # the second is oneDNN's, which prepares a kernel for each shape and says no more if it gets no room for it
    of_cpu = ("can't allocate memory", "could not create a primitive")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in of_cpu)


def first_not_finite(model: nn.Module, forward: Callable[[], object]) -> str:
    """Name of the place where a number first is not finite, in the order of the pass.

    A weight or a buffer, if one is not finite itself; else the first module whose output is not when ``forward`` runs
    again. If all outputs are finite, the trouble began in the backward pass: the last weight, in the order of the
    model, whose gradient is not finite, or if only their norm overflows, the weight with the largest gradient.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not _whole(tensor).isfinite().all():
            return name
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            tensors = [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)]
            if not found and not all(t.isfinite().all() for t in tensors if t.is_floating_point()):
                found.append(name)

        return hook

    # leaves answer before the modules that hold them, so the first answer is the most exact
    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    # before anything is returned: of several processes one may have found it in its rows, and all must ask for the gradients
    largest = {name: float(_whole(p.grad).abs().max()) for name, p in model.named_parameters() if p.grad is not None}
    if found:
        return found[0]
    broken = [name for name, value in largest.items() if not math.isfinite(value)]
    return f"the gradient of {broken[-1] if broken else max(largest, key=largest.__getitem__)}"


def _whole(tensor: Tensor) -> Tensor:
    """With fsdp a process holds a part of each weight."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
