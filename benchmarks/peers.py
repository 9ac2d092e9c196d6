"""One model in three programs: minimoe, transformers and llama.cpp open the same weights from one folder.

Each program is a class with the same methods: ``logits`` (what it computes, for the comparison) and works that return
the seconds they took by the clock they were given. The multi-token-prediction block is left away, as transformers has
none, and so is the end-of-text token, so that every program writes as many tokens as it is asked for.
"""
from __future__ import annotations

import copy
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import agreement
from torch import Tensor

from minimoe import HybridConfig, HybridLM, generate
from minimoe.errors import MinimoeError
from minimoe.generation import prefill
from minimoe.interop import load_hf, save_gguf, save_hf
from minimoe.train.optimizers import adamw

Clock = Callable[[], float]
EXPERTS = ("eager", "grouped_mm", "batched_mm")  # transformers' names
GATHERED = 4 << 30  # bytes; batched_mm copies the chosen experts' weights once a token
HF, GGUF = "hf", "model.gguf"

# Beside the presets: the shape, 5.2M parameters, that the goals for speed were set with.
SHAPES: dict[str, dict[str, Any]] = {
    "trial": dict(
        vocab_size=512, hidden_size=256, hybrid_override_pattern="MEM*EMEM*E",
        num_attention_heads=8, num_key_value_heads=2, head_dim=32,
        mamba_num_heads=16, mamba_head_dim=32, n_groups=2, ssm_state_size=64, chunk_size=64,
        n_routed_experts=32, num_experts_per_tok=4, moe_intermediate_size=128,
        moe_shared_expert_intermediate_size=256, moe_latent_size=64, routed_scaling_factor=2.5,
    ),
}  # fmt: skip


class Missing(Exception):
    """A program that cannot take part; one line that says why."""


def shape(name: str) -> HybridConfig:
    """A preset or one of SHAPES, for long contexts, without MTP block and end-of-text token."""
    changes = dict(max_position_embeddings=65_536, num_nextn_predict_layers=0, eos_token_id=None)
    return HybridConfig(**SHAPES[name] | changes) if name in SHAPES else HybridConfig.preset(name, **changes)


def write_weights(config: HybridConfig, folder: Path, dtype: torch.dtype, seed: int = 0) -> None:
    """A model with random weights, as all three programs read it. The GGUF file is written for float32 only."""
    torch.manual_seed(seed)
    model = HybridLM(config, dtype=dtype)
    save_hf(model, folder / HF)
    if dtype == torch.float32:
        try:
            save_gguf(model, folder / GGUF, None)
        except ImportError:
            pass  # LlamaCpp says what is missing


class Program:
    """``version`` is the package's; ``clock`` tells seconds once the device has nothing left to do."""

    name = package = ""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.version = importlib.metadata.version(self.package)

    def timed(self, work: Callable[[], object]) -> float:
        start = self.clock()
        work()
        return self.clock() - start


