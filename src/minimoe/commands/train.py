"""``minimoe train``: a preset on the standard library or a folder of text, from nothing to a model that loads."""
from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import PRESETS, HybridConfig
from . import UserError

if TYPE_CHECKING:
    from ..data import Tokenizer, Tokens
    from ..train import Meter, Step, TensorBoard, Training
    from ..train.run import Run
    from ..train.world import World


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="small", choices=PRESETS, help="size of the model (default: small)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new directory for model and log")
    parser.add_argument("--data", action="append", metavar="SOURCE[=SHARE]",
                        help="stdlib (Python's own source files, the default), packages (those that this book installs), a "
                        "folder of text, hf:NAME[:CONFIG][:COLUMN] (a Hugging Face dataset, streamed), or tasks (questions "
                        "with checkable answers); again for a mixture, with the share of windows that each gets. Some of the "
                        "first one is held out for validation")
    parser.add_argument("--data-limit", type=int, default=200, metavar="MB", help="read so much of a dataset (default: 200)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="use this one; default: train one on the first source")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="windows a step (default: 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens a window (default: 256)")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a step's batch, for less memory (default: 1)")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing: less memory, more time")
    parser.add_argument("--compile", action="store_true", help="torch.compile where there is a compiler")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: 0.002)")
    parser.add_argument("--decay", type=float, default=0.3, help="last share of the steps, in which it falls (default: 0.3)")
    parser.add_argument("--mtp-weight", type=float, default=0.3, help="weight of the MTP loss; 0: no MTP block")
    parser.add_argument("--balance", type=float, default=1e-3, metavar="RATE",
                        help="how far a router's correction bias moves a step (default: 0.001)")
    parser.add_argument("--balance-loss", type=float, default=0.0, metavar="WEIGHT",
                        help="weight of a loss on routers that prefer experts (default: 0; Nemotron 3 has 0.0001)")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"),
                        help="started by torchrun, as several processes (torchrun --nproc-per-node 2 -m minimoe train ...): ddp, a "
                        "whole model in each (the default there), or fsdp, a part of it in each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100, metavar="N",
                        help="write a checkpoint every N steps, and keep the last two (default: 100; 0: only at the end)")
    parser.add_argument("--resume", action="store_true", help="go on from DIR's newest checkpoint; give the same options")
    parser.add_argument("--tensorboard", action="store_true", help="curves for TensorBoard, in DIR/tensorboard")
    parser.add_argument("--mfu", action="store_true",
                        help="measure what the device can multiply (a few seconds) and say which share of it training used")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.epilog = ("DIR gets log.jsonl (a line a step), recipe.json, checkpoints/ and model/, which transformers opens too. "
                     "After a crash or Ctrl-C, the same command with --resume goes on.")


def run(args: argparse.Namespace) -> int:
    from ..train.trouble import out_of_memory
    from ..train.world import processes

    try:
        with processes(args.device, args.parallel) as world:
            result = train_to(args.out, args, world)
    except (RuntimeError, MemoryError) as error:  # outside of a step, where a smaller micro-batch would not help
        if not out_of_memory(error):
            raise
        raise UserError("out of memory; choose a smaller preset, batch or length, or a device with more; checkpoints that "
                        f"are in {args.out} can be gone on from with --resume") from None
    if not world.first:
        return 0
    if args.json:
        print(json.dumps(result))
    else:
        print(f"validation loss {result['validation_loss']:.3f} nats a token, {result['bits_per_byte']:.3f} bits a byte; "
              f"{result['tokens']:,} tokens in {result['seconds']:.0f} s{_pace(result)}; model in {args.out / 'model'}")
    return 0


def _pace(result: dict[str, Any]) -> str:
    """Speed and memory in words, as far as they are known."""
    texts = {"tokens_per_second": "{:,.0f} tokens/s", "mfu": "{:.1%} of the measured matmul peak",
             "peak_memory_bytes": "{:,} bytes of memory at most"}  # fmt: skip
    said = [text.format(result[key]) for key, text in texts.items() if result.get(key)]
    return f" ({', '.join(said)})" if said else ""


