"""Which sizes a chapter runs at: ``ci`` (seconds), ``cpu`` (a laptop), ``gpu`` (a 12 GB card). Imports no torch
unless nobody has said, and then only to ask for CUDA."""
from __future__ import annotations

import os

PROFILES = ("ci", "cpu", "gpu")


def stated() -> str:
    """What ``MINIMOE_PROFILE`` or, without it, ``CI`` ask for, unchecked; empty if neither says anything."""
    name = os.environ.get("MINIMOE_PROFILE", "").strip()
    return name or ("ci" if os.environ.get("CI", "").lower() in ("1", "true", "yes") else "")


def profile() -> str:
    """The run profile's name.

    ``MINIMOE_PROFILE`` decides if set; else ``CI`` gives "ci"; else "gpu" with CUDA and "cpu" without.

    Raises
    ------
    ValueError
        if MINIMOE_PROFILE is set to an unknown name.
    """
    if name := stated():
        if name not in PROFILES:
            raise ValueError(f"MINIMOE_PROFILE={name!r} is unknown; set it to one of {', '.join(PROFILES)} or unset it")
        return name
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"
