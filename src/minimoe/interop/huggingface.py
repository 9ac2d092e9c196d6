"""Hugging Face directories: what NVIDIA releases and what transformers' ``save_pretrained`` writes.

On disk the trunk is called ``backbone`` and experts are split; in memory, here as in transformers, it is ``model``
and experts are stacked. ``mtp.*`` is written too; transformers ignores it on load.
"""
from __future__ import annotations

import json
import operator
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import HybridConfig
from ..errors import MinimoeError
from ..model import HybridLM

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_EXPERT = re.compile(r"^(?P<stack>.*\.experts)\.(?P<number>\d+)\.(?P<side>up_proj|down_proj)\.weight$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


class CheckpointError(MinimoeError):
    """A checkpoint that cannot be read or written; the message says which file or tensor, and what to do."""


def load_hf(
    directory: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    layers: int | Sequence[int] | None = None,
) -> HybridLM:
    """A HybridLM with the weights of a directory: config.json and safetensors, one file or shards.

    dtype    of the weights (None: as stored); the routers' correction biases stay at least float32
    layers   read only these blocks of the trunk (a number: the first so many), without the MTP block

    Raises CheckpointError for a missing, foreign or damaged file, a missing tensor or a wrong shape.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"dtype={dtype!r}: must be a torch dtype such as torch.bfloat16")
    directory = Path(directory)
    config = _read_config(directory)
    picked = pick_layers(config, layers)
    if picked is not None:
        pattern = "".join(config.hybrid_override_pattern[i] for i in picked)
        config = config.replace(hybrid_override_pattern=pattern, num_nextn_predict_layers=0)
    with ExitStack() as stack:
        stored = _open_tensors(directory, stack)
        if config.num_nextn_predict_layers and not any(name.startswith("mtp.") for name in stored):
            warnings.warn(f"{directory} holds no MTP weights (transformers drops them on load): read without the block",
                          stacklevel=2)
            config = config.replace(num_nextn_predict_layers=0)
        model = HybridLM(config, device="meta")
        ignored = () if config.num_nextn_predict_layers else ("mtp.",)
        wanted, taken = {}, set()
        for name, meta in model.state_dict().items():
            wanted[name] = _read(name, meta, _renumber(name, picked), stored, taken, dtype, device)
        foreign = [n for n in stored if n not in taken and not n.startswith(ignored)]
        if foreign and picked is None:
            raise CheckpointError(f"{directory}: tensor {foreign[0]} has no place in this config "
                                  f"({len(foreign)} such); config.json and weights are of different models")
        model.load_state_dict(wanted, assign=True)
    return model


def save_hf(
    model: HybridLM, directory: str | os.PathLike[str], tokenizer: Any = None, max_shard_bytes: int | None = None
) -> None:
    """Write config.json and model.safetensors so that ``transformers.AutoModelForCausalLM`` opens them unpatched.
    With ``max_shard_bytes`` the weights are in several files, none with more bytes of tensors, and an index.

    transformers 5.23 clamps dt at ``time_step_min`` while reading a prompt, and the released models do not
    (huggingface/transformers#48989); so 0.0 is written there and our value under ``minimoe_time_step_min``.
    The directory appears whole or not at all; one that holds other files is left alone.

    Raises CheckpointError if transformers could not compute the same, or if the directory holds other files.
    """
    directory = Path(directory).resolve()
    config = model.config
    if max_shard_bytes is not None and (type(max_shard_bytes) is not int or max_shard_bytes < 1):
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes!r}: must be a whole number of bytes, at least 1")
    if config.time_step_limit != (0.0, float("inf")):
        raise CheckpointError(f"time_step_limit={config.time_step_limit}: transformers ignores this field; "
                              "only (0, inf) computes alike there")
    if "E" in config.hybrid_override_pattern and config.n_routed_experts == 1:
        raise CheckpointError("n_routed_experts=1: transformers' router needs at least 2; use a dense block ('-') instead")
    if model.lm_head.weight.is_meta:
        raise CheckpointError("the model is on the meta device and has no weights to save")
    save_tokenizer = getattr(tokenizer, "save_pretrained", None) or getattr(tokenizer, "save", None)
    if tokenizer is not None and save_tokenizer is None:
        raise CheckpointError(f"tokenizer={tokenizer!r}: must have save_pretrained(dir) or save(dir)")
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; choose a new or an empty directory")
    if Path.cwd().is_relative_to(directory):
        raise CheckpointError(f"{directory} is the folder you are in; choose a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        files = _write_weights(dict(_split_names(model.state_dict())), fresh, max_shard_bytes)
        (fresh / CONFIG).write_text(json.dumps(_config_for_transformers(model), indent=1) + "\n", encoding="utf-8")
        if save_tokenizer is not None:
            save_tokenizer(str(fresh))
        fresh.chmod(0o755)  # mkdtemp makes it private, and save_file its files
        for file in files:
            file.chmod((fresh / CONFIG).stat().st_mode & 0o777)
        _swap(fresh, directory)
    except SafetensorError as error:
        raise CheckpointError(f"{directory} could not be written ({error}); is the disk full?") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_weights(tensors: dict[str, Tensor], directory: Path, max_shard_bytes: int | None) -> list[Path]:
    """One file, or shards with their index; returns the files of weights."""
    if max_shard_bytes is None:
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        return [directory / WEIGHTS]
    from huggingface_hub import split_torch_state_dict_into_shards  # comes with transformers

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [directory / file for file in split.filename_to_tensors]


def _config_for_transformers(model: HybridLM) -> dict[str, Any]:
    config = model.config
    fields = config.to_dict() | {
        "architectures": ["NemotronHForCausalLM"],
        "num_hidden_layers": config.num_hidden_layers,
        "torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "minimoe_time_step_min": config.time_step_min,
        "time_step_min": 0.0,
    }
    # transformers' field types refuse None and 0 for sizes of blocks that are absent; leaving those out is the same
    absent = ("moe_latent_size", "intermediate_size", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
              "moe_shared_expert_intermediate_size")
    return {key: value for key, value in fields.items() if value or key not in absent}


def _swap(fresh: Path, directory: Path) -> None:
    """Put ``fresh`` in the place of ``directory``; the old one, if any, is removed last."""
    if not directory.exists():
        fresh.rename(directory)
        return
    others = sorted(p.name for p in directory.iterdir()
                    if not (fresh / p.name).exists() and not p.match("model*.safetensors*"))
    if not others and any(directory.iterdir()):
        _read_config(directory)  # another program's config.json is not ours to replace
    if others:
        raise CheckpointError(f"{directory} holds other files ({others[0]}); choose a new or an empty directory")
    old = directory.with_name(f".{directory.name}-{os.getpid()}-old")
    directory.rename(old)
    try:
        fresh.rename(directory)
    except BaseException:
        old.rename(directory)
        raise
    shutil.rmtree(old)


def _split_names(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        name = re.sub(r"^model\.", "backbone.", name)
        if name.endswith(("experts.up_proj", "experts.down_proj")):
            stack, side = name.rsplit(".", 1)
            for number, expert in enumerate(tensor):
                yield f"{stack}.{number}.{side}.weight", expert.contiguous()
        else:
            yield name, tensor.contiguous()


def _read_config(directory: Path) -> HybridConfig:
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: give the directory of a Nemotron-H checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch it again")
    return HybridConfig.from_dict(config)


def pick_layers(config: HybridConfig, layers: int | Sequence[int] | None) -> list[int] | None:
    """The indices that ``layers`` asks for: a number, a list, or None for all of them (then None)."""
    if layers is None:
        return None
    try:
        picked = list(range(layers)) if isinstance(layers, int) else [operator.index(i) for i in layers]
    except TypeError:
        raise CheckpointError(f"layers={layers!r}: must be a number of layers or a list of their indices") from None
    wrong = [i for i in picked if not 0 <= i < config.num_hidden_layers]
    if wrong or not picked:
        raise CheckpointError(f"layers={layers!r}: the model has layers 0 to {config.num_hidden_layers - 1}")
    return picked


def _renumber(name: str, picked: list[int] | None) -> str:
    if picked is None:
        return name
    return _LAYER.sub(lambda match: f"model.layers.{picked[int(match[1])]}.", name)


Reader = Callable[[], Tensor]


def _open_tensors(directory: Path, stack: ExitStack) -> dict[str, Reader]:
    """A reader for every stored tensor, under the name it has in memory; expert n of a stack is "<stack>#n"."""
    index = directory / INDEX
    files = [WEIGHTS]
    if index.is_file():
        try:
            files = sorted({os.fspath(f) for f in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{index} is not a safetensors index; fetch it again") from None
    stored: dict[str, Reader] = {}
    for file in files:
        path = directory / file
        if not path.is_file():
            other = " (a pickled pytorch_model.bin is not read)" if list(directory.glob("*.bin")) else ""
            raise CheckpointError(f"{path} is missing{other}; fetch the safetensors files")
        try:
            handle = stack.enter_context(safe_open(path, framework="pt"))
            names = list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or not safetensors ({error}); fetch it again") from None
        for name in names:
            stored[_name_in_memory(name)] = lambda handle=handle, name=name: handle.get_tensor(name)
    return stored


def _name_in_memory(name: str) -> str:
    name = re.sub(r"^backbone\.", "model.", name).replace("e_score_correction.bias", "e_score_correction_bias")
    expert = _EXPERT.match(name)
    return f"{expert['stack']}.{expert['side']}#{expert['number']}" if expert else name


def _read(
    name: str, meta: Tensor, source: str, stored: dict[str, Reader], taken: set[str],
    dtype: torch.dtype | None, device: torch.device | str,
) -> Tensor:
    """The tensor ``source``, whole or stacked from its experts, checked against the shape of ``meta``."""
    bias = name.endswith("e_score_correction_bias")

    def convert(key: str, shape: torch.Size) -> Tensor:
        tensor = stored[key]()
        if tensor.shape != shape:
            raise CheckpointError(f"tensor {key.replace('#', ' of expert ')} has shape {tuple(tensor.shape)}, the "
                                  f"config asks for {tuple(shape)}; config.json and weights are of different models")
        taken.add(key)
        target = torch.promote_types(dtype or tensor.dtype, torch.float32) if bias else dtype
        # a copy, as the tensor is a view of the mapped file, which somebody may overwrite
        return tensor.to(device=device, dtype=target, copy=True)

    if source in stored:
        return convert(source, meta.shape)
    if meta.dim() == 3 and f"{source}#0" in stored:
        missing = [n for n in range(meta.shape[0]) if f"{source}#{n}" not in stored]
        if missing:
            raise CheckpointError(f"expert {missing[0]} of {source} is missing from the checkpoint ({len(missing)} such)")
        return torch.stack([convert(f"{source}#{n}", meta.shape[1:]) for n in range(meta.shape[0])])
    raise CheckpointError(f"tensor {source} is missing from the checkpoint; is it complete, and of this config?")
