"""How fast a run goes, as tokens a second and as a share of what the device can multiply, and how much memory it takes."""
from __future__ import annotations

import statistics
from collections import deque

import torch

from ..bench.device import MatmulRate, measure_matmul
from ..bench.footprint import resident_peak
from ..sizing import flops_per_token
from .loop import Training
from .options import Step, TrainError
from .precision import products_dtype


class Meter:
    """Give it to a run as ``on_step``, then ask it.

    peak  the device's measured matmul rate in the dtype of the run's products (:func:`matmul_peak`); without it there
          is no MFU
    last  steps that the median is taken over

    CUDA's record of the most memory starts anew with the meter.
    """

    def __init__(self, training: Training, peak: MatmulRate | None = None, last: int = 50) -> None:
        options, self.device, self.peak = training.options, training.device, peak
        self.tokens_per_step, self.processes = options.batch * options.length, training.world.size
        self.flops_per_token = flops_per_token(training.model.config, options.length, training.with_mtp).training
        self._seconds: deque[float] = deque(maxlen=last)
        self._before = training.seconds
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def __call__(self, step: Step) -> None:
        self._seconds.append(step.seconds - self._before)
        self._before = step.seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of a step over the median time of one of the last steps; None before the first one.

        Steps only: reading text, checkpoints and evaluations are not in it.
        """
        return self.tokens_per_step / statistics.median(self._seconds) if self._seconds else None

    @property
    def mfu(self) -> float | None:
        r"""Model FLOPs utilisation (Chowdhery et al. 2022, appendix B), 0 to 1; None without a peak or a step.

        .. math:: \text{MFU} = \frac{\text{tokens/s} \cdot \text{training FLOPs a token}}{\text{measured matmul FLOP/s}}

        The FLOPs are those of :func:`minimoe.sizing.flops.flops_per_token` at the window's length; short documents in a
        window need a little less. Under bfloat16 some products stay in float32 (see precision.py), and the peak is
        bfloat16's all the same. Of several processes each is held against the peak of this one's device.

        Raises TrainError if it comes out above 1, which no run can reach.
        """
        rate = self.tokens_per_second
        if rate is None or self.peak is None:
            return None
        done, best = rate * self.flops_per_token / self.processes, self.peak.flop_per_second
        if best is None:
            raise TrainError(f"no MFU: {self.device} multiplies no {self.peak.dtype} matrices ({self.peak.reason})")
        if done > best:
            raise TrainError(f"no MFU: {done / best:.0%} of the measured peak cannot be. The peak of {best / 1e9:.3g} GFLOP/s in "
                             f"{self.peak.dtype} was measured too low (was the machine busy?), or {self.flops_per_token:.4g} "
                             "FLOPs a token are too many")
        return done / best

    def result(self) -> dict[str, float | int | None]:
        """What a run's recipe keeps of it: tokens_per_second, and the most memory so far (see :func:`peak_memory`)."""
        rate = self.tokens_per_second
        return {"tokens_per_second": rate and round(rate, 1)} | peak_memory(self.device)


def matmul_peak(training: Training, seconds: float = 1.0) -> MatmulRate:
    """The device's rate in the dtype of the run's products, with the threads of now, in about ``seconds``."""
    dtype = products_dtype(training.device, training.options.precision, training.model.config.hidden_size)
    return measure_matmul(training.device, dtype, seconds)


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """The most bytes that were in use at once.

    peak_memory_bytes    on CUDA: of this process's tensors, since the record was last reset; else: of this process, since it began
                         (resident memory, Python and torch included; None where the system does not tell)
    peak_reserved_bytes  on CUDA only: what torch took from the card, which is what another program misses
    """
    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(device)}  # fmt: skip
    return {"peak_memory_bytes": resident_peak()}
