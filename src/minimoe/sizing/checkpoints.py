"""Releases that mix precisions, as a recipe over tensors: what Ultra's "5.03 bits per element" is made of.

A format's cost, for a matrix of n numbers:

- NVFP4: n/2 bytes of 4-bit elements, n/16 of E4M3 scales (one for 16 elements), a float32 scale for the matrix and one
  for what is multiplied with it: 4.5 bits an element, and 8 bytes
- FP8: n bytes and the same two float32 scales: 8 bits, and 8 bytes
- BF16 2n, F32 4n

Each expert's matrix counts by itself. What no rule names is bfloat16, vectors included, except for the router's correction
biases, which are float32 in every release. Nemotron's MTP blocks are in the file, in bfloat16. Imports no torch.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..catalog import model as catalog_model
from ..catalog.gguf_files import read_size
from ..catalog.shipped import shipped
from .tensors import TensorShape, gguf_tensors

SCALES = 8  # bytes of two float32 numbers: a matrix's own scale, and that of its input


@dataclass(frozen=True)
class Rule:
    """Tensors, by GGUF's names without "blk.N." and ".weight", that have a format; in ``blocks``, or in all (None).

    ``mtp``: also in multi-token-prediction blocks.
    """

    format: str
    tensors: tuple[str, ...]
    blocks: tuple[int, ...] | None = None
    mtp: bool = False

    def covers(self, tensor: TensorShape) -> bool:
        stem = tensor.name.removesuffix(".weight").split(".", 2)[-1]
        here = self.blocks is None or tensor.block in self.blocks
        return stem in self.tensors and here and (self.mtp or tensor.kind != "mtp")


@dataclass(frozen=True)
class Checkpoint:
    """A release, or a recipe that its makers tried. The first rule that covers a tensor decides.

    scalars    float32 numbers by themselves, beside those of the formats
    published  what was printed: "bits_per_element", "bytes" of the tensors, "loaded_bytes" in a server's memory
    """

    model: str
    name: str
    rules: tuple[Rule, ...]
    published: Mapping[str, str | int]
    source: str
    repo: str | None = None
    scalars: int = 0
    note: str | None = None


@dataclass(frozen=True)
class CheckpointBytes:
    """What a recipe comes to; ``by_format`` and ``by_kind`` add up to ``total``, ``scalars`` aside."""

    total: int
    elements: int
    by_format: dict[str, int]
    by_kind: dict[str, int]

    @property
    def bits_per_element(self) -> float:
        """Over all weights, MTP included: the "BPE" of NVIDIA's report."""
        return 8 * self.total / self.elements


def checkpoint_recipes(model_name: str) -> tuple[Checkpoint, ...]:
    """The mixed-precision recipes that are known of a catalogue model; raises UnknownModel."""
    name = catalog_model(model_name).name
    found = []
    for item in shipped("checkpoints.json").get(name, ()):
        rules = tuple(
            Rule(rule["format"], tuple(rule["tensors"]), tuple(rule["blocks"]) if "blocks" in rule else None)
            for rule in item["rules"]
        )
        found.append(Checkpoint(**{**item, "model": name, "rules": rules, "published": MappingProxyType(item["published"])}))
    return tuple(found)


def checkpoint_bytes(checkpoint: Checkpoint) -> CheckpointBytes:
    """Bytes of a checkpoint's tensors, its MTP blocks included."""
    formats: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    elements = 0
    for tensor in gguf_tensors(catalog_model(checkpoint.model).spec, mtp=True):
        kind = format_of(tensor, checkpoint.rules)
        size = _bytes(kind, tensor)
        formats[kind] += size
        kinds[tensor.kind] += size
        elements += tensor.numbers
    total = formats.total() + 4 * checkpoint.scalars
    return CheckpointBytes(total, elements, dict(formats), dict(kinds))


def format_of(tensor: TensorShape, rules: tuple[Rule, ...]) -> str:
    """The format that a recipe gives a tensor."""
    if tensor.name.endswith("exp_probs_b.bias"):
        return "F32"
    return next((rule.format for rule in rules if rule.covers(tensor)), "BF16")


def residual(checkpoint: Checkpoint, figure: str = "bytes") -> float:
    """How much a published figure is above what the recipe comes to: in bytes, or bits per element.

    Raises
    ------
    KeyError
        if that figure was not published.
    """
    printed, sized = checkpoint.published[figure], checkpoint_bytes(checkpoint)
    if figure == "bits_per_element":
        return float(printed) - sized.bits_per_element
    return (read_size(printed) if isinstance(printed, str) else printed) - sized.total


def _bytes(kind: str, tensor: TensorShape) -> int:
    n, matrices = tensor.numbers, tensor.dims[2] if len(tensor.dims) > 2 else 1
    return {
        "NVFP4": n // 2 + n // 16 + SCALES * matrices, "FP8": n + SCALES * matrices, "BF16": 2 * n, "F32": 4 * n,
    }[kind]  # fmt: skip
