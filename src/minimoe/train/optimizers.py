"""AdamW with weight decay on matrices only."""
from __future__ import annotations

import torch

from ..model import HybridLM


def adamw(model: HybridLM, lr: float, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW with betas 0.9 and 0.95, as the Nemotron 3 reports state.

    Norm weights, biases, A_log, dt_bias and D are not decayed: zero means nothing for them.
    """
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
