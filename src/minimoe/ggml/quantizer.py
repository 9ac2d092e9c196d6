"""llama.cpp's own quantizer: a file in, a smaller file out, and what it could not do.

Blocks have 256 columns (k-quants, most IQ) or 32. Where a row is no multiple of its block, llama.cpp falls back to
another type, says so in its log only, and goes on; here that is part of the answer.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .child import run
from .header import check_magic
from .library import Line, LlamaError, library, log, native, reason

# llama.h, LLAMA_FTYPE_MOSTLY_*; the numbers that are missing were removed there.
QUANTS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ3_S": 26,
    "IQ3_M": 27, "IQ4_XS": 30, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38, "Q1_0": 40, "Q2_0": 41,
}  # fmt: skip
# These weigh each weight by how much it matters, and llama.cpp has no way to guess that.
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows of ``columns`` the wanted type's blocks do not divide, and the type it got."""

    tensor: str
    columns: int
    wanted: str
    used: str


@dataclass(frozen=True)
class Quantized:
    """What :func:`quantize_file` wrote, or :func:`predict` says it would.

    tensor_bytes  of tensor data, without header and padding
    file_bytes    of the file; None if it was only predicted
    types         how many tensors have each type: {"Q4_K": 20, "F32": 61}
    fallbacks     the tensors that did not get the type meant for them
    """

    quant: str
    tensor_bytes: int
    file_bytes: int | None
    types: dict[str, int]
    fallbacks: list[Fallback]

    def summary(self) -> str:
        """One line: size, and how many tensors fell back to what."""
        text = f"{self.quant}: {self.tensor_bytes / 1e6:.2f} MB of tensors"
        changes: dict[str, int] = {}
        for fallback in self.fallbacks:
            change = f"{fallback.wanted} to {fallback.used}"
            changes[change] = changes.get(change, 0) + 1
        listed = ", ".join(f"{count} from {change}" for change, count in changes.items())
        return f"{text}, {len(self.fallbacks)} of {sum(self.types.values())} tensors fell back: {listed}" if listed else text


def quantize_file(
    source: str | os.PathLike[str], target: str | os.PathLike[str], quant: str, threads: int = 1,
    tensor_types: Mapping[str, str] | None = None, requantize: bool = False, timeout: float = 3600,
) -> Quantized:
    """Write the GGUF file ``source`` (F32, F16 or BF16) to ``target`` with llama.cpp's mixture ``quant``.

    tensor_types  types for single tensors, by regular expression: {"ffn_(up|down)_exps": "NVFP4"}
    requantize    allow a source that is quantised already, at a loss

    Runs in a child process; the target appears whole or not at all. Raises LlamaError for a quant that does not
    exist or needs an importance matrix, and for a source that llama.cpp refuses, with its reason.
    """
    source, target = Path(source), Path(target)
    if target.exists() and not target.is_file():
        raise LlamaError(f"{target} is no plain file; name one")
    if target.exists() and source.exists() and target.samefile(source):
        raise LlamaError(f"{target} is the file that is read; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}-{os.getpid()}.part")
    try:
        done = _in_child(source, beside, quant, threads, tensor_types, requantize, timeout)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return done


def predict(
    source: str | os.PathLike[str], quant: str, tensor_types: Mapping[str, str] | None = None, requantize: bool = False
) -> Quantized:
    """What :func:`quantize_file` would do: types, fallbacks and bytes. Reads the header only."""
    return _in_child(Path(source), None, quant, 1, tensor_types, requantize, 600)


def check_quant(quant: str) -> str:
    """The name as llama.cpp spells it. Raises LlamaError if it cannot be made here, and says why."""
    name = str(quant).upper()
    if name in NEED_IMPORTANCE:
        raise LlamaError(f"quant {name} needs an importance matrix, which minimoe does not make; the smallest without one is Q2_K")
    if name == "NVFP4":
        raise LlamaError("quant NVFP4: llama.cpp has no such file type, only tensors; use quant='Q8_0' with "
                         "tensor_types={'ffn_(up|down)_exps': 'NVFP4'}")
    if name not in QUANTS:
        raise LlamaError(f"quant {quant!r} is unknown; llama.cpp has {', '.join(QUANTS)}")
    return name


