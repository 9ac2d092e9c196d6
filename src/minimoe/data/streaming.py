"""Text of a Hugging Face dataset, document by document as it arrives: nothing is stored but what ``pack`` makes of it."""
from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from typing import Any

from .corpus import CorpusError, load_corpus

PREFIX = "hf:"
USUAL = ("text", "content")  # usual names of the column that holds the text


class StreamError(CorpusError):
    """A dataset that cannot be streamed; the message says why."""


def documents(source: str | os.PathLike[str], split: str = "train", limit_bytes: int | None = None) -> Iterator[str]:
    """Documents of what ``--data`` names, for ``pack``.

    source  "hf:NAME", "hf:NAME:CONFIG", "hf:NAME:CONFIG:COLUMN" or "hf:NAME::COLUMN" is streamed: NAME as on
            huggingface.co, or a folder of parquet, JSON lines or text files. All else is read by ``load_corpus``, whole.
    """
    if isinstance(source, str) and source.startswith(PREFIX):
        name, config, column = parse(source)
        return stream_dataset(name, split, column, limit_bytes, config)
    return _up_to(iter(load_corpus(source).texts), limit_bytes)


def parse(source: str) -> tuple[str, str | None, str | None]:
    """``"hf:NAME[:CONFIG][:COLUMN]"`` -> name, config and column; None for what is not given."""
    name, *rest = source.removeprefix(PREFIX).split(":")
    if not source.startswith(PREFIX) or not name or len(rest) > 2:
        raise StreamError(f"{source}: write hf:NAME, hf:NAME:CONFIG, hf:NAME:CONFIG:COLUMN or hf:NAME::COLUMN")
    config, column = [*rest, "", ""][:2]
    return name, config or None, column or None


def stream_dataset(
    name: str, split: str = "train", column: str | None = None, limit_bytes: int | None = None,
    config: str | None = None, revision: str | None = None,
) -> Iterator[str]:  # fmt: skip
    """Texts of a dataset's ``column``, one a row, in the dataset's order; empty ones are passed over.

    column       default: the one named as in ``USUAL``, or the only column of text
    limit_bytes  end with the document that reaches so many bytes of UTF-8
    revision     commit or tag on huggingface.co; without one, what is newest today

    The first row is read at once, so mistakes show here. Raises StreamError if the package ``datasets`` is missing, without
    a network, for a dataset, config, split or column that is not there, and later if the stream breaks off.
    """
    try:
        import datasets
    except ImportError:
        raise StreamError(f"{name}: streaming needs the package datasets: pip install datasets") from None
    try:
        rows = iter(datasets.load_dataset(name, config, split=split, streaming=True, revision=revision))
        first = next(rows, None)
    except ConnectionError as error:
        raise StreamError(f"{name}: no connection ({_one_line(error)}); train on 'stdlib', 'packages' or a folder of text "
                          "instead, which need none") from None
    except Exception as error:  # the library has dozens of kinds; its messages name what is there instead
        raise StreamError(f"{name}: cannot be streamed ({_one_line(error)})") from None
    if first is None:
        raise StreamError(f"{name}: its split {split} is empty")
    wanted = _column(name, first, column)
    return _up_to(_texts(name, chain([first], rows), wanted), limit_bytes)


def _column(name: str, row: dict[str, Any], wanted: str | None) -> str:
    if wanted is None:
        texts = [key for key, value in row.items() if isinstance(value, (str, type(None)))]  # this row's text may be missing
        wanted = next((key for key in USUAL if key in texts), texts[0] if len(texts) == 1 else None)
    elif wanted not in row:
        raise StreamError(f"{name}: no column {wanted!r}; it has {', '.join(row)}")
    if wanted is None:
        raise StreamError(f"{name}: which column is the text? It has {', '.join(row)}; write hf:{name}::COLUMN")
    return wanted


def _texts(name: str, rows: Iterator[dict[str, Any]], column: str) -> Iterator[str]:
    read = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # from the network or the decoder of the files
            raise StreamError(f"{name}: the stream broke after {read} rows ({_one_line(error)}); start again") from None
        if row is None:
            return
        text, read = row.get(column), read + 1
        if not isinstance(text, (str, type(None))):
            raise StreamError(f"{name}: column {column!r} holds {type(text).__name__}, not text; it has {', '.join(row)}")
        if text:
            yield text


def _up_to(texts: Iterator[str], limit_bytes: int | None) -> Iterator[str]:
    left = limit_bytes
    while left is None or left > 0:
        text = next(texts, None)
        if text is None:
            return
        yield text
        if left is not None:
            left -= len(text.encode(errors="replace"))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
