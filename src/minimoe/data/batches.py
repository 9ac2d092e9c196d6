"""From documents to batches: one long row of token ids, and windows drawn from it."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .corpus import Corpus, CorpusError
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Tokens:
    """Token ids of all documents in a row, an end-of-text id after each.

    ids    [N] uint16 (uint32 for vocabularies above 65,536)
    bytes  UTF-8 bytes that they stand for, end-of-text ids not counted: what bits per byte are divided by
    """

    ids: np.ndarray
    bytes: int

    def __len__(self) -> int:
        return len(self.ids)


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer, progress: bool = False) -> Tokens:
    """Encode every document; special tokens' names in the text stay text."""
    rows = []
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    for text in tqdm(corpus.texts, desc="encoding", unit="file", disable=not progress, leave=False):
        rows.append(np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=dtype))
    return Tokens(np.concatenate(rows), corpus.bytes)


class Batches:
    """Random windows of ``length`` tokens: ``ids, targets = batches(step)``, both [batch, length] int64.

    Which windows a step gets depends on the seed and the step's number alone, so a run can be repeated or
    continued from any step. ``targets`` are ``ids`` one token later.

    tokens  what to draw from: Tokens, or a list of (Tokens, share): then each window's source is drawn first, with
            these odds, and a source's size says nothing about how often it is read

    Raises CorpusError if there are fewer tokens than one window needs.
    """

    def __init__(
        self, tokens: Tokens | Sequence[tuple[Tokens, float]], batch: int, length: int, seed: int = 0
    ) -> None:
        self.sources = [(tokens, 1.0)] if isinstance(tokens, Tokens) else list(tokens)
        for source, share in self.sources:
            if len(source) < length + 1:
                raise CorpusError(f"{len(source)} tokens are fewer than one window of {length} + 1; "
                                  "give more text or a shorter length")
            if not share > 0:
                raise CorpusError(f"a source's share is {share}: must be above 0; leave the source out instead")
        self.batch, self.length, self.seed = batch, length, seed

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng((self.seed, step))
        if len(self.sources) == 1:
            chosen = np.zeros(self.batch, dtype=int)
            starts = random.integers(0, len(self.sources[0][0]) - self.length, size=self.batch)
        else:
            shares = np.array([share for _, share in self.sources])
            chosen = random.choice(len(shares), size=self.batch, p=shares / shares.sum())
            starts = random.integers(0, [len(self.sources[which][0]) - self.length for which in chosen])
        rows = [self.sources[which][0].ids[at : at + self.length + 1] for which, at in zip(chosen, starts)]
        windows = torch.from_numpy(np.stack(rows).astype(np.int64))
        return windows[:, :-1], windows[:, 1:]


def in_order(tokens: Tokens, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every window of ``tokens`` once, from the start, without overlap: what validation reads, [batch, length] each."""
    count = (len(tokens) - 1) // length
    for first in range(0, count, batch):
        rows = min(batch, count - first)
        ids = torch.from_numpy(tokens.ids[first * length : (first + rows) * length + 1].astype(np.int64))
        yield ids[:-1].view(rows, length), ids[1:].view(rows, length)


def split_documents(ids: Tensor, targets: Tensor, end_id: int) -> tuple[Tensor, Tensor]:
    """``segment_ids`` [batch, length] of windows in which ``end_id`` ends a document, and the targets to go with them.

    The first token of a document cannot be known from the end of another one: it is no target (-100).
    """
    ends = ids == end_id
    return ends.cumsum(1) - ends.long(), targets.masked_fill(ends, -100)