def _in_child(
    source: Path, target: Path | None, quant: str, threads: int, tensor_types: Mapping[str, str] | None, requantize: bool,
    timeout: float,
) -> Quantized:
    name = check_quant(quant)
    if not isinstance(threads, int) or threads < 1:
        raise LlamaError(f"threads={threads!r}: must be a whole number, at least 1")
    check_magic(source)
    library()  # says in this process, and at once, if it is missing
    found = run(
        f"{__name__}:_quantize", f"{source.name}: cannot be quantised to {name}", timeout=timeout, source=str(source),
        target=str(target) if target else None, quant=name, threads=threads, requantize=requantize,
        tensor_types=list((tensor_types or {}).items()),
    )  # fmt: skip
    found["fallbacks"] = [Fallback(**fallback) for fallback in found["fallbacks"]]
    return Quantized(quant=name, file_bytes=target.stat().st_size if target else None, **found)


def _quantize(
    source: str, target: str | None, quant: str, threads: int, requantize: bool, tensor_types: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """In the child."""
    api = library()
    settings = api.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = QUANTS[quant], threads
    settings.dry_run, settings.allow_requantize = target is None, requantize
    name = Path(source).name
    with _overrides(settings, tensor_types), log.listen() as lines:
        code = api.llama_model_quantize(os.fsencode(source), os.fsencode(target or os.devnull), settings)
    if code:
        why = reason(lines) or f"code {code}"
        hints = {"requantizing": "give a file in F32, F16 or BF16, or requantize=True", "iostream": "is the disk full?"}
        hint = "".join(f"; {hint}" for word, hint in hints.items() if word in why)
        raise LlamaError(f"{name}: cannot be quantised to {quant}: {why}{hint}")
    return read_log(lines)


@contextlib.contextmanager
def _overrides(settings: Any, tensor_types: Sequence[tuple[str, str]]) -> Iterator[None]:
    api = library()
    array = (api.llama_model_tensor_override * (len(tensor_types) + 1))()  # a pattern of NULL ends it
    for entry, (pattern, kind) in zip(array, tensor_types):
        number = getattr(api, f"GGML_TYPE_{kind.upper()}", None)
        if number is None:
            raise LlamaError(f"tensor_types: {kind!r} is no type of ggml's; for example Q8_0, Q4_K or NVFP4")
        entry.pattern, entry.type = pattern.encode(), number
    if tensor_types:
        settings.tt_overrides = array
    yield  # the array lives as long as this frame


_TENSOR = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[([\d, ]+)\], type = *(\w+), (.*)")
_FALLBACK = re.compile(r"warning: (\S+) +- ncols +(\d+) not divisible by +\d+ \(required for type +(\w+)\).*back to +(\w+)")


def read_log(lines: Sequence[Line]) -> dict[str, Any]:
    """Types (in capitals, as everybody but ggml writes them), bytes and fallbacks, from what the quantizer wrote."""
    row_size = native("ggml_row_size", ctypes.c_size_t, ctypes.c_int, ctypes.c_int64)
    name_of = native("ggml_type_name", ctypes.c_char_p, ctypes.c_int)
    numbers = {(name_of(number) or b"").decode(): number for number in range(library().GGML_TYPE_COUNT)}
    types: dict[str, int] = {}
    fallbacks, total = [], 0
    for _, text in lines:
        if match := _FALLBACK.search(text):
            tensor, columns, wanted, used = match.groups()
            fallbacks.append(dict(tensor=tensor, columns=int(columns), wanted=wanted.upper(), used=used.upper()))
        elif match := _TENSOR.match(text):
            _, shape, before, rest = match.groups()
            after = re.search(r"converting to (\w+)|\((\w+)\)$", rest)
            kind = (after.group(1) or after.group(2)) if after else before
            columns, *others = [int(size) for size in shape.split(",")]
            rows = 1
            for size in others:
                rows *= size
            total += rows * row_size(numbers[kind], columns)
            types[kind.upper()] = types.get(kind.upper(), 0) + 1
    return {"tensor_bytes": total, "types": types, "fallbacks": fallbacks}

