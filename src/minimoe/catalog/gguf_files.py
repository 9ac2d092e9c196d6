"""GGUF files that others have published, with the sizes that they print. Imports no torch.

What such a file is called says less than it seems: a "Q4_K_M" may have been made with an importance matrix, or by hand,
tensor by tensor. ``recipe`` says which, and :func:`minimoe.sizing.published.deviation` how far its size is from llama.cpp's
own mixture of that name.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from . import own
from .shipped import shipped

RECIPES = ("default", "imatrix", "UD", "custom")
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class GGUFFile:
    """A published file, or its parts together.

    quant     as its name says it
    nearest   the quant of llama.cpp's that it is compared with
    recipe    default: llama.cpp's mixture as it is; imatrix: made with an importance matrix; UD: Unsloth's, a choice for
              every tensor; custom: another mixture, or an unknown one
    bytes     None where only a rounded size was printed
    printed   the size as printed: "22.8 GB" is decimal, "16.8 GiB" binary
    measures  "file", or "tensors" where the figure is of tensor data, without the header
    mtp       whether it holds multi-token-prediction blocks, or nothing else ("only")
    """

    model: str
    repo: str
    quant: str
    nearest: str
    recipe: str
    source: str
    file: str | None = None
    bytes: int | None = None
    printed: str | None = None
    measures: Literal["file", "tensors"] = "file"
    mtp: bool | Literal["only"] = False
    note: str | None = None

    @property
    def size(self) -> float | None:
        """Bytes, as exactly as they are known; None where nobody printed a size."""
        return self.bytes if self.bytes is not None else read_size(self.printed) if self.printed else None


def files(model_name: str | None = None) -> tuple[GGUFFile, ...]:
    """The published files of a model, or of all; a reader's own file (:mod:`.own`) adds to them.

    Raises
    ------
    CatalogError
        an entry of the reader's own file cannot be used.
    """
    data = shipped("files.json")
    found = [_entry(item, f"files.json: files[{n}]", data["sources"]) for n, item in enumerate(data["files"])]
    mine, sources = own.section("files"), own.section("sources")
    found += [_entry(item, f"{own.own_file()}: files[{n}]", sources) for n, item in enumerate(mine)]
    return tuple(file for file in found if model_name in (None, file.model))


def read_size(text: str) -> float:
    """ "22.8 GB" -> 22.8e9, "16.8 GiB" -> 16.8 * 2**30. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", text)
    if not match or match.group(2) not in _UNITS:
        raise ValueError(f"{text!r} is no size such as '22.8 GB' (decimal) or '16.8 GiB' (binary)")
    return float(match.group(1)) * _UNITS[match.group(2)]


def _entry(item: object, where: str, sources: Mapping[str, str]) -> GGUFFile:
    text = (str,)
    item = own.fields(
        item, where, {"model": text, "repo": text, "quant": text, "recipe": text, "source": text},
        {"file": text, "nearest": text, "bytes": (int,), "printed": text, "measures": text, "mtp": (bool, str), "note": text},
    )  # fmt: skip
    for key, allowed in (("recipe", RECIPES), ("measures", ("file", "tensors")), ("mtp", (True, False, "only"))):
        if key in item and item[key] not in allowed:
            names = ", ".join(json.dumps(name) for name in allowed)
            raise own.CatalogError(f"{where}: {key} must be one of {names}, not {json.dumps(item[key])}")
    try:
        read_size(item.get("printed", "1 GB"))
    except ValueError as error:
        raise own.CatalogError(f"{where}: printed: {error}") from None
    source = sources.get(item["source"], item["source"])
    return GGUFFile(**{"nearest": item["quant"], **item, "source": source})
