"""``minimoe export SOURCE TARGET``: the same weights for another program, a directory to GGUF or back."""
from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE",
                        help="a Hugging Face directory, what minimoe train wrote, or a .gguf file")
    parser.add_argument("target", type=Path, metavar="TARGET", help="a .gguf file, or a new Hugging Face directory")
    parser.add_argument("--quant", metavar="NAME", help="llama.cpp's spelling: F32 (default), F16, BF16, Q8_0, Q4_K_M, ...")
    parser.add_argument("--tokenizer", metavar="DIR",
                        help="where the tokenizer is (default: SOURCE); none: ids without text")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.epilog = "From .gguf to .gguf, llama.cpp's own quantiser does it, without a detour over this package's model."


def run(args: argparse.Namespace) -> int:
    to_file, from_file = args.target.suffix == ".gguf", args.source.suffix == ".gguf"
    if not (to_file or from_file):
        raise UserError(f"{args.target}: one of SOURCE and TARGET must end in .gguf")
    if args.quant and not to_file:
        raise UserError(f"--quant {args.quant}: a directory holds whole numbers of bits; quantise into a .gguf file")
    if args.tokenizer and from_file:
        raise UserError("--tokenizer: a .gguf file brings its own")
    figures = _requantise(args) if to_file and from_file else _to_gguf(args) if to_file else _to_directory(args)
    print(json.dumps(figures, indent=1) if args.json else _text(figures))
    return 0


def _to_gguf(args: argparse.Namespace) -> dict[str, Any]:
    from ..data import Tokenizer
    from ..interop import load_hf, load_model, save_gguf
    from ..interop.anything import checkpoint_directory

    if args.tokenizer is None:
        model, tokenizer = load_model(args.source)
    else:
        model = load_hf(checkpoint_directory(args.source))
        tokenizer = None if args.tokenizer == "none" else Tokenizer.load(checkpoint_directory(args.tokenizer))
    made = save_gguf(model, args.target, tokenizer, args.quant or "F32")
    return _figures(args.target, made, sum(tensor.numel() for tensor in model.state_dict().values()))


def _requantise(args: argparse.Namespace) -> dict[str, Any]:
    import gguf

    from ..ggml.quantizer import quantize_file

    made = quantize_file(args.source, args.target, args.quant or "F32")
    return _figures(args.target, made, sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(args.source).tensors))


def _figures(target: Path, made: Any, parameters: int) -> dict[str, Any]:
    types = dict(sorted(made.types.items(), key=lambda kind: -kind[1]))
    return {
        "target": str(target), "quant": made.quant, "bytes": target.stat().st_size, "tensor_bytes": made.tensor_bytes,
        "parameters": parameters, "bits_per_weight": round(8 * made.tensor_bytes / parameters, 3), "types": types,
        "fallbacks": [asdict(fallback) for fallback in made.fallbacks],
    }  # fmt: skip


def _to_directory(args: argparse.Namespace) -> dict[str, Any]:
    from ..interop import load_gguf, save_hf

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, tokenizer = load_gguf(args.source)
    save_hf(model, args.target, tokenizer)
    return {
        "target": str(args.target),
        "bytes": sum(path.stat().st_size for path in args.target.iterdir()),
        "parameters": sum(tensor.numel() for tensor in model.state_dict().values()),
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "tokenizer": tokenizer and tokenizer.fingerprint,
        "notes": [str(warning.message) for warning in caught],
    }


def _text(figures: dict[str, Any]) -> str:
    lines = [f"{figures['target']}: {figures['bytes']:,} bytes, {figures['parameters']:,} parameters"]
    if "types" not in figures:
        return "\n".join([f"{lines[0]} in {figures['dtype']}", *figures["notes"]])
    types = ", ".join(f"{count} {kind}" for kind, count in figures["types"].items())
    lines.append(f"  {figures['bits_per_weight']:.3f} bits a weight ({figures['tensor_bytes']:,} bytes of tensors)")
    lines.append(f"  tensors: {types}")
    columns: dict[tuple[str, str], set[int]] = {}
    for fallback in figures["fallbacks"]:
        columns.setdefault((fallback["wanted"], fallback["used"]), set()).add(fallback["columns"])
    for (wanted, used), rows in columns.items():
        count = sum((f["wanted"], f["used"]) == (wanted, used) for f in figures["fallbacks"])
        sizes = ", ".join(map(str, sorted(rows)))
        lines.append(f"  fallback: {count} {used} instead of {wanted}, whose blocks do not divide rows of {sizes}")
    return "\n".join(lines)
