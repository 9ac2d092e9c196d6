"""``minimoe bench``: this machine and models on it, measured; ``minimoe bench compare``: measured machines side by side."""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import UserError

EPILOG = """pp512: a prompt of 512 tokens is read. tg128: 128 tokens are written one by one, from an empty context (or after
--depth tokens). ttft, tpot, itl: to the first token, between tokens on average, between any two. Nothing leaves this
machine. A card holds no names and no paths; results/cards/README.md says how to share one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="*",
                        help="a model's directory or a .gguf file (default: the shipped checkpoint); or: compare CARD [CARD ...]")
    parser.add_argument("--runtime", type=_names, metavar="NAMES", help="for directories: minimoe, transformers (default: both)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="for directories (default: as stored)")
    parser.add_argument("--threads", type=_numbers, metavar="N,...", help="of the CPU (default: 1 and all cores)")
    parser.add_argument("--pp", type=_numbers, metavar="N,...", help="tokens to read (default: 512)")
    parser.add_argument("--tg", type=_numbers, metavar="N,...", help="tokens to write (default: 128)")
    parser.add_argument("--depth", type=_numbers, metavar="N,...", default=[0], help="tokens that come before (default: 0)")
    parser.add_argument("--batch", type=_numbers, metavar="N,...", default=[1], help="sequences at once (default: 1)")
    parser.add_argument("--repeats", type=int, metavar="N", help="in each process, after a warm-up (default: 5)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="processes of each variant, even (default: 2)")
    parser.add_argument("--gpu-layers", type=int, default=-1, metavar="N", help="llama.cpp on a GPU: blocks there (default: all)")
    parser.add_argument("--n-cpu-moe", type=int, default=0, metavar="N",
                        help="llama.cpp on a GPU: experts of the first N blocks stay in the host's memory")
    parser.add_argument("--timeout", type=float, default=3600, metavar="S", help="seconds for one process (default: 3600)")
    parser.add_argument("--quick", action="store_true", help="a try that takes seconds; no figure to quote")
    parser.add_argument("--no-models", action="store_true", help="the device alone")
    parser.add_argument("--json", action="store_true", help="print the card only, as one line of JSON")
    parser.add_argument("--save", nargs="?", const="", metavar="NAME", help="keep the card in results/cards/NAME.json")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the card to FILE")
    parser.add_argument("--force", action="store_true", help="overwrite with --save and --out")
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    if args.models and args.models[0] == "compare":
        return _compare(args.models[1:], args.json)
    from ..bench import cards, session, table
    from ..bench.choose import plan

    _check(args)
    about = session.ask_device(args.device)
    chosen = plan(args, about)
    name = _name(args, about["machine"])
    targets = _targets(args, name)
    card = {"schema": cards.SCHEMA, "name": name} | session.run(chosen, about, say=_say)
    for target in targets:
        cards.write(card, target, args.force)
    if not args.json:
        print(table.text(cards.check(card)))
        print("\n".join(["", *(f"kept in {target}" for target in targets)]))
    print(json.dumps(card, ensure_ascii=False))
    return 0


def _numbers(text: str) -> list[int]:
    """"512,2048", with commas as llama-bench has it: after a blank a MODEL may follow."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them, such as 512,2048") from None


def _names(text: str) -> list[str]:
    found = text.split(",")
    if wrong := [name for name in found if name not in ("minimoe", "transformers")]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} must be minimoe or transformers (a .gguf file is for llama.cpp)")
    return list(dict.fromkeys(found))


def _compare(names: list[str], as_json: bool) -> int:
    from ..bench import cards, compare

    if not names:
        there = ", ".join(cards.names()) or "none yet"
        raise UserError(f"compare: name one card or more, by file or by name; results/cards has {there}")
    found = compare.compare([cards.read(name) for name in names])
    print(json.dumps(found, ensure_ascii=False) if as_json else compare.text(found))
    if not as_json:
        print(json.dumps(found, ensure_ascii=False))
    return 0


def _check(args: argparse.Namespace) -> None:
    least = {"threads": 1, "pp": 1, "tg": 2, "depth": 0, "batch": 1}
    for name, low in least.items():
        wrong = [number for number in getattr(args, name) or () if number < low]
        if wrong:
            raise UserError(f"--{name} {wrong[0]}: must be {low} or more")
    if args.rounds < 2 or args.rounds % 2:
        raise UserError(f"--rounds {args.rounds}: must be even and at least 2, so that variants can take turns")
    if args.repeats is not None and args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: must be 1 or more")
    if not args.timeout > 0:
        raise UserError(f"--timeout {args.timeout:g}: must be above 0")
    if args.gpu_layers < -1 or args.n_cpu_moe < 0:
        raise UserError("--gpu-layers and --n-cpu-moe: must be 0 or more (--gpu-layers -1: all)")
    if args.save is not None and args.quick:
        raise UserError("--save: a quick run is no reader card; leave out --quick, or write it with --out FILE")


def _targets(args: argparse.Namespace, name: str) -> list[Path]:
    """Where the card goes. Refused now, not after the measurement."""
    from ..bench import cards

    targets = ([cards.folder() / f"{name}.json"] if args.save is not None else []) + ([args.out] if args.out else [])
    for target in targets:
        if target.is_dir():
            raise UserError(f"{target} is a directory; give the name of a file")
        if target.exists() and not args.force:
            raise UserError(f"{target} exists already; choose another name, or overwrite it with --force")
    return targets


def _name(args: argparse.Namespace, machine: dict[str, Any]) -> str:
    from ..bench import cards

    if args.save:
        if not cards.NAME.fullmatch(args.save):
            raise UserError(f"--save {args.save}: a card's name has lower-case letters, digits, '.', '_' and '-' only")
        return args.save
    return cards.default_name(machine)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
