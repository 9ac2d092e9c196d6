"""From documents to batches: one long row of token ids, and windows drawn from it."""
from __future__ import annotations

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

    Raises CorpusError if there are fewer tokens than one window needs.
    """

    def __init__(self, tokens: Tokens, batch: int, length: int, seed: int = 0) -> None:
        if len(tokens) < length + 1:
            raise CorpusError(f"{len(tokens)} tokens are fewer than one window of {length} + 1; "
                              "give more text or a shorter length")
        self.tokens, self.batch, self.length, self.seed = tokens, batch, length, seed

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng((self.seed, step))
        starts = random.integers(0, len(self.tokens) - self.length, size=self.batch)
        rows = np.stack([self.tokens.ids[start : start + self.length + 1] for start in starts])
        windows = torch.from_numpy(rows.astype(np.int64))
        return windows[:, :-1], windows[:, 1:]

    def in_order(self) -> "list[tuple[Tensor, Tensor]]":
        """Every window once, from the start of the row, without overlap: what validation reads."""
        count = (len(self.tokens) - 1) // self.length
        ids = torch.from_numpy(self.tokens.ids[: count * self.length + 1].astype(np.int64))
        rows, targets = ids[:-1].view(count, -1), ids[1:].view(count, -1)
        return list(zip(rows.split(self.batch), targets.split(self.batch), strict=True))
