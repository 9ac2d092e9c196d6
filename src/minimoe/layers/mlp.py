"""Dense feed-forward block: up, squared ReLU, down. No gate, no bias."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU, ``max(x, 0)^2`` (So et al. 2021, "Primer")."""
    return F.relu(x).square()


class MLP(nn.Module):
    """``y = W_down relu(W_up x)^2``. Shapes: [..., D] -> [..., D]. Matches transformers ``NemotronHMLP``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(relu2(self.up_proj(x)))
