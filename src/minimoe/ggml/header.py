"""GGUF files as far as the header tells: is it one, and why would llama.cpp die on it?"""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .library import LlamaError

_OTHERS = {
    b"PK\x03\x04": "a zip archive (or a torch file)", b"\x1f\x8b": "compressed with gzip", b"version ": "a git-lfs pointer",
    b"<!DO": "a web page", b"<htm": "a web page", b"{": "JSON", b"ggml": "of GGUF's predecessor", b"lmgg": "of GGUF's predecessor",
}  # fmt: skip


def check_magic(path: str | os.PathLike[str]) -> Path:
    """Raise LlamaError, in one line, unless ``path`` is a file that begins as GGUF does."""
    path = Path(path)
    if path.is_dir():
        raise LlamaError(f"{path} is a directory; give the .gguf file in it")
    try:
        with path.open("rb") as file:
            start = file.read(16)
            size = file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        raise LlamaError(f"{path} does not exist") from None
    except OSError as error:
        raise LlamaError(f"{path} cannot be read ({error.strerror})") from None
    if start[:4] == b"GGUF":
        if size < 24:
            raise LlamaError(f"{path.name} is truncated: {size} bytes hold no GGUF header; fetch or export it again")
        version = int.from_bytes(start[4:8], "little")
        if version not in (2, 3):
            raise LlamaError(f"{path.name} says GGUF version {version}; 2 and 3 are read (a big-endian file has to be converted)")
        return path
    if not size:
        raise LlamaError(f"{path.name} is empty; fetch or export it again")
    kind = next((f", it is {what}" for magic, what in _OTHERS.items() if start.startswith(magic)), "")
    if start[8:9] == b"{":
        kind = ", it is a safetensors file"
    raise LlamaError(f"{path.name} is not a GGUF file{kind}")


def explain(path: str | os.PathLike[str]) -> str:
    """Why llama.cpp would abort on this file, in a few words, where the header shows it; else "".

    Reads the whole header, vocabulary included: for a file that was already refused.
    """
    try:
        import gguf

        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except Exception:  # a header that gguf cannot read has no more to tell, whatever it fails with
        return ""
    architecture = str(values.get("general.architecture", ""))
    return _duplicates(values) or _experts(values, architecture) or _heads(values, architecture)


def _duplicates(values: dict[str, Any]) -> str:
    tokens = values.get("tokenizer.ggml.tokens") or []
    first: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if token in first:
            return f"tokens {first[token]} and {number} have the same text {token!r}; every token needs its own"
        first[token] = number
    return ""


def _experts(values: dict[str, Any], architecture: str) -> str:
    count, used = (values.get(f"{architecture}.expert_{what}") for what in ("count", "used_count"))
    each = used if isinstance(used, list) else [used]
    if isinstance(count, int) and count:
        wrong = [number for number in each if isinstance(number, int) and not 0 < number <= count]
        if wrong:
            return f"expert_used_count is {wrong[0]}, and there are {count} experts"
    return ""


def _heads(values: dict[str, Any], architecture: str) -> str:
    heads, keys = (values.get(f"{architecture}.attention.head_count{kind}") for kind in ("", "_kv"))
    for kv in keys if isinstance(keys, list) else [keys]:
        for h in heads if isinstance(heads, list) else [heads]:
            if isinstance(h, int) and isinstance(kv, int) and kv and h % kv:
                return f"attention.head_count {h} is not divisible by head_count_kv {kv}"
    return ""
