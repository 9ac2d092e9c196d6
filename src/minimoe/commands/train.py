"""``minimoe train``: a preset on the standard library or a folder of text, from nothing to a model that loads."""
from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import IO, Any

from ..config import PRESETS, HybridConfig
from . import UserError

LOG, RECIPE, MODEL = "log.jsonl", "recipe.json", "model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="small", choices=PRESETS, help="size of the model (default: small)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new directory for model and log")
    parser.add_argument("--data", default="stdlib", help="stdlib (Python's own source files) or a folder of text")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="use this one; default: train one on the data")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="windows a step (default: 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens a window (default: 256)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: 0.002)")
    parser.add_argument("--mtp-weight", type=float, default=0.3, help="weight of the MTP loss; 0: no MTP block")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.epilog = f"DIR gets {LOG} (a line a step), {RECIPE} and {MODEL}/, which transformers opens too."


def run(args: argparse.Namespace) -> int:
    out: Path = args.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; choose a new directory, or delete it")
    result = train_to(out, args)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"validation loss {result['validation_loss']:.3f} nats a token, {result['bits_per_byte']:.3f} bits a byte; "
              f"{result['tokens']:,} tokens in {result['seconds']:.0f} s; model in {out / MODEL}")
    return 0


def train_to(out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train as the arguments say and write the directory. A run that ends early keeps the weights of its last step."""
    import torch

    from ..bench.device import describe, pick_device
    from ..data import Batches, Tokenizer, encode_corpus, load_corpus
    from ..interop import save_hf
    from ..model import HybridLM
    from ..train import TrainOptions, evaluate, train
    from ..train.loop import bits_per_byte

    torch.set_flush_denormal(True)  # numbers below 1e-38 cost a CPU a hundred times the time and change nothing
    config = HybridConfig.preset(args.preset)
    if not args.mtp_weight:
        config = config.replace(num_nextn_predict_layers=0)
    options = TrainOptions(
        steps=args.steps, batch=args.batch, length=args.length, lr=args.lr, mtp_weight=args.mtp_weight,
        precision=args.precision, seed=args.seed,
    )  # fmt: skip
    device = pick_device(args.device)
    quiet = not sys.stderr.isatty()
    corpus = load_corpus(args.data)
    training, validation = corpus.split()
    tokenizer = (Tokenizer.load(args.tokenizer) if args.tokenizer
                 else Tokenizer.train(training.texts, config.vocab_size))
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{args.tokenizer}: {tokenizer.vocab_size} tokens, and preset {args.preset} has room for "
                        f"{config.vocab_size}")
    config = config.replace(
        vocab_size=tokenizer.vocab_size,  # little text makes fewer tokens than there is room for
        tokenizer_fingerprint=tokenizer.fingerprint, bos_token_id=tokenizer.bos_id, pad_token_id=tokenizer.pad_id,
        eos_token_id=(tokenizer.eos_id, tokenizer.special["<|im_end|>"]),
    )  # fmt: skip
    tokens = encode_corpus(training, tokenizer, progress=not quiet)
    held_out = encode_corpus(validation, tokenizer, progress=not quiet)
    for part in (tokens, held_out):  # before anything is written: is there enough text?
        Batches(part, options.batch, options.length)
    torch.manual_seed(args.seed)
    model = HybridLM(config, device=device)

    out.mkdir(parents=True, exist_ok=True)
    recipe = {
        "preset": args.preset, "options": dataclasses.asdict(options), "tokenizer": tokenizer.fingerprint,
        "corpus": {"name": corpus.name, "sha256": corpus.sha256, "files": len(corpus.names), "bytes": corpus.bytes,
                   "held_out_files": len(validation.names), "held_out_bytes": validation.bytes},
        "python": sys.version.split()[0], "machine": describe(device),
    }  # fmt: skip
    cpu = time.process_time()
    with open(out / LOG, "w", encoding="utf-8", newline="\n") as log:
        steps, trouble = _train(train, model, tokens, options, log, not quiet)
    if trouble and not steps:
        (out / LOG).unlink()
        out.rmdir()
        raise UserError(trouble)
    result = {
        "steps": len(steps), "tokens": steps[-1]["tokens"], "seconds": round(steps[-1]["seconds"], 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }  # fmt: skip
    # the weights first: whoever is impatient now loses a figure, not the run
    save_hf(model.eval(), out / MODEL, tokenizer)
    if not trouble:
        loss = evaluate(model, held_out, options.batch, options.length, progress=not quiet)
        result |= {"validation_loss": loss, "bits_per_byte": bits_per_byte(loss, held_out)}
    (out / RECIPE).write_text(json.dumps(recipe | {"result": result}, indent=1) + "\n", encoding="utf-8", newline="\n")
    if trouble:
        raise UserError(f"{trouble}; {len(steps)} of {options.steps} steps were done, and the model as it was is in {out / MODEL}")
    return result


def _train(
    train: Any, model: Any, tokens: Any, options: Any, log: IO[str], progress: bool
) -> tuple[list[dict[str, Any]], str]:
    """Run the loop, writing each step as it comes; the steps, and what ended them early, if anything did."""
    from ..train import TrainError

    steps: list[dict[str, Any]] = []

    def write(step: Any) -> None:
        steps.append(step.to_dict())
        log.write(json.dumps({key: _short(value) for key, value in steps[-1].items()}) + "\n")
        log.flush()

    try:
        train(model, tokens, options, on_step=write, progress=progress)
    except KeyboardInterrupt:
        return steps, "interrupted"
    except TrainError as error:  # the weights are those of the step before
        return steps, str(error)
    return steps, ""


def _short(value: float | int) -> float | int:
    return float(f"{value:.6g}") if isinstance(value, float) else value
