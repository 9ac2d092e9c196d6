"""``minimoe generate MODEL``: continue a text, token by token."""
from __future__ import annotations

import argparse
import codecs
import itertools
import json
import sys
from typing import Any

from . import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face directory, what minimoe train wrote, or a .gguf file")
    parser.add_argument("--prompt", help="text to continue (default: standard input)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--json", action="store_true", help="print ids, text and timings as JSON")


def run(args: argparse.Namespace) -> int:
    prompt = args.prompt if args.prompt is not None else _standard_input()
    if not prompt:
        raise UserError("the prompt is empty; give --prompt TEXT")
    result = _generate(prompt, args)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"\n{len(result['ids'])} tokens, {result['tokens_per_second'] or 0:.1f} a second", file=sys.stderr)
    return 0


def _standard_input() -> str:
    try:
        return sys.stdin.read() if sys.stdin else ""
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is no text in {error.encoding}; give --prompt TEXT") from None


def _generate(prompt: str, args: argparse.Namespace) -> dict[str, Any]:
    from ..bench.device import pick_device
    from ..generation import generate
    from ..interop import load_model

    device = pick_device(args.device)
    model, tokenizer = load_model(args.model, device=device)
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come in several tokens
    pieces = itertools.chain([prompt], itertools.repeat(""))

    def show(row: int, token: int) -> None:
        if not args.json:
            print(next(pieces) + text.decode(tokenizer.token_bytes(token)), end="", flush=True)

    try:
        made = generate(
            model.eval(), [tokenizer.encode(prompt)], max_new_tokens=args.max_new_tokens, temperature=args.temperature,
            top_p=args.top_p, top_k=args.top_k, seed=args.seed, on_token=show,
        )  # fmt: skip
    except UnicodeEncodeError as error:
        raise UserError(f"this terminal cannot show all characters in {error.encoding}; set PYTHONIOENCODING=utf-8") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    if not args.json:
        print(text.decode(b"", final=True), end="")  # a character that was begun and never ended
    ids, timings = made.ids[0], made.timings
    return {
        "prompt": prompt, "ids": ids, "text": tokenizer.decode(ids), "finish_reason": made.finish_reason[0],
        "prefill_seconds": timings.prefill_s,
        "tokens_per_second": timings.tokens_per_second if timings.step_s else None,
    }  # fmt: skip
