"""What ``--data`` names, as tokens: texts, tasks and datasets, each with its share of the windows."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..cache import cache_folder
from .batches import Tokens, encode_corpus
from .corpus import Corpus, CorpusError, load_corpus
from .packed import PackedError, header_path, open_packed, pack, pack_once
from .streaming import PREFIX, documents
from .tasks import task_tokens
from .tokenizer import Tokenizer

TASKS = "tasks"
TASK_EXAMPLES = 160_000  # about 8 million tokens
LARGE = 20_000_000  # bytes; a larger corpus is packed into the cache once instead of encoded at every start
STREAMED = 200_000_000  # bytes of a dataset that are read, if nothing else is said
FIRST_BYTES = 5_000_000  # of a dataset, from which a tokenizer is trained and documents are held out
HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class Sources:
    """Everything that a run reads.

    tokens    (Tokens, share) a source, for Batches
    held_out  of the first source, never trained on
    about     one description a source and one of what is held out, for the recipe
    """

    tokens: list[tuple[Tokens, float]]
    held_out: Tokens
    tokenizer: Tokenizer
    about: list[dict[str, Any]]


def load_sources(
    words: Sequence[str], vocab_size: int, tokenizer: str | os.PathLike[str] | None = None, seed: int = 0,
    limit_bytes: int = STREAMED, progress: bool = False,
) -> Sources:  # fmt: skip
    """Read ``words``, each ``SOURCE`` or ``SOURCE=SHARE``; SOURCE is what ``load_corpus`` reads, "tasks" or "hf:NAME".

    tokenizer    a directory; without one a tokenizer of at most ``vocab_size`` tokens is trained on the first source
    limit_bytes  of each streamed dataset
    seed         of the tasks

    Raises CorpusError for a source that cannot be read, or a tokenizer with more than ``vocab_size`` tokens.
    """
    wanted = [_source(word) for word in words]
    first = wanted[0][0]
    if first == TASKS:
        raise CorpusError("--data tasks: name a source of text first; the tokenizer and the validation text come from it")
    if first.startswith(PREFIX):
        stream, held_texts, sample = _split_stream(first, limit_bytes)
        tok = _tokenizer(tokenizer, sample, vocab_size)
        held_out = _in_memory(held_texts, tok)
        read = [_streamed(first, stream, tok, limit_bytes, progress)]
        described = {"name": "held out", "files": len(held_texts), "bytes": held_out.bytes}
    else:
        training, validation = load_corpus(first).split()
        tok = _tokenizer(tokenizer, training.texts, vocab_size)
        held_out = encode_corpus(validation, tok)
        read = [_corpus(training, tok, progress)]
        described = {"name": "held out", "files": len(validation.names), "bytes": validation.bytes, "sha256": validation.sha256}
    for name, _ in wanted[1:]:
        if name == TASKS:
            read.append((task_tokens(tok, TASK_EXAMPLES, seed, progress), {"name": TASKS, "examples": TASK_EXAMPLES}))
        elif name.startswith(PREFIX):
            read.append(_streamed(name, None, tok, limit_bytes, progress))
        else:
            read.append(_corpus(load_corpus(name), tok, progress))
    about = [notes | {"share": share, "tokens": len(tokens)} for (tokens, notes), (_, share) in zip(read, wanted)]
    shares = [(tokens, share) for (tokens, _), (_, share) in zip(read, wanted)]
    return Sources(shares, held_out, tok, [*about, described])


def _source(word: str) -> tuple[str, float]:
    """``"stdlib=0.4"`` -> name and share."""
    name, equals, share = word.rpartition("=")
    if not equals:
        return word, 1.0
    try:
        return name, float(share)
    except ValueError:
        raise CorpusError(f"--data {word}: {share!r} is no share; write SOURCE=0.4, or SOURCE alone") from None


def _tokenizer(directory: str | os.PathLike[str] | None, texts: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer.load(directory) if directory else Tokenizer.train(texts, vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise CorpusError(f"{directory}: {tokenizer.vocab_size} tokens, and the preset has room for {vocab_size}")
    return tokenizer


def _corpus(corpus: Corpus, tokenizer: Tokenizer, progress: bool) -> tuple[Tokens, dict[str, Any]]:
    tokens = (pack_once(corpus, tokenizer, cache_folder() / "tokens", progress) if corpus.bytes > LARGE
              else encode_corpus(corpus, tokenizer, progress))  # fmt: skip
    return tokens, {"name": corpus.name, "sha256": corpus.sha256, "files": len(corpus.names), "bytes": corpus.bytes}


def _split_stream(source: str, limit_bytes: int) -> tuple[Iterator[str], list[str], list[str]]:
    """A dataset to train on; documents that are held out from its beginning; and a sample for a tokenizer."""
    stream = documents(source, limit_bytes=limit_bytes)
    held_out: list[str] = []
    kept: list[str] = []
    size = 0
    for number, text in enumerate(stream):
        (kept if number % HELD_OUT_EVERY else held_out).append(text)
        size += len(text)
        if size >= FIRST_BYTES:
            break
    if not kept or not held_out:
        raise CorpusError(f"{source}: {len(kept) + len(held_out)} documents are too few to hold some out")
    return chain(kept, stream), held_out, kept


def _streamed(
    source: str, stream: Iterator[str] | None, tokenizer: Tokenizer, limit_bytes: int, progress: bool
) -> tuple[Tokens, dict[str, Any]]:
    """A dataset's tokens, packed into the cache when they are first asked for; afterwards no network is needed."""
    asked = f"{source} {limit_bytes} {tokenizer.fingerprint} {'split' if stream else 'whole'}"
    path = Path(cache_folder() / "tokens" / f"{hashlib.sha256(asked.encode()).hexdigest()}.bin")
    try:
        tokens = open_packed(path, tokenizer)
    except PackedError:  # not there yet, or damaged
        text = stream if stream is not None else documents(source, limit_bytes=limit_bytes)
        tokens = pack(text, tokenizer, path, progress, name=source, total=limit_bytes)
    return tokens, {"name": source, "bytes": tokens.bytes, "sha256": _corpus_hash(path)}


def _corpus_hash(path: Path) -> str:
    return json.loads(header_path(path).read_text(encoding="utf-8"))["corpus"]


def _in_memory(texts: Sequence[str], tokenizer: Tokenizer) -> Tokens:
    return encode_corpus(Corpus("held out", tuple(map(str, range(len(texts)))), tuple(texts)), tokenizer)
