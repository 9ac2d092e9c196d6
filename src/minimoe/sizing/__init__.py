"""What arithmetic says about a model before anything runs: parameters, bytes of state, operations. Imports no torch."""
from .flops import TokenFlops, flops_per_token
from .memory import StateBytes, state_bytes
from .parameters import ParameterCount, count_parameters

__all__ = ["ParameterCount", "StateBytes", "TokenFlops", "count_parameters", "flops_per_token", "state_bytes"]
