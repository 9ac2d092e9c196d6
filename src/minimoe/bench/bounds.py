"""The ceiling of every measured rate: bytes and operations that cannot be avoided over what the device was measured to do.

A rate above its ceiling is no record but a mistake in counting or timing, so it is refused. Imports no torch.
"""
from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..catalog.spec import MLP, ArchitectureSpec, MoE, as_spec
from ..config import ConfigError, HybridConfig
from ..errors import MinimoeError
from ..sizing.roofline import UBATCH, Ceiling, decode_ceiling, prefill_ceiling, step_flops
from ..sizing.traffic import expert_blocks
from ..sizing.weights import SizedTensor, WeightBytes, weight_bytes
from .variants import Task, Variant

QUANT = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
OTHERS = "bytes"  # kind of a tensor that is read whole at every step, when nothing more is known


@dataclass(frozen=True)
class Demand:
    """What a model's steps need. ``described``: its family's blocks are known, so that states, keys and values count too."""

    spec: ArchitectureSpec
    weights: WeightBytes
    kv_dtype: str
    pass_tokens: int | None  # of a prompt that goes through in one pass; None: all
    described: bool = True

    def bound(
        self, task: Task, read: Callable[[float], float], flop_per_second: float | None,
        ram_blocks: Collection[int] | None = None, ram: float | None = None,
    ) -> dict[str, Any]:
        """{"ceiling" (tokens/s), "bound", "moved_bytes", "flops"} of a task, for all its sequences together.

        read  bytes/s at which so many bytes are read again and again: a few fit a cache, many do not
        ram   bytes/s of the host's memory, with ``ram_blocks``: blocks whose experts are there
        """
        new, middle = _span(task)
        moved, passes = self.traffic(task, ram_blocks)
        found = self._ceiling(task, read(moved / passes), ram_blocks, ram)
        least, bound = found.seconds, {"vram": "memory"}.get(found.bound, found.bound)
        flops = task.batch * self._flops(middle, new)
        if flop_per_second and flops / flop_per_second > least:
            least, bound = flops / flop_per_second, "compute"
        return {"ceiling": task.batch * new / least, "bound": bound, "moved_bytes": moved, "flops": flops}

    def traffic(self, task: Task, ram_blocks: Collection[int] | None = None) -> tuple[float, int]:
        """Bytes of a step of decoding or of a prompt (one sequence's, at least), and in how many passes."""
        found = self._ceiling(task, 1.0, ram_blocks, 1.0)
        return found.parts["vram"] + found.parts.get("ram", 0.0), -(-task.tokens // self._pass(task)) if task.kind == "pp" else 1

    def _ceiling(self, task: Task, rate: float, ram_blocks: Collection[int] | None, ram: float | None) -> Ceiling:
        _, context = _span(task)
        ram = ram if ram_blocks else None
        if task.kind == "pp":
            return prefill_ceiling(self.spec, rate, None, task.tokens, self.weights, context, self.kv_dtype, ram_blocks,
                                   ram, self._pass(task))  # fmt: skip
        return decode_ceiling(self.spec, rate, self.weights, context, task.batch, self.kv_dtype, ram_blocks, ram)

    def _pass(self, task: Task) -> int:
        return min(task.tokens, self.pass_tokens or task.tokens)

    def _flops(self, context: int, new: int) -> float:
        """Of one sequence. Without a description: two for each weight of a matrix that is at work, the head once."""
        if self.described:
            return step_flops(self.spec, context, 1, new)
        used = {block: moe.top_k / moe.experts for block, moe in expert_blocks(self.spec, self.weights).items()}
        total = 0.0
        for tensor in self.weights.tensors:
            if tensor.numbers > tensor.columns and tensor.kind not in ("embedding", "mtp"):
                part = used[tensor.block] if tensor.kind == "routed_experts" else 1.0
                total += 2 * tensor.numbers * part * (1 if tensor.name == "output.weight" else new)
        return total


def _span(task: Task) -> tuple[int, int]:
    """Tokens of a sequence in one step, and the context before them (of the middle step, for decoding)."""
    return (task.tokens, task.depth) if task.kind == "pp" else (1, task.depth + (task.tokens - 1) // 2)


def demand(variant: Variant) -> Demand:
    """The demand of a variant's model. Raises MinimoeError, with the reason, where it cannot be counted."""
    if variant.runtime == "llama.cpp":
        return _of_file(Path(variant.path))
    config = read_config(Path(variant.path))
    if not isinstance(config, HybridConfig):
        raise MinimoeError(f"bytes of model_type {config.get('model_type')!r} are not counted here")
    spec = as_spec(config)
    return Demand(spec, weight_bytes(spec, QUANT[variant.format]), variant.format, None)


def read_config(folder: Path) -> HybridConfig | dict[str, Any]:
    """A directory's config; a plain dict if it is of another family. Raises MinimoeError for what is none."""
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MinimoeError(f"{folder}: no config.json; give a model's directory or a .gguf file") from None
    except ValueError as error:
        raise MinimoeError(f"{folder / 'config.json'}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise MinimoeError(f"{folder / 'config.json'}: a config is a JSON object, this is a {type(data).__name__}")
    if data.get("model_type") != "nemotron_h":
        return data
    try:
        return HybridConfig.from_dict(data)
    except (ConfigError, TypeError, ValueError) as error:
        raise MinimoeError(f"{folder / 'config.json'}: {error}") from None


@functools.cache
def _of_file(path: Path) -> Demand:
    """From the tensors that are in the file, whatever made it; the family's own blocks if it is Nemotron-H."""
    reader = _reader(path)
    read = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    if read.get("split.count", 1) > 1:
        raise MinimoeError("the bytes of a file in several parts are not counted here")
    arch = read.get("general.architecture", "")
    if arch in ("nemotron_h", "nemotron_h_moe"):
        from ..interop.gguf_keys import Keys, read_config

        rows = next((int(t.shape[-1]) for t in reader.tensors if t.name == "token_embd.weight"), 1)
        spec, described = as_spec(read_config(Keys(reader), rows, None)), True
    else:
        spec, described = _outline(arch, read, reader.tensors), False
    blocks = int(read.get(f"{arch}.block_count", len(spec.blocks)))
    trunk = blocks - int(read.get(f"{arch}.nextn_predict_layers", 0))
    tied = not any(t.name == "output.weight" for t in reader.tensors)
    sized = []
    for t in reader.tensors:
        block = int(found[1]) if (found := re.match(r"blk\.(\d+)\.", t.name)) else None
        kind = ("mtp" if block is not None and block >= trunk else "routed_experts" if re.search(r"_(ch|)exps\.", t.name)
                else "embedding" if t.name == "token_embd.weight" and not tied else OTHERS)  # fmt: skip
        type_ = t.tensor_type.name
        sized.append(SizedTensor(t.name, kind, block, int(t.shape[0]), int(t.n_elements), type_, type_, int(t.n_bytes)))
    weights = WeightBytes(path.name, "as in the file", tuple(sized), False, False)
    return Demand(spec, weights, "f16", UBATCH, described)


def _outline(arch: str, read: Mapping[str, Any], tensors: Any) -> ArchitectureSpec:
    """Of a family that is not described here: which blocks have experts, and nothing else."""
    experts, used = read.get(f"{arch}.expert_count", 0), read.get(f"{arch}.expert_used_count", 0)
    owners = {int(found[1]) for t in tensors if (found := re.match(r"blk\.(\d+)\..*_(ch|)exps\.", t.name))}
    if not isinstance(experts, int) or not isinstance(used, int) or (owners and not 0 < used <= experts):
        raise MinimoeError(f"experts of the architecture {arch!r} are not counted here")
    count, width = int(read.get(f"{arch}.block_count", 1)), int(read.get(f"{arch}.embedding_length", 1))
    blocks = tuple(MoE(experts, used, 1) if block in owners else MLP(1) for block in range(count))
    return ArchitectureSpec(arch or "unknown", 1, width, blocks)


def _reader(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise MinimoeError('the package gguf is not installed: pip install "minimoe[run]"') from None
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise MinimoeError(f"{path.name} cannot be read ({' '.join(str(error).split())[:100]})") from None


def share(rate: float, ceiling: float, bound: str) -> tuple[float, str | None]:
    """``rate`` over ``ceiling``, and why it is refused if that is above 1."""
    part = rate / ceiling
    if part <= 1:
        return part, None
    peak = "matrix product rate" if bound == "compute" else "bandwidth"
    return part, (f"{rate:,.0f} tokens/s would be {part:.0%} of what the device's measured {peak} allows; something was "
                  "counted or timed wrongly, or other programs slowed the device's own measurement: run it again")