class Minimoe(Program):
    """``compiled``: the trunk under torch.compile. Experts stay as they are: grouped_mm in float32 cannot be compiled."""

    name = package = "minimoe"

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, clock: Clock, compiled: bool = False) -> None:
        super().__init__(clock)
        self.model, self.device = load_hf(folder / HF, dtype, device), device
        self.optimizer = adamw(self.model, lr=0.0)
        if compiled:
            self.name += " compiled"
            torch._dynamo.config.recompile_limit = 64  # a layer of each kind, with and without a state
            for layer in self.model.model.layers:
                if hasattr(layer.mixer, "experts"):
                    layer.mixer.experts.forward = torch.compiler.disable(layer.mixer.experts.forward)
            self.model.model.compile()

    def logits(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model(ids).logits

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(ids, targets)

    def train_step(self, ids: Tensor, targets: Tensor, bfloat16: bool = False) -> float:
        """Loss, gradients and AdamW at learning rate 0: all of the work, and the next step finds the same weights."""
        return self.timed(lambda: step(self, ids, targets, bfloat16))

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> float:
        """A prompt in one call, logits of its last token."""
        return self.timed(lambda: self.model(ids, last_only=True))

    @torch.inference_mode()
    def prefill_in_parts(self, ids: Tensor) -> float:
        """A prompt in the calls that ``generate`` makes."""
        rows = ids.tolist()
        return self.timed(lambda: prefill(self.model, rows))

    @torch.inference_mode()
    def decoder(self, ids: Tensor, tokens: int) -> Callable[[], float]:
        """Greedy steps after a prompt, which is read here, once: an older state stays valid."""
        after = self.model(ids, last_only=True)

        @torch.inference_mode()
        def steps() -> None:
            out = after
            for _ in range(tokens):
                out = self.model(out.logits[:, -1:].argmax(-1), out.state)

        return lambda: self.timed(steps)

    @torch.inference_mode()
    def verifier(self, ids: Tensor, tokens: int, calls: int) -> Callable[[], float]:
        """Reading ``tokens`` tokens at once after a prompt, logits of each; seconds of one call."""
        state, guess = self.model(ids, last_only=True).state, ids[:, :tokens]

        @torch.inference_mode()
        def passes() -> None:
            for _ in range(calls):
                self.model(guess, state)

        return lambda: self.timed(passes) / calls

    def generate(self, ids: Tensor, tokens: int) -> float:
        return self.timed(lambda: generate(self.model, ids, tokens))


class Transformers(Program):
    """NemotronHForCausalLM. ``experts`` is the expert implementation that :meth:`take_fastest` chose."""

    name = package = "transformers"
    experts = "as loaded"  # for the page
    chosen: str | None = None  # what to ask another process for

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, clock: Clock) -> None:
        try:
            import transformers

            transformers.logging.set_verbosity_error()
            transformers.utils.logging.disable_progress_bar()
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder / HF, dtype=dtype).to(device).eval()
            self.logits(torch.arange(8, device=device)[None])  # not every version runs everywhere
        except Exception as error:
            raise Missing(_line(error)) from None
        super().__init__(clock)
        self.device = device
        self.optimizer = adamw(self.model, lr=0.0)

    def take_fastest(self, config: HybridConfig, tokens: int, work: Callable[[], float]) -> dict[str, float | str]:
        """Run ``work`` of ``tokens`` tokens with each expert implementation and keep the fastest. Seconds, or why
        not."""
        setter = getattr(self.model, "set_experts_implementation", None)
        choice = setter is not None and "E" in config.hybrid_override_pattern
        gathered = tokens * config.num_experts_per_tok * 2 * config.moe_intermediate_size * config.expert_input_size
        found: dict[str, float | str] = {}
        for name in EXPERTS if choice else (self.experts,):
            if name == "batched_mm" and (size := gathered * self.model.dtype.itemsize) > GATHERED:
                found[name] = f"would copy {size / 2**30:.0f} GiB of weights"
                continue
            try:
                if choice:
                    setter(name)
                found[name] = first = work()
                if first < 3 * min(seconds for seconds in found.values() if isinstance(seconds, float)):
                    found[name] = min(first, work())  # the first may have paid for set-up
            except Exception as error:
                found[name] = _line(error)
        times = {name: seconds for name, seconds in found.items() if isinstance(seconds, float)}
        if not times:
            raise Missing(f"it did not run with any of its expert implementations: {found}")
        self.experts = min(times, key=times.__getitem__)
        if choice:
            self.chosen = self.experts
            setter(self.experts)
        return found

    def logits(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model(input_ids=ids, use_cache=False).logits

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def train_step(self, ids: Tensor, targets: Tensor, bfloat16: bool = False) -> float:
        self.model.train()  # lets it use its CUDA kernels for training, where they are installed
        try:
            return self.timed(lambda: step(self, ids, targets, bfloat16))
        finally:
            self.model.eval()

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> float:
        return self.timed(lambda: self.model(input_ids=ids, use_cache=True, logits_to_keep=1))

    @torch.inference_mode()
    def decoder(self, ids: Tensor, tokens: int) -> Callable[[], float]:
        """Greedy steps by bare calls, without the bookkeeping of its ``generate``."""
        after = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)

        @torch.inference_mode()
        def steps() -> float:
            logits, cache = after.logits, copy.deepcopy(after.past_key_values)  # it is written in place
            start = self.clock()
            for _ in range(tokens):
                out = self.model(input_ids=logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True, logits_to_keep=1)
                logits = out.logits
            return self.clock() - start

        return steps

    def generate(self, ids: Tensor, tokens: int) -> float:
        return self.timed(lambda: self.model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0))


