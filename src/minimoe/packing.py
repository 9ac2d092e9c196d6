"""From ``lengths`` and ``segment_ids`` to the Span that the layers read."""
from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .state import HybridState, Span


def make_span(
    ids_BL: Tensor, state: HybridState | None, lengths: Sequence[int] | Tensor | None, segment_ids: Tensor | None
) -> tuple[Span, Tensor | None, Tensor | None]:
    """The call's Span, and for packed input the document each row ends in and where that document began.

    Raises ValueError if lengths or segment_ids do not fit ids, or if packing starts in the middle of a sequence.
    """
    B, L = ids_BL.shape
    past = state.lengths if state else (0,) * B
    if len(past) != B:
        raise ValueError(f"the state has {len(past)} rows and ids has {B}; use state.select(rows)")
    counts = _row_lengths(lengths, B, L)
    padded = min(counts) < L
    packed = state is not None and state.document_B is not None
    if segment_ids is None and not packed and not padded:
        return Span(past, counts), None, None
    position_L = torch.arange(L, device=ids_BL.device)
    count_B1 = torch.tensor(counts, device=ids_BL.device)[:, None] if padded else None
    valid_BL = position_L < count_B1 if padded else None

    if segment_ids is None and not packed:
        return Span(past, counts, padded, valid_BL), None, None
    if segment_ids is None:
        segment_BL = state.document_B[:, None].expand(B, L)
    else:
        if not isinstance(segment_ids, Tensor) or segment_ids.is_floating_point():
            raise ValueError("segment_ids must be a tensor of whole numbers, [batch, length]")
        if segment_ids.shape != ids_BL.shape:
            raise ValueError(f"segment_ids {tuple(segment_ids.shape)} must have the shape of ids {tuple(ids_BL.shape)}")
        if state is not None and not packed:
            raise ValueError("segment_ids must be given from the first call on; this state was made without them")
        segment_BL = segment_ids.to(ids_BL.device)
    before_B1 = state.document_B[:, None] if packed else segment_BL[:, :1]
    started_B1 = state.started_B[:, None] if packed else torch.zeros_like(segment_BL[:, :1])
    if padded:  # padding belongs to whatever document the row ends in
        last_B1 = segment_BL.gather(1, (count_B1 - 1).clamp(min=0))
        segment_BL = torch.where(valid_BL, segment_BL, torch.where(count_B1 > 0, last_B1, before_B1))

    begins_BL = segment_BL != torch.cat([before_B1, segment_BL[:, :-1]], 1)
    past_B1 = torch.tensor(past, device=ids_BL.device)[:, None]
    start_BL = torch.where(begins_BL, past_B1 + position_L, started_B1).cummax(1).values
    span = Span(past, counts, padded, valid_BL, begins_BL.cumsum(1), start_BL)
    return span, segment_BL[:, -1], start_BL[:, -1]


def _row_lengths(lengths: Sequence[int] | Tensor | None, B: int, L: int) -> tuple[int, ...]:
    if lengths is None:
        return (L,) * B
    try:
        counts = tuple(operator.index(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths))
    except TypeError:
        raise ValueError("lengths must be whole numbers, one a row") from None
    if len(counts) != B:
        raise ValueError(f"lengths has {len(counts)} entries for {B} rows")
    wrong = [n for n in counts if not 0 <= n <= L]
    if wrong:
        raise ValueError(f"lengths has {wrong[0]}; a row holds 0 to {L} tokens")
    return counts
