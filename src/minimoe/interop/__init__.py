"""Weights in and out: other programs' files, read and written as they spell them."""
from .huggingface import CheckpointError, load_hf, save_hf

__all__ = ["CheckpointError", "load_hf", "save_hf"]
