"""Token ids in a file: encoded once, then mapped into memory, so a corpus may be larger than memory.

The file is nothing but the ids, two or four bytes each, lowest first; ``.json`` beside it says what they are (``HEADER``).
The JSON is written last and holds the file's hash: what is half-written or damaged is never taken for tokens.
"""
from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .batches import Tokens
from .bpe import sound
from .corpus import Corpus, CorpusError
from .tokenizer import Tokenizer, TokenizerError

FORMAT = 1
# count: ids; bytes: of the texts in UTF-8; tokenizer: its fingerprint; corpus: hash of the texts; sha256: of the file
HEADER = {"format": int, "count": int, "dtype": str, "bytes": int, "documents": int, "tokenizer": str, "name": str,
          "corpus": str, "sha256": str}  # fmt: skip
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
AT_ONCE = 1 << 20  # characters encoded in one call: enough for all cores, and about 100 MB of the encoder's own notes
FULL = [getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)]


class PackedError(CorpusError):
    """A file of tokens that cannot be written, or must not be read."""


def pack(
    documents: Iterable[str], tokenizer: Tokenizer, path: str | os.PathLike[str], progress: bool = False,
    name: str = "documents", sha256: str | None = None, total: int | None = None,
) -> Tokens:  # fmt: skip
    """Encode ``documents`` one after another into ``path``, an end-of-text id after each, as ``encode_corpus`` does.

    documents  read once; no more than a few of them are in memory
    name       what the corpus is called, for people
    sha256     the corpus' hash, if it has one; else that of the texts in a row, a zero byte after each
    total      bytes of all documents in UTF-8, if known: for the progress bar, and to say how much room is needed

    Raises PackedError if there is no document, or no room; then nothing is left behind and an older file stays as it was.
    """
    if isinstance(documents, str):
        raise PackedError("documents is a single str; give a list or a generator of them")
    path = Path(path)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    file_hash, texts_hash = hashlib.sha256(), hashlib.sha256()
    number = written = size = 0

    def room() -> str:
        if total and size:
            return f"about {written / size * total / 1e6:,.1f} MB are needed"
        return f"more than {written / 1e6:,.1f} MB are needed"

    temporary = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    with _writing(path, room):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _writing(path, room):
            file = open(temporary, "wb", buffering=0)
        with file, tqdm(total=total, desc="packing", unit="B", unit_scale=True, disable=not progress, leave=False) as bar:
            for texts in _portions(documents):
                ids = _encode(texts, tokenizer, number, DTYPES[dtype])
                utf8 = [text.encode() for text in texts]
                number += len(texts)
                written += len(ids)
                size += sum(map(len, utf8))
                file_hash.update(ids)
                texts_hash.update(b"".join(text + b"\0" for text in utf8))
                with _writing(path, room):
                    _write(file, ids)
                bar.update(sum(map(len, utf8)))
            if not number:
                raise PackedError(f"{path}: there is no document to pack; {name} is empty")
            header = {
                "format": FORMAT, "count": written // DTYPES[dtype].itemsize, "dtype": dtype, "bytes": size,
                "documents": number, "tokenizer": tokenizer.fingerprint, "name": name,
                "corpus": sha256 or texts_hash.hexdigest(), "sha256": file_hash.hexdigest(),
            }  # fmt: skip
            with _writing(path, room):
                os.fsync(file.fileno())
                with open(header_path(temporary), "wb", buffering=0) as notes:
                    _write(notes, json.dumps(header, indent=1).encode() + b"\n")
                    os.fsync(notes.fileno())
        with _writing(path, room):
            os.replace(temporary, path)
            os.replace(header_path(temporary), header_path(path))
    finally:
        temporary.unlink(missing_ok=True)
        header_path(temporary).unlink(missing_ok=True)
    return open_packed(path, tokenizer, verify=False)