class LlamaCpp(Program):
    """llama.cpp through llama-cpp-python, one thread, keys and values in float32 as the others have them."""

    name, package = "llama.cpp", "llama-cpp-python"

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, clock: Clock, context: int) -> None:
        if dtype != torch.float32:
            raise Missing("measured in float32 only")
        try:
            from minimoe.ggml import library
            from minimoe.runtime import llamacpp

            layers = 0
            if device.type == "cuda":
                if not library().llama_supports_gpu_offload():
                    raise Missing("this build of llama-cpp-python has no GPU support")
                layers = -1
            self.api = llamacpp
            self.llama = llamacpp.load(folder / GGUF, context=context, threads=1, exact=True, n_gpu_layers=layers)
        except (ImportError, MinimoeError) as error:
            raise Missing(_line(error)) from None
        super().__init__(clock)

    def logits(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.api.logits(self.llama, ids[0].tolist()))[None].to(ids.device)

    def _marks(self, ids: Tensor, tokens: int) -> list[float]:
        """The clock at the start, and whenever a token is known."""
        marks = [self.clock()]
        self.api.greedy(self.llama, ids[0].tolist(), tokens, on_token=lambda _: marks.append(self.clock()), ignore_end=True)
        return marks

    def prefill(self, ids: Tensor) -> float:
        start, end = self._marks(ids, 1)
        return end - start

    def decoder(self, ids: Tensor, tokens: int) -> Callable[[], float]:
        def steps() -> float:
            marks = self._marks(ids, tokens + 1)
            return marks[-1] - marks[1]

        return steps

    def generate(self, ids: Tensor, tokens: int) -> float:
        marks = self._marks(ids, tokens)
        return marks[-1] - marks[0]


def pair(
    folder: Path, device: torch.device, dtype: torch.dtype, clock: Clock
) -> tuple[Minimoe, Transformers | None, dict[str, str]]:
    """minimoe, transformers if it can take part, and {program: reason} if not, which is printed too."""
    missing: dict[str, str] = {}
    theirs = _open(lambda: Transformers(folder, device, dtype, clock), Transformers.name, missing)
    return Minimoe(folder, device, dtype, clock), theirs, missing


def llama(
    folder: Path, device: torch.device, dtype: torch.dtype, clock: Clock, context: int, missing: dict[str, str]
) -> LlamaCpp | None:
    """llama.cpp with room for ``context`` tokens, or None and an entry in ``missing``."""
    return _open(lambda: LlamaCpp(folder, device, dtype, clock, context), LlamaCpp.name, missing)


def _open(make: Callable[[], Any], name: str, missing: dict[str, str]) -> Any:
    try:
        return make()
    except Missing as why:
        missing[name] = str(why)
        print(f"without {name}: {why}", flush=True)
        return None


def choose(
    theirs: Transformers, config: HybridConfig, tokens: int, work: Callable[[], float], missing: dict[str, str]
) -> tuple[Transformers | None, dict[str, float | str]]:
    """:meth:`Transformers.take_fastest`; None and an entry in ``missing`` if nothing ran."""
    try:
        return theirs, theirs.take_fastest(config, tokens, work)
    except Missing as why:
        missing[theirs.name] = str(why)
        print(f"without {theirs.name}: {why}", flush=True)
        return None, {}


def first_run(work: Callable[[], object], name: str, missing: dict[str, str]) -> float | None:
    """Wall seconds of a first call, which compiles; None and an entry in ``missing`` where that fails (no compiler)."""
    start = time.perf_counter()
    try:
        work()
    except Exception as error:
        missing[name] = _line(error)
        print(f"without {name}: {missing[name]}", flush=True)
        return None
    return time.perf_counter() - start


def compare(ours: Minimoe, others: Sequence[Program | None], ids: Tensor, dtype: str) -> dict[str, dict[str, float]]:
    """measure.agreement of minimoe's logits with each other program's."""
    mine = ours.logits(ids)
    return {other.name: agreement(mine, other.logits(ids), other.name, dtype) for other in others if other}


def step(program: Minimoe | Transformers, ids: Tensor, targets: Tensor, bfloat16: bool) -> None:
    """Both sides train by the same lines."""
    program.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(program.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        loss = program.loss(ids, targets)
    loss.backward()
    program.optimizer.step()


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}" if not isinstance(error, MinimoeError) else text
