"""``minimoe inspect MODEL``: what a model's shape says about its size, before anything is downloaded."""
from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from .. import catalog
from ..config import PRESETS
from ..sizing import count_parameters, state_bytes
from .shapes import HELP, find_shape

CONTEXTS = (8_192, 32_768, 131_072, 1_048_576)
KINDS = ("mamba2", "attention", "moe", "mlp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=HELP)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.epilog = f"catalogue: {', '.join(catalog.models())}; presets: {', '.join(PRESETS)}"


def run(args: argparse.Namespace) -> int:
    figures = inspect(args.model)
    print(json.dumps(figures, indent=1) if args.json else _text(figures))
    return 0


def inspect(name: str) -> dict[str, Any]:
    """Sizes of a catalogue model, a preset or a config file. Bytes are bytes; state is for one sequence.

    ``kv_bytes_per_token`` is what a token adds at the longest context, ``kv_window_bytes`` what layers with a
    sliding window hold by then: KV of n tokens is n times the one plus the other.
    """
    spec, published, source = find_shape(name)
    parameters = count_parameters(spec)
    claimed = published.get("claimed_context")
    longest = max(spec.context or 0, claimed.value if claimed else 0)
    at = {tokens: state_bytes(spec, tokens) for tokens in CONTEXTS if tokens <= longest}
    at[longest] = state_bytes(spec, longest)
    full = at[longest]  # sliding windows, if there are any, are filled
    return {
        "name": spec.name,
        "source": source,
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "context": spec.context,
        "blocks": {kind: spec.count(kind) for kind in KINDS if spec.count(kind)},
        "parameters": dataclasses.asdict(parameters),
        "state": {
            "kv_dtype": "float16",
            "kv_bytes_per_token": full.kv_per_token,
            "kv_window_bytes": full.kv - longest * full.kv_per_token,
            "kv_bytes": {str(tokens): state.kv for tokens, state in at.items()},
            "ssm_dtype": "float32",
            "ssm_bytes": full.ssm,
            "conv_bytes": full.conv,
        },
        "published": {key: dataclasses.asdict(figure) for key, figure in published.items()},
    }


def _text(figures: dict[str, Any]) -> str:
    parameters, state = figures["parameters"], figures["state"]
    windows = state["kv_window_bytes"]
    blocks = ", ".join(f"{number} {kind}" for kind, number in figures["blocks"].items())
    lines = [
        figures["name"],
        f"  {sum(figures['blocks'].values())} blocks: {blocks}",
        _row("width", figures["hidden_size"]),
        _row("vocabulary", figures["vocab_size"]),
        "parameters",
        _row("total", parameters["total"]),
        *(_row(f"  {kind.replace('_', ' ')}", number) for kind, number in parameters["by_kind"].items()),
        _row("active per token", parameters["active"]),
        _row("  with head", parameters["active_with_head"]),
        _row("  with head and embedding", parameters["active_with_embeddings"]),
        _row("MTP, not in the total", parameters["mtp"]),
        "state of one sequence (KV float16, the rest float32)",
        _row("KV, each token", _bytes(state["kv_bytes_per_token"])),
        *([_row("KV, full sliding windows", _bytes(windows))] if windows else []),
        *(_row(f"KV, {int(tokens):,} tokens", _bytes(size)) for tokens, size in state["kv_bytes"].items()),
        _row("SSM", _bytes(state["ssm_bytes"])),
        _row("convolution", _bytes(state["conv_bytes"])),
    ]
    if figures["published"]:
        lines.append("published")
    for key, figure in figures["published"].items():
        lines += [_row(key.replace("_", " "), figure["value"]), f"    {figure['source']}"]
    return "\n".join([*lines, f"shape from {figures['source']}"])


def _row(label: str, value: int | str) -> str:
    return f"  {label:<36}{value if isinstance(value, str) else f'{value:,}':>20}"


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:,.4g} {unit}"
    return f"{number} B"
