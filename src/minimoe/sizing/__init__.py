"""What arithmetic says about a model before anything runs: parameters, bytes of state. Imports no torch."""
from .memory import StateBytes, state_bytes
from .parameters import ParameterCount, count_parameters

__all__ = ["ParameterCount", "StateBytes", "count_parameters", "state_bytes"]
