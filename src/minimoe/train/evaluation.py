"""How good a model is on text that it has not seen."""
from __future__ import annotations

import math

import torch
from tqdm.auto import tqdm

from ..data.batches import Batches, Tokens, in_order, split_documents
from ..model import HybridLM


@torch.no_grad()
def evaluate(
    model: HybridLM, tokens: Tokens, batch: int = 8, length: int = 256, limit: int | None = None,
    documents: bool = True, progress: bool = False,
) -> float:
    """Mean loss in nats a token over ``tokens``, read once in windows of ``length`` (the first ``limit`` batches).

    documents: end-of-text ids end a document, as in TrainOptions.
    """
    Batches(tokens, batch, length)  # raises if there is less than one window
    device = model.lm_head.weight.device
    total = count = 0.0
    windows = list(in_order(tokens, batch, length))[:limit]
    for ids, targets in tqdm(windows, desc="evaluating", unit="batch", disable=not progress, leave=False):
        segments = None
        if documents and model.config.eos_token_ids:
            segments, targets = split_documents(ids, targets, model.config.eos_token_ids[0])
        counted = int((targets != -100).sum())
        loss = model.loss(ids.to(device), targets.to(device), segment_ids=None if segments is None else segments.to(device))
        total, count = total + loss.item() * counted, count + counted
    return total / count


def bits_per_byte(loss: float, tokens: Tokens) -> float:
    """``loss`` in nats a token -> bits a byte of text, which does not depend on the tokenizer:
    ``loss / ln 2 * tokens / bytes``."""
    return loss / math.log(2) * len(tokens) / tokens.bytes
