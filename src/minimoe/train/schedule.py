"""Learning-rate schedule: warm up, stay, decay."""
from __future__ import annotations

import math


def warmup_stable_decay(step: int, steps: int, warmup: float = 0.05, decay: float = 0.3) -> float:
    """Factor of the peak learning rate at ``step`` (0 to steps - 1) of ``steps``.

    .. math::

        f = \\begin{cases}
            (s + 1) / w & s < w \\\\
            1 & w \\le s < n - d \\\\
            1 - \\sqrt{(s - (n - d) + 1) / (d + 1)} & n - d \\le s
        \\end{cases}

    with w and d the shares ``warmup`` and ``decay`` of n steps. The flat part does not know how long the run will
    be, so it can be prolonged and branched; the decay is where most of the loss falls. Nemotron 3 Super and Ultra
    decay by this minus-square-root form (arXiv 2604.12374; the shape is Hägele et al. 2024, arXiv 2405.18392).
    """
    rising, falling = round(warmup * steps), round(decay * steps)
    if step < rising:
        return (step + 1) / rising
    into = step - (steps - falling)
    return 1.0 if into < 0 else 1 - math.sqrt((into + 1) / (falling + 1))
