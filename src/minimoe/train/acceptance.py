"""How many of the MTP block's drafts the trunk would take, measured along a given text.

At many places of the text both go their own way: the trunk writes the ``depth + 1`` tokens that it finds likeliest,
the block drafts all but the first of them from the trunk's state at that place and from its own drafts. A draft is
right if it is the trunk's token: what greedy self-speculation accepts. The text itself is not asked for.

Legend: B rows, L length, R rows that go on from one place, D model.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..model import HybridLM
from ..state import HybridState, KVState


@dataclass(frozen=True)
class Acceptance:
    """Counts, (right, asked), a pair for each depth from 1 on.

    given     of the drafts whose chain was right so far: the rate at which speculation goes on
    any       of all drafts, whatever came before them
    lengths   places at which the first 0, 1, ... depth drafts were right and the next one was not
    positions of a single draft at every token of the text, from what the text says: depth 1 without a chain
    """

    given: list[tuple[int, int]]
    any: list[tuple[int, int]]
    lengths: list[int]
    positions: tuple[int, int]

    @property
    def mean_length(self) -> float:
        """Drafts taken on average before the first wrong one (or the end of the text)."""
        return sum(n * count for n, count in enumerate(self.lengths)) / max(1, sum(self.lengths))


@torch.no_grad()
def acceptance(
    model: HybridLM, ids: Tensor, depth: int = 4, every: int = 16, counted: Tensor | None = None, batch: int = 64,
    progress: bool = False,
) -> Acceptance:
    """Drafts of 1 to ``depth`` along ``ids`` [B, L], each row one document from its start, from every ``every``-th token.

    counted  [B, L] True where a draft may start and counts (default: everywhere): not in a prompt, not in the padding
             at a row's end, which changes nothing before it

    Drafts after an end-of-text id of the trunk's are not asked for. Raises ValueError without an MTP block.
    """
    if model.mtp is None:
        raise ValueError("this model has no MTP block; set num_nextn_predict_layers=1 in its config")
    if depth < 1 or every < 1:
        raise ValueError(f"depth={depth}, every={every}: both must be 1 or more")
    counted = torch.ones_like(ids, dtype=torch.bool) if counted is None else counted
    chains: list[Tensor] = []  # [R, depth]: 1 right, 0 wrong, -1 not asked
    agree = asked = 0
    blocks = list(zip(ids.split(batch), counted.split(batch), strict=True))
    for ids_BL, counted_BL in tqdm(blocks, desc="drafting", unit="batch", disable=not progress, leave=False):
        state: HybridState | None = None
        block_state: KVState | None = None
        last_B1D = model.lm_head.weight.new_zeros(len(ids_BL), 1, model.config.hidden_size)
        for part_BL, counts_BL in zip(ids_BL.split(every, 1), counted_BL.split(every, 1), strict=True):
            out = model(part_BL, state)
            before_BLD = torch.cat([last_B1D, out.hidden_BLD[:, :-1]], 1)
            logits_BLV, _, block_state = model.draft(part_BL, before_BLD, block_state)
            state, last_B1D = out.state, out.hidden_BLD[:, -1:]
            same_BL = logits_BLV.argmax(-1) == out.logits.argmax(-1)
            agree, asked = agree + int((same_BL & counts_BL).sum()), asked + int(counts_BL.sum())
            rows = counts_BL[:, -1].nonzero()[:, 0]
            if len(rows) and part_BL.shape[1] == every:
                chosen = rows.tolist()
                chains.append(_chains(
                    model, out.logits[rows, -1:].argmax(-1), last_B1D[rows], state.select(chosen),
                    block_state.map(lambda x, rows=rows: x.index_select(0, rows), chosen), depth,
                ))  # fmt: skip
    return _count(torch.cat(chains) if chains else torch.empty(0, depth), (agree, asked))


def _chains(
    model: HybridLM, first_R1: Tensor, hidden_R1D: Tensor, state: HybridState, block_state: KVState, depth: int
) -> Tensor:
    """From the trunk's next token on, its own tokens against the block's: [R, depth], 1 right, 0 wrong, -1 not asked."""
    ends = torch.tensor(model.config.eos_token_ids, device=first_R1.device)
    trunk_R1 = draft_R1 = first_R1
    going_R1, columns = torch.ones_like(first_R1, dtype=torch.bool), []
    for _ in range(depth):
        going_R1 = going_R1 & ~torch.isin(trunk_R1, ends)
        out = model(trunk_R1, state)
        trunk_R1, state = out.logits.argmax(-1), out.state
        logits_R1V, hidden_R1D, block_state = model.draft(draft_R1, hidden_R1D, block_state)
        draft_R1 = logits_R1V.argmax(-1)
        columns.append((draft_R1 == trunk_R1).long().masked_fill(~going_R1, -1))
    return torch.cat(columns, 1)


def _count(chains_RK: Tensor, positions: tuple[int, int]) -> Acceptance:
    depth = chains_RK.shape[1]
    lengths_R = (chains_RK == 1).long().cumprod(1).sum(1)
    reached = [chains_RK[(lengths_R >= k) & (chains_RK[:, k] >= 0), k] for k in range(depth)]
    whole = [chains_RK[chains_RK[:, k] >= 0, k] for k in range(depth)]
    return Acceptance(
        [(int(column.sum()), len(column)) for column in reached], [(int(column.sum()), len(column)) for column in whole],
        torch.bincount(lengths_R, minlength=depth + 1).tolist(), positions,
    )  # fmt: skip