def open_packed(path: str | os.PathLike[str], tokenizer: Tokenizer, verify: bool = True) -> Tokens:
    """What ``pack`` wrote; ``ids`` is mapped from the file, read-only, and takes no memory until it is read.

    verify  compare the file's hash, a second or so for a GB; without it only sizes and the JSON are checked

    Raises PackedError for another tokenizer, another format, or a file that is damaged or not there.
    """
    path = Path(path)
    header = _read_header(header_path(path))
    dtype = DTYPES[header["dtype"]]
    if header["tokenizer"] != tokenizer.fingerprint:
        raise PackedError(f"{path}: packed with tokenizer {header['tokenizer']}, and this one is {tokenizer.fingerprint}; "
                          "pack the text again")
    try:
        size = path.stat().st_size
        if size != header["count"] * dtype.itemsize:
            raise PackedError(f"{path}: {size:,} bytes, and its JSON says {header['count'] * dtype.itemsize:,}; "
                              "pack the text again")
        if verify:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != header["sha256"]:
                    raise PackedError(f"{path}: its bytes have changed since it was written; pack the text again")
        ids = np.memmap(path, dtype=dtype, mode="r", shape=(header["count"],))
    except OSError as error:
        raise PackedError(f"{path}: cannot be read ({_one_line(error)}); pack the text again") from None
    return Tokens(ids, header["bytes"])


def pack_once(corpus: Corpus, tokenizer: Tokenizer, folder: str | os.PathLike[str], progress: bool = False) -> Tokens:
    """``corpus`` from the cache in ``folder``, where it is packed if it is not there yet, or again if it is damaged.

    The file is named by the hashes of corpus and tokenizer. Two processes may build it at once: each writes a file of
    its own, both are the same, and the second takes the first one's place.
    """
    sha256 = corpus.sha256
    path = Path(folder) / f"{sha256}-{tokenizer.fingerprint}.bin"
    if header_path(path).exists():
        try:
            return open_packed(path, tokenizer)
        except PackedError as error:
            warnings.warn(str(error).replace("; pack the text again", "") + "; packing the text again", stacklevel=2)
    try:
        return pack(corpus.texts, tokenizer, path, progress, corpus.name, sha256, corpus.bytes)
    except PackedError as error:
        try:  # Windows replaces no file that is in use: then another process has just built it
            return open_packed(path, tokenizer)
        except PackedError:
            raise error from None


def header_path(path: Path) -> Path:
    """The JSON that goes with a file of tokens."""
    return path.with_name(path.name + ".json")


def _portions(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents, ``AT_ONCE`` characters or one document each."""
    texts: list[str] = []
    size = 0
    for text in documents:
        if not isinstance(text, str):
            raise PackedError(f"a document is {type(text).__name__}; give str")
        texts.append(text)
        size += len(text)
        if size >= AT_ONCE:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _encode(texts: list[str], tokenizer: Tokenizer, first: int, dtype: np.dtype) -> bytes:
    """Ids of ``texts`` as bytes, an end-of-text id after each: those of ``Tokenizer.encode``, on all cores at once."""
    for number, text in enumerate(texts, start=first):
        try:
            sound(text)
        except TokenizerError as error:
            raise PackedError(f"document {number}: {error}") from None
    # the encoder's notes on where each token came from are not made: a fifth less time
    found = tokenizer._engine.encode_batch_fast(texts, add_special_tokens=False)
    return b"".join(np.array([*one.ids, tokenizer.eos_id], dtype).tobytes() for one in found)


def _read_header(path: Path) -> dict[str, Any]:
    again = "pack the text again"
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PackedError(f"{path} is missing; {again}") from None
    except (OSError, ValueError, RecursionError) as error:  # no UTF-8 and no JSON are ValueErrors
        raise PackedError(f"{path}: cannot be read ({_one_line(error)}); {again}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise PackedError(f"{path}: format {found!r}, and this version reads {FORMAT}; {again}")
    wrong = [key for key, kind in HEADER.items() if type(header.get(key)) is not kind]
    wrong = wrong or [key for key in ("count", "bytes", "documents") if header[key] < (key != "bytes")]
    if wrong or header["dtype"] not in DTYPES:
        raise PackedError(f"{path}: {(wrong or ['dtype'])[0]} is damaged; {again}")
    return header


def _write(file: io.FileIO, content: bytes) -> None:
    """All of ``content``: a file without a buffer may take less at once, and a buffered one fails again when it closes."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


@contextmanager
def _writing(path: Path, room: Callable[[], str]) -> Iterator[None]:
    """Say what to do about a disk that is full or a folder that cannot be written; errors of the source pass."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise PackedError(f"{path}: no room ({error.strerror}); {room()}. Make room or choose another folder") from None
        raise PackedError(f"{path}: cannot be written ({_one_line(error)}); choose another folder") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
