"""What arithmetic says about a model before anything runs: parameters, bytes of state, operations. Imports no torch."""
from .fit import Plan, plan, plans
from .flops import TokenFlops, flops_per_token
from .intensity import Work, block_work
from .memory import StateBytes, state_bytes
from .parameters import ParameterCount, count_parameters
from .roofline import Ceiling, Roof, decode_ceiling, prefill_ceiling, ridge, step_flops
from .traffic import Traffic, expected_experts, step_traffic
from .training import TrainingBytes, largest_batch, training_bytes
from .weights import WeightBytes, weight_bytes

__all__ = [
    "Ceiling", "ParameterCount", "Plan", "Roof", "StateBytes", "TokenFlops", "Traffic", "TrainingBytes",
    "WeightBytes", "Work", "block_work", "count_parameters", "decode_ceiling", "expected_experts", "flops_per_token",
    "largest_batch", "plan", "plans", "prefill_ceiling", "ridge", "state_bytes", "step_flops", "step_traffic",
    "training_bytes", "weight_bytes",
]  # fmt: skip
