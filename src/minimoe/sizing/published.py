"""Published files beside what llama.cpp's own mixtures would weigh. Imports no torch."""
from __future__ import annotations

from ..catalog import GGUFFile, model
from .quants import QUANTS
from .weights import weight_bytes


def expected_bytes(file: GGUFFile) -> int | None:
    """Bytes of tensor data, as laid out in a file, of llama.cpp's mixture that a published file is nearest to.

    None where it is near none of them. A whole file has a header on top: 7.9 MB for Nemotron 3, most of it vocabulary.
    """
    if file.nearest not in QUANTS:
        return None
    importance = True if file.recipe in ("imatrix", "UD") else None
    sized = weight_bytes(model(file.model).spec, file.nearest, file.mtp, importance)
    return sized.total if file.measures == "tensors" else sized.padded


def deviation(file: GGUFFile) -> float | None:
    """How much larger a published file is than that mixture, as a share: 0.006 is 0.6 %; None if either is unknown.

    The header counts as deviation: +0.3 % for a file of 3 GB, +0.03 % for one of 25 GB.
    """
    expected, size = expected_bytes(file), file.size
    return None if expected is None or size is None else size / expected - 1
