"""minimoe and transformers behind one face, so that both are timed by the same lines.

A runner reads and writes tokens of ``batch`` sequences; the clock is outside. ``start`` prepares a context of so many
tokens, ``begin`` goes back to it (neither is timed), ``read`` and ``step`` are the work. All of them return only when the
device has finished.
"""
from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import MinimoeError
from ..generation import PREFILL_TOKENS
from .variants import SEED

EXPERTS = ("eager", "grouped_mm", "batched_mm")  # transformers' names for its ways to compute them
COPIED = 16  # sequences up to which batched_mm is tried, which copies the chosen experts' weights for each token


class Runner(Protocol):
    """``notes``: what a row should say besides its numbers, such as the implementation that was chosen."""

    notes: dict[str, str]

    def start(self, batch: int, depth: int, more: int) -> None:
        """Sequences with ``depth`` random tokens each, and room for ``more``."""

    def begin(self) -> None:
        """The state after :meth:`start`."""

    def read(self, tokens: int) -> None:
        """Read so many random tokens of each sequence; logits of the last."""

    def step(self, ids: list[int] | None = None) -> None:
        """Read one token of each sequence: these, or such as are drawn at random."""

    def likeliest(self) -> list[int]:
        """The likeliest next token of each sequence."""

    def choose(self, kind: str, work: Callable[[], float]) -> None:
        """Find the fastest of several ways to compute, if there are any, and use it; ``work`` tells seconds."""

    def use(self, kind: str) -> None:
        """What :meth:`choose` found for "pp" or "tg"."""


class TorchRunner:
    """What both libraries share. A subclass has ``forward(ids, state) -> (logits [B, 1, V], state)``."""

    def __init__(self, device: str, threads: int) -> None:
        self.device, self.notes = torch.device(device), {}
        if self.device.type == "cpu":  # for the whole process: a runner has one of its own
            torch.set_num_threads(threads)
            torch.set_flush_denormal(True)  # long decays produce them, and they cost up to three times the time
        self.generator = torch.Generator().manual_seed(SEED)
        self.vocabulary = 0
        self.batch = 1
        self.logits: Tensor | None = None
        self.state: Any = None
        self.beginning: tuple[Tensor | None, Any] = (None, None)

    def forward(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def start(self, batch: int, depth: int, more: int) -> None:
        self.batch = batch
        self.logits = self.state = None
        self.beginning = (None, None)
        with torch.inference_mode():
            for at in range(0, depth, PREFILL_TOKENS):
                self.logits, self.state = self.forward(self._random(min(PREFILL_TOKENS, depth - at)), self.state)
        self.beginning = (self.logits, self.state)
        self.begin()

    def begin(self) -> None:
        self.logits, self.state = self.beginning
        self.wait()

    def read(self, tokens: int) -> None:
        with torch.inference_mode():
            self.logits, self.state = self.forward(self._random(tokens), self.state)
        self.wait()

    def step(self, ids: list[int] | None = None) -> None:
        with torch.inference_mode():
            ids_B1 = self._random(1) if ids is None else torch.tensor(ids, device=self.device)[:, None]
            self.logits, self.state = self.forward(ids_B1, self.state)
        self.wait()

    def likeliest(self) -> list[int]:
        with torch.inference_mode():
            return self.logits[:, -1].argmax(-1).tolist()

    def choose(self, kind: str, work: Callable[[], float]) -> None:
        pass

    def use(self, kind: str) -> None:
        pass

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _random(self, tokens: int) -> Tensor:
        """Drawn on the CPU, so that all devices read the same tokens."""
        return torch.randint(0, self.vocabulary, (self.batch, tokens), generator=self.generator).to(self.device)


class MinimoeRunner(TorchRunner):
    """A directory in this package's own model; its MTP block is not asked."""

    def __init__(self, path: str, device: str, threads: int, dtype: str) -> None:
        from ..interop import load_hf

        super().__init__(device, threads)
        self.model = load_hf(path, dtype=getattr(torch, dtype), device=self.device).eval()
        self.vocabulary = self.model.config.vocab_size

    def forward(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        # the calls that minimoe.generate makes: a long prompt in parts, for the sake of memory and caches
        for part in ids.split(PREFILL_TOKENS, dim=1):
            out = self.model(part, state, last_only=True)
            state = out.state
        return out.logits, state


class TransformersRunner(TorchRunner):
    """A directory in transformers, with the fastest of its ways to compute experts."""

    def __init__(self, path: str, device: str, threads: int, dtype: str) -> None:
        try:
            import transformers
        except ImportError as error:
            raise MinimoeError(f'transformers cannot be imported ({error}): pip install "minimoe[run]"') from None

        super().__init__(device, threads)
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            os.path.abspath(path), dtype=getattr(torch, dtype), local_files_only=True,
        )  # fmt: skip
        self.model = model.to(self.device).eval()
        self.vocabulary = self.model.config.vocab_size
        self.taken: dict[str, str] = {}

    def forward(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        out = self.model(input_ids=ids, past_key_values=state, use_cache=True, logits_to_keep=1)
        return out.logits, out.past_key_values

    def begin(self) -> None:
        logits, cache = self.beginning
        self.logits, self.state = logits, copy.deepcopy(cache)  # it is written in place
        self.wait()

    def choose(self, kind: str, work: Callable[[], float]) -> None:
        """Each way once, after a first call that pays for set-up; reading and decoding have a choice each."""
        setter = getattr(self.model, "set_experts_implementation", None)
        counts = ("n_routed_experts", "num_experts", "num_local_experts")  # as configs of different families say it
        if setter is None or not any(getattr(self.model.config, name, None) for name in counts):
            return
        if kind not in self.taken:
            seconds: dict[str, float] = {}
            for name in EXPERTS:
                if name == "batched_mm" and (kind == "pp" or self.batch > COPIED):
                    continue
                try:
                    setter(name)
                    work()
                    seconds[name] = work()
                except Exception:  # not every way runs in every dtype and on every device
                    continue
            if not seconds:
                raise MinimoeError("none of transformers' expert implementations runs here")
            self.taken[kind] = min(seconds, key=seconds.__getitem__)
        self.use(kind)

    def use(self, kind: str) -> None:
        if kind in self.taken:
            self.model.set_experts_implementation(self.taken[kind])
            self.notes["experts"] = self.taken[kind]


def open_runner(runtime: str, path: str, device: str, threads: int, dtype: str) -> TorchRunner:
    """The runner of a runtime that is built on torch."""
    return {"minimoe": MinimoeRunner, "transformers": TransformersRunner}[runtime](path, device, threads, dtype)
