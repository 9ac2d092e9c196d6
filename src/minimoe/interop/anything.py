"""One way to open a model, whichever program wrote it."""
from __future__ import annotations

import os
from pathlib import Path

import torch

from ..data.tokenizer import Tokenizer, TokenizerError
from ..model import HybridLM
from .huggingface import CheckpointError, load_hf


def checkpoint_directory(path: str | os.PathLike[str]) -> Path:
    """The Hugging Face directory that a reader means: the one named, or "model" in what ``minimoe train`` wrote."""
    path = Path(path)
    inner = path / "model"
    return inner if not (path / "config.json").is_file() and (inner / "config.json").is_file() else path


def load_model(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[HybridLM, Tokenizer]:
    """Model and tokenizer from a ``.gguf`` file, a Hugging Face directory, or what ``minimoe train`` wrote.

    Raises CheckpointError or GGUFError, in one line, for what is none of these, and TokenizerError for a tokenizer
    that is missing or not the one that the model was trained with.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        from .gguf import load_gguf  # here, as a directory can be read without the gguf package

        model, tokenizer = load_gguf(path, dtype=dtype, device=device)
        if tokenizer is None:
            raise TokenizerError(f"{path} holds no text vocabulary; export it with a tokenizer")
        return model, tokenizer
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    path = checkpoint_directory(path)
    model, tokenizer = load_hf(path, dtype=dtype, device=device), Tokenizer.load(path)
    wanted = model.config.tokenizer_fingerprint
    if wanted is not None and wanted != tokenizer.fingerprint:
        raise TokenizerError(f"{path}: the tokenizer's fingerprint is {tokenizer.fingerprint}, the model was trained with "
                             f"{wanted}; put back the tokenizer.json that belongs to it")
    return model, tokenizer
