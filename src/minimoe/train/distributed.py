"""Beyond one GPU: several processes that train one model, started by torchrun and joined by DDP or FSDP2.

    torchrun --nproc-per-node 2 -m minimoe train --out DIR ... [--parallel fsdp]

Every process computes the same batch and takes every size-th row of it; gradients are averaged over the processes. So
the run is the one that a single process would do, to rounding, and either can go on from the other's checkpoints.

    ddp   every process holds the whole model; a layer's gradients travel while those of the layers before are computed
    fsdp  a process keeps one part in size of each weight, gradient and moment; a block's weights are put together just
          before they are needed and dropped after: less memory a process, more to send

Processes must see one directory and the same text. The first one writes all files, and evaluates alone at the end. One
that fails says why, in one line, and torchrun ends the others, with a report of its own; ``--resume`` goes on from the
newest checkpoint, with any number of processes. Ctrl-C lets all of them do the step to its end and save.
"""
from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..bench.device import pick_device
from ..model import HybridLM
from .options import TrainError
from .world import ProcessError, World


class Group(World):
    """The processes of a group, and this one's place among them. Each method is called by all of them, in one order."""

    def __init__(self, device: torch.device, rank: int, size: int, parallel: str) -> None:
        super().__init__(device)
        self.rank, self.size, self.parallel = rank, size, parallel
        self.sharded = parallel == "fsdp"
        self.rehearses = not self.sharded  # fsdp cannot compute anything without all processes

    # ------------------------------------------------------------------ agreeing
    def sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        return self.sum(torch.tensor(float(flag), device=self.device)).item() > 0

    def on_first(self, do: Callable[[], Any]) -> Any:
        answer: list[Any] = [None, ""]
        if self.first:
            try:
                answer[0] = do()
            except TrainError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0, device=self.device)
        if answer[1]:
            raise TrainError(answer[1])
        return answer[0]

    def check_same(self, what: str, value: Any) -> None:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            raise TrainError(f"the processes have different {what}; all must see the same directory and the same text")

    # ------------------------------------------------------------------ model and optimizer
    def wrap(self, loss: nn.Module, blocks: list[nn.Module], unused: bool) -> nn.Module:
        """See World.wrap. Every process has drawn all the weights from one seed; fsdp frees what is not its part."""
        if not self.sharded:
            with warnings.catch_warnings():  # broadcast_buffers has another name from torch 2.13 on
                warnings.simplefilter("ignore", FutureWarning)
                return DistributedDataParallel(
                    loss, broadcast_buffers=False, find_unused_parameters=unused, gradient_as_bucket_view=True
                )
        mesh = init_device_mesh(self.device.type, (self.size,))
        for module in (*blocks, loss):
            fully_shard(module, mesh=mesh)
            if self.device.type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no mean
        return loss

    def part(self, loss: nn.Module, send: bool) -> AbstractContextManager[None]:
        """See World.part. fsdp sends always: to add up whole gradients would take the memory that it is there to save."""
        return loss.no_sync() if isinstance(loss, DistributedDataParallel) and not send else nullcontext()

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        if not self.sharded:
            return model.state_dict()
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def load_model_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        if not self.sharded:
            model.load_state_dict(state)
        else:  # a copy, because it is filled with the parts
            set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """See World.optimizer_state. Not by torch's get_optimizer_state_dict, which takes a step where there was none
        yet, and numbers parameters otherwise than the optimizer of one process."""
        state = optimizer.state_dict()
        if not self.sharded:
            return state

        def whole(value: Any) -> Any:
            value = value.full_tensor() if isinstance(value, DTensor) else value
            return (value.cpu() if isinstance(value, Tensor) else value) if self.first else None

        moments = {n: {key: whole(value) for key, value in one.items()} for n, one in state["state"].items()}
        return {"state": moments, "param_groups": state["param_groups"]} if self.first else {}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if self.sharded:
            weights = [p for group in optimizer.param_groups for p in group["params"]]

            def part(value: Any, like: DTensor) -> Any:
                if not isinstance(value, Tensor) or value.shape != like.shape:  # the number of steps
                    return value
                return distribute_tensor(value.to(self.device), like.device_mesh, like.placements, src_data_rank=None)

            moments = {n: {key: part(v, weights[n]) for key, v in one.items()} for n, one in state["state"].items()}
            state = {"state": moments, "param_groups": state["param_groups"]}
        optimizer.load_state_dict(state)

    def whole(self, model: HybridLM) -> HybridLM:
        if not self.sharded:
            return model
        state = self.model_state(model)
        if not self.first:
            return model
        plain = HybridLM(model.config, device="meta")
        plain.load_state_dict(state, assign=True)
        return plain.to(self.device)

    def leave(self) -> None:
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


@contextmanager
def joined(device: str | None, parallel: str) -> Iterator[Group]:
    """The Group of the processes that torchrun started; left at the end.

    An error passes through in the process that fails first, so that it is told once; the others end without a word,
    because theirs is the same, or follows from it.

    Raises ProcessError if there is no card for this process, and instead of what the network says when another one
    has ended.
    """
    store, rank, size = next(rendezvous("env://"))
    try:
        here = _own_device(device)
        dist.init_process_group(
            "nccl" if here.type == "cuda" else "gloo", store=dist.PrefixStore("minimoe", store), rank=rank,
            world_size=size, device_id=here if here.type == "cuda" else None,
        )  # fmt: skip
        group = Group(here, rank, size, parallel)
        yield group
        group.leave()
    except Exception as error:
        if not _fails_first(store):
            raise SystemExit(1) from None
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ProcessError("another process has ended; go on from the newest checkpoint with --resume") from None
        raise


def _fails_first(store: dist.Store) -> bool:
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # torchrun, which keeps the store, is gone
        return False


def _own_device(name: str | None) -> torch.device:
    """The card of this process's place on its machine, or the CPU."""
    local, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if name == "cuda" or name is None and cards:
        if local >= cards:
            raise ProcessError(f"{os.environ['LOCAL_WORLD_SIZE']} processes and {cards} GPUs: start as many processes as "
                               "there are GPUs (--nproc-per-node), or give --device cpu")
        torch.cuda.set_device(local)
        return pick_device(f"cuda:{local}")
    device = pick_device(name)
    if device.type != "cpu":
        raise ProcessError(f"--device {name}: with several processes it is cpu, or cuda, where each takes its own card")
    return device