def train_to(out: Path, args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Train as the arguments say and write the directory. A run that ends early keeps the weights of its last step.

    Of several processes the first one writes the model and gives the result, the others {}.
    """
    import torch

    from ..bench.device import describe
    from ..data.sources import load_sources
    from ..model import HybridLM
    from ..train import Training, TrainOptions
    from ..train.compiling import missing_compiler
    from ..train.run import Run
    from ..train.tensorboard import summary_writer

    torch.set_flush_denormal(True)  # numbers below 1e-38 cost a CPU a hundred times the time and change nothing
    quiet = not (world.first and sys.stderr.isatty())
    say = _say if world.first else _say_nothing
    config = HybridConfig.preset(args.preset)
    if not args.mtp_weight:
        config = config.replace(num_nextn_predict_layers=0)
    if args.compile and (missing := missing_compiler(world.device)):
        say(f"training goes on without torch.compile: {missing}")
        args.compile = False
    options = TrainOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainOptions)
                              if hasattr(args, field.name)})  # fmt: skip
    if args.save_every < 0:
        raise UserError(f"--save-every {args.save_every}: must be 0 or above")
    if args.tensorboard:
        summary_writer()  # raises if it is not installed
    files = Run(out, args.resume, world=world)
    if args.data_limit < 1:
        raise UserError(f"--data-limit {args.data_limit}: must be 1 or more")
    sources = load_sources(args.data or ["stdlib"], config.vocab_size, args.tokenizer, args.seed, args.data_limit * 1_000_000,
                           progress=not quiet)  # fmt: skip
    tokenizer = sources.tokenizer
    config = config.replace(
        vocab_size=tokenizer.vocab_size,  # little text makes fewer tokens than there is room for
        tokenizer_fingerprint=tokenizer.fingerprint, bos_token_id=tokenizer.bos_id, pad_token_id=tokenizer.pad_id,
        eos_token_id=(tokenizer.eos_id, tokenizer.special["<|im_end|>"]),
    )  # fmt: skip
    check_held_out(sources.held_out, options.length, sources.about[-1]["files"])
    torch.manual_seed(args.seed)
    training = Training(HybridLM(config, device=world.device), sources.tokens, options, world)
    recipe = {
        "preset": args.preset, "options": dataclasses.asdict(options), "tokenizer": tokenizer.fingerprint,
        "sources": sources.about, "python": sys.version.split()[0], "machine": describe(world.device),
        "processes": world.size, "parallel": world.parallel,
    }  # fmt: skip
    try:
        said = files.start(training, recipe, say)
        if args.resume:
            say(said)
        before = files.result or {}
        if training.next_step >= options.steps and before.get("steps") == training.next_step and "validation_loss" in before:
            say(f"nothing to do: {training.next_step} steps are done; give more --steps to go on")
            return before
        return _train(files, training, args, sources.held_out, tokenizer, quiet)
    finally:
        files.close()


def _train(
    files: Run, training: Training, args: argparse.Namespace, held_out: Tokens, tokenizer: Tokenizer, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    """Do the steps; write checkpoint, model and result."""
    from ..interop import save_hf
    from ..train import Diverged, OutOfMemory, bits_per_byte, evaluate
    from ..train.meter import Meter, matmul_peak
    from ..train.run import MODEL
    from ..train.tensorboard import FOLDER, TensorBoard

    meter = Meter(training, matmul_peak(training) if args.mfu else None)
    board = TensorBoard(files.out / FOLDER, training, meter) if args.tensorboard and training.world.first else None
    options, trouble, diverged = training.options, "", False
    try:
        if not files.go(training, args.save_every, _watched(meter, board), progress=not quiet):
            trouble = "interrupted"
    except OutOfMemory as error:
        trouble = str(error)
    except Diverged as error:
        good = files.checkpoints.last_before(training.next_step)
        trouble, diverged = f"{error}; {f'the last good checkpoint is {good}' if good else 'there is no good checkpoint yet'}", True
    finally:
        if board:
            board.close()
    if not training.next_step:
        training.close()
        files.discard()
        raise UserError(trouble)
    if not diverged:  # else going on from here would lead there again
        files.save(training)
    training.close()
    training.world.leave()
    if not training.world.first:
        return {}
    result = {
        "steps": training.next_step, "tokens": training.next_step * options.batch * options.length,
        "seconds": round(training.seconds, 1), "cpu_seconds": round(training.cpu_seconds, 1),
    } | meter.result()  # fmt: skip
    if args.mfu:
        result["mfu"] = _mfu(meter)
    # the weights first: whoever is impatient now loses a figure, not the run
    model = files.out / MODEL
    try:
        save_hf(training.model.eval(), model, tokenizer)
    except OSError as error:
        raise UserError(f"{model} could not be written ({error.strerror}); make room and go on with --resume") from None
    if not trouble:
        rows = training.rows // training.accumulate  # no more windows at once than there was room for
        loss = evaluate(training.model, held_out, rows, options.length, documents=options.documents, progress=not quiet)
        result |= {"validation_loss": loss, "bits_per_byte": bits_per_byte(loss, held_out)}
    files.finish(result)
    if trouble:
        raise UserError(f"{trouble}; {training.next_step} of {options.steps} steps were done, and the model as it was is in "
                        f"{model}" + ("" if diverged else "; the same command with --resume goes on"))
    return result


def _watched(meter: Meter, board: TensorBoard | None) -> Callable[[Step], None]:
    def on_step(step: Step) -> None:
        meter(step)
        if board:
            board(step)

    return on_step


def _mfu(meter: Meter) -> float | None:
    from ..train import TrainError

    try:
        return meter.mfu and round(meter.mfu, 4)
    except TrainError as error:  # the run is none the worse for it
        _say(str(error))
        return None


def check_held_out(held_out: Tokens, length: int, files: int) -> None:
    """Is there enough text to validate on? Asked before anything is written."""
    from ..data import Batches, CorpusError

    try:
        Batches(held_out, 1, length)
    except CorpusError as error:
        raise UserError(f"validation text ({files} of the first source's files): {error}") from None


def _say(line: str) -> None:
    print(f"minimoe: {line}", file=sys.stderr)


def _say_nothing(line: str) -> None:
    pass
