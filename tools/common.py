"""What the tools share: where things are and the settings that stored outputs are made under. Standard library only."""

from __future__ import annotations

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent

PROFILES = ("ci", "cpu", "gpu")

# One thread and no waiting threads: two kernels share two cores, and sums come out in the same order everywhere.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def notebook_env(profile: str = "auto") -> dict[str, str]:
    """The environment of a notebook's kernel. `ci` is what stored outputs come from: a CPU, one thread, no network."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), env.get("PYTHONPATH")]))
    env["PYTHONHASHSEED"] = "0"
    # ipykernel's frozen-module note goes to stderr on every start and would end up beside the first output
    env["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    if profile != "auto":
        env["MINIMOE_PROFILE"] = profile
    if profile == "ci":
        env.update(THREADS, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", COLUMNS="80")
        env.pop("MINIMOE_PREDICTIONS", None)
    return env
