"""From what a reader asked for to what is measured. Imports no torch."""
from __future__ import annotations

import argparse
import functools
import glob
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import HybridConfig
from ..errors import MinimoeError
from .bounds import read_config
from .host import physical_cores, usable_cores
from .session import TORCH_DTYPES, Plan
from .variants import Rates, Variant, tasks

QUICK = {"pp": [32], "tg": [8], "repeats": 1, "seconds": 0.4, "energy_s": 0.2}
FULL = {"pp": [512], "tg": [128], "repeats": 5, "seconds": 10.0, "energy_s": 2.0}


def plan(args: argparse.Namespace, about: Mapping[str, Any]) -> Plan:
    """The plan for ``minimoe bench``'s arguments on the device of ``about``. Raises MinimoeError for a model that is
    none."""
    usual = QUICK if args.quick else FULL
    cores = min(usable_cores(), physical_cores() or usable_cores())
    cpu = about["device"] == "cpu"
    threads = sorted(set(args.threads or ([1, cores] if cpu else [cores])))
    models = [] if args.no_models else args.models or shipped()
    variants = [
        variant for model in models for number in threads
        for variant in of_model(Path(model), about["device"], number, args.runtime, args.dtype, args.gpu_layers, args.n_cpu_moe)
    ]  # fmt: skip
    devices = [Rates("cpu", number) for number in threads] + ([] if cpu else [Rates(about["device"], 1)])
    return Plan(
        variants, tasks(args.pp or usual["pp"], args.tg or usual["tg"], sorted(set(args.depth)), sorted(set(args.batch))),
        devices, args.rounds, args.repeats or usual["repeats"], usual["seconds"], usual["energy_s"], args.quick, args.timeout,
    )  # fmt: skip


def shipped() -> list[str]:
    """checkpoints/small and its GGUF file, in this checkout or in the current directory; nothing where they are not."""
    for root in (Path(__file__).resolve().parents[3], Path.cwd()):
        folder = root / "checkpoints" / "small"
        if (folder / "config.json").is_file():
            return [str(folder), *map(str, sorted(folder.glob("*.gguf")))]
    return []


def of_model(
    path: Path, device: str, threads: int, runtimes: Sequence[str] | None, dtype: str | None, gpu_layers: int, cpu_moe: int
) -> list[Variant]:
    """The variants of a model's directory or GGUF file. Raises MinimoeError, in one line, for what is neither."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MinimoeError(f"{path}: no such file")
        gpu = device != "cpu"
        return [Variant(
            "llama.cpp", str(path), path.stem, quant_of(path), device, threads, file_bytes(path),
            gpu_layers if gpu else 0, cpu_moe if gpu else 0,
        )]  # fmt: skip
    if not path.exists():
        raise MinimoeError(f"{path}: no such file or directory")
    if path.is_file():
        raise MinimoeError(f"{path}: give a model's directory or a .gguf file")
    if not (path / "config.json").is_file() and (path / "model" / "config.json").is_file():
        path = path / "model"  # what minimoe train wrote
    config = read_config(path)
    ours = isinstance(config, HybridConfig)
    wanted = runtimes or (("minimoe", "transformers") if ours else ("transformers",))
    if not ours and "minimoe" in wanted:
        raise MinimoeError(f"{path}: model_type is {config.get('model_type')!r}, and minimoe runs nemotron_h; "
                           "use --runtime transformers")
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if not size:
        raise MinimoeError(f"{path}: no .safetensors files; is the model whole?")
    name = path.resolve().parent.name if path.name == "model" else path.resolve().name
    return [Variant(runtime, str(path), name, dtype or stored_dtype(path), device, threads, size) for runtime in wanted]


def stored_dtype(folder: Path) -> str:
    """The dtype that config.json says, float32 where it says none that torch computes in."""
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said = str(data.get("dtype") or data.get("torch_dtype"))
    return said if said in TORCH_DTYPES else "float32"


def file_bytes(path: Path) -> int:
    """Of a file, with the other parts where it is "...-00001-of-00003.gguf"."""
    part = re.fullmatch(r"(.*)-\d{5}-(of-\d{5})", path.stem)
    parts = path.parent.glob(f"{glob.escape(part[1])}-*-{part[2]}.gguf") if part else [path]
    return sum(file.stat().st_size for file in parts)


@functools.cache
def quant_of(path: Path) -> str:
    """The name of a file's quant, from its header; "GGUF" where it cannot be told."""
    try:
        import gguf

        kind = gguf.GGUFReader(path).fields["general.file_type"].contents()
        return gguf.LlamaFileType(kind).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except Exception:  # the package is missing, or the file is none: llama.cpp says so in its row
        return "GGUF"
