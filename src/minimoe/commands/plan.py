"""``minimoe plan MODEL``: will it fit, in which quant, what goes where, and how fast can it be at most."""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import catalog
from ..catalog import own
from ..config import PRESETS
from ..sizing.fit import COMPARED, HOST_RESERVE, Plan, choose, plans
from ..sizing.quants import check_quant
from . import UserError, plan_machine
from .shapes import HELP, find_shape

KV_TYPES = ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "f32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=HELP)
    parser.add_argument("--quant", metavar="NAME", help="only this one, such as Q4_K_M (default: compare them)")
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="tokens of a sequence (default: 8192)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at the same time (default: 1)")
    parser.add_argument("--kv-type", default="f16", choices=KV_TYPES, help="of keys and values (default: f16, llama.cpp's)")
    plan_machine.add_arguments(parser)
    parser.add_argument("--catalog", type=Path, metavar="FILE", help="models, files and devices of your own, as JSON")
    parser.add_argument("--json", action="store_true", help="print a list of quants with all figures, sizes in bytes")
    parser.epilog = (
        f"models: {', '.join(catalog.models())}; presets: {', '.join(PRESETS)}; GPUs: {', '.join(catalog.devices())}"
    )


def run(args: argparse.Namespace) -> int:
    with own.use(args.catalog):
        spec, published, _ = find_shape(args.model)
        for name, value in (("--context", args.context), ("--batch", args.batch)):
            if value < 1:
                raise UserError(f"{name} {value}: must be 1 or more")
        machine = plan_machine.find_machine(args)
        made = plans(
            spec, args.context, machine.device, COMPARED if args.quant is None else (check_quant(args.quant),),
            reserve=None if args.reserve is None else args.reserve * 1e9, ram=machine.ram_bytes, ram_memory=machine.ram,
            batch=args.batch, kv_dtype=args.kv_type,
        )  # fmt: skip
        files = catalog.files(args.model)
    chosen = choose(made, [file.quant for file in files if file.mtp != "only"])
    if args.json:
        print(json.dumps([figures(one, one is chosen, files, (*machine.notes, *machine.ram_notes)) for one in made], indent=1))
    else:
        from . import plan_text

        claimed = published.get("claimed_context")
        print(plan_text.text(made, chosen, machine, files, spec.context, claimed and int(claimed.value)))
    return 0


def figures(one: Plan, chosen: bool, files: Sequence[catalog.GGUFFile], notes: Sequence[str]) -> dict[str, Any]:
    """A plan as JSON: all sizes in bytes, what is estimated named so."""
    fell, ceiling = one.fallback, one.ceiling
    return {
        "quant": one.quant, "bytes": one.weights.total, "bits_per_weight": round(one.weights.bits_per_weight, 4),
        "needs_importance_matrix": one.weights.needs_importance, "recommended": chosen, "fits": one.fits,
        "model": one.model, "context": one.context, "batch": one.batch, "kv_type": one.kv_dtype,
        "max_context": one.max_context, "longest_context": one.longest_context,
        "device": {
            "name": one.device.name, "memory_bytes": one.device.memory_bytes, "unified": one.device.unified,
            "bytes_per_second": one.device.bytes_per_second, "origin": one.device.origin, "source": one.device.source,
        },
        "vram": one.vram, "vram_bytes": sum(one.vram.values()), "headroom_bytes": one.headroom,
        "ram": one.ram, "ram_bytes": sum(one.ram.values()), "ram_available_bytes": one.ram_bytes,
        "estimates": {"compute": one.vram["compute"], "reserve": one.vram["reserve"], "host_reserve": HOST_RESERVE},
        "expert_blocks": one.expert_blocks, "ram_blocks": one.ram_blocks, "n_cpu_moe": one.n_cpu_moe,
        "fallback": {"share": round(fell.share, 4), "rows": fell.columns, "intended_bytes": fell.intended_bytes},
        "ceiling": ceiling and {
            "tokens_per_second": round(ceiling.tokens_per_second, 2), "parts_seconds": ceiling.parts, "bound": ceiling.bound,
            "origin": ceiling.origin, "vram_bytes_per_step": ceiling.traffic.vram, "ram_bytes_per_step": ceiling.traffic.ram,
        },
        "flags": one.flags, "why": one.why, "notes": list(notes),
        "files": [asdict(file) for file in files if one.quant in (file.quant, file.nearest)],
    }  # fmt: skip
