"""transformers' NemotronH as the reference, quietly, and checkpoints as NVIDIA spells them."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minimoe import HybridLM

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
UNBOUNDED = (0.0, math.inf)


def transformers_config(model: HybridLM, **changes: object) -> object:
    """A NemotronHConfig of our config; fields of kinds that the pattern lacks are left to their defaults."""
    fields = {
        k: v for k, v in model.config.to_dict().items() if v is not None and v != 0 or isinstance(v, bool)
    }
    for ours in ("model_type", "mtp_final_norm", "hybrid_override_pattern", "mtp_hybrid_override_pattern"):
        fields.pop(ours, None)
    fields |= {"layers_block_type": model.config.layers_block_type, "num_nextn_predict_layers": 0}
    return transformers.NemotronHConfig(**(fields | changes))


def transformers_model(model: HybridLM, patched: bool = True, **changes: object) -> torch.nn.Module:
    """transformers' model with our weights, by name.

    transformers 5.23 clamps dt at time_step_min in prefill, which the released models do not
    (huggingface/transformers#48989); ``patched`` takes that clamp away.
    """
    theirs = transformers.NemotronHForCausalLM(transformers_config(model, **changes))
    theirs.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("mtp.")})
    if patched:
        for layer in theirs.model.layers:
            if hasattr(layer.mixer, "time_step_limit"):
                layer.mixer.time_step_limit = UNBOUNDED
    return theirs.to(model.lm_head.weight.dtype).eval()


def released_tensors(model: HybridLM, bias_with_a_dot: bool = False) -> dict[str, Tensor]:
    """The weights as NVIDIA's releases name them: backbone.*, experts one by one."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^model\.", "backbone.", name)
        if bias_with_a_dot:
            name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        stack = re.fullmatch(r"(.*\.experts)\.(up_proj|down_proj)", name)
        if stack:
            tensors |= {
                f"{stack[1]}.{n}.{stack[2]}.weight": expert.clone() for n, expert in enumerate(tensor)
            }
        else:
            tensors[name] = tensor.clone()
    return tensors


def write_release(model: HybridLM, directory: Path, shards: int = 1, bias_with_a_dot: bool = False) -> Path:
    """config.json and safetensors as a release has them, written without the code under test."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model.config.to_dict()))
    tensors = released_tensors(model, bias_with_a_dot)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names, weight_map = sorted(tensors), {}
    for n in range(shards):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = names[n::shards]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return directory
