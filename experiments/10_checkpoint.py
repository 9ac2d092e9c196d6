"""What the shipped model knows: as a compressor, as a writer of Python, as a solver of tasks, as its own drafter.

    python experiments/10_checkpoint.py [--model DIR]        about 8 minutes on one core, 3 GiB of memory

Writes results/10_checkpoint.json, for checkpoints/small only. Text is the standard library's held-out files; tasks are
questions that no training sees. Shares come with Wilson's 95 % interval.

compression  bits a byte of the held-out files: the model; gzip -9 and xz -9e, of these files alone and after the
             training files (size of both less size of the training files); 5-grams over the same tokens and over bytes
samples      share of 100 continuations of held-out files that are Python up to their last complete line, and of their
             beginnings that a Python file could have; beside real text cut at the same place, and a 5-gram's samples
tasks        share solved with a thought and without, by size, and how often the thought is right
drafts       how many tokens of the MTP block are the trunk's own, up to four in a chain, along held-out code and along
             replies to held-out tasks
along        losses of trunk and MTP block on held-out code and tasks, and how the routers spread their choices
"""
from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minimoe import HybridLM, generate
from minimoe.bench.report import write_result
from minimoe.data import Corpus, Tokenizer, Tokens, encode_corpus, load_corpus
from minimoe.data.batches import in_order, split_documents
from minimoe.data.ngram import NGram
from minimoe.data.syntax import can_go_on, complete_lines, parses
from minimoe.data.tasks import TASKS, Example, prompt
from minimoe.interop import load_model
from minimoe.train import bits_per_byte, evaluate
from minimoe.train.acceptance import Acceptance, acceptance
from minimoe.train.router_load import counted_choices, load
from minimoe.train.scoring import Reply, ask, distinct, wilson

ROOT = Path(__file__).parents[1]
SHIPPED, RESULT = ROOT / "checkpoints" / "small", ROOT / "results" / "10_checkpoint.json"
SEED, LENGTH, LONG, ORDER = 10, 512, 2048, 5
SAMPLES, NEW, CONTEXT, TEMPERATURE = 100, 200, 256, 0.8
ASKED, DEPTH = 240, 4
ENOUGH, GAIN = 0.8, 0.2  # what a thought should bring at least one task to, and by how much


def share(right: int, asked: int) -> dict[str, Any]:
    low, high = wilson(right, asked)
    return {"right": right, "asked": asked, "share": right / asked if asked else None, "low": low, "high": high}


# ---------------------------------------------------------------------- compression
def compression(model: HybridLM, tokens: Tokens, held_out: Tokens, training: Corpus, validation: Corpus) -> dict[str, Any]:
    """Bits a byte; the first token of each file is nobody's to guess, and of 512-token windows each starts empty."""
    loss, long = (evaluate(model, held_out, max(1, 8 * LENGTH // length), length) for length in (LENGTH, LONG))
    seen, new = "".join(training.texts).encode(), "".join(validation.texts).encode()
    programs: dict[str, Callable[[bytes], bytes]] = {
        "gzip -9": lambda text: gzip.compress(text, 9, mtime=0),
        # its dictionary of 64 MiB holds the whole training text; gzip looks back 32 KiB
        "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    numbers: dict[str, Any] = {
        "model": {"loss": loss, "bits_per_byte": bits_per_byte(loss, held_out), "length": LENGTH,
                  "long": {"loss": long, "bits_per_byte": bits_per_byte(long, held_out), "length": LONG}},
    }  # fmt: skip
    for name, squeeze in programs.items():
        numbers[name] = {"alone": 8 * len(squeeze(new)) / len(new),
                         "after_training": 8 * (len(squeeze(seen + new)) - len(squeeze(seen))) / len(new)}  # fmt: skip
    by_token = counted_loss(five_gram(tokens, model.config.vocab_size), held_out, model.config.eos_token_ids[0])
    numbers["5-gram over tokens"] = {"loss": by_token, "bits_per_byte": bits_per_byte(by_token, held_out), "order": ORDER}
    end = 256
    by_byte = NGram(byte_ids(training, end), 257, ORDER).log_probabilities(byte_ids(validation, end))
    numbers["5-gram over bytes"] = {"bits_per_byte": float(-by_byte.sum()) / math.log(2) / len(new), "order": ORDER}
    return numbers


def five_gram(tokens: Tokens, vocabulary: int) -> NGram:
    return NGram(tokens.ids, vocabulary, ORDER)


def counted_loss(model: NGram, held_out: Tokens, end_id: int) -> float:
    """Of the same targets as the model's: whole windows, without each file's first token."""
    targets = (len(held_out) - 1) // LENGTH * LENGTH
    log_p_N = model.log_probabilities(held_out.ids[: targets + 1])
    return float(-log_p_N[held_out.ids[:targets] != end_id].mean())


def byte_ids(corpus: Corpus, end: int) -> np.ndarray:
    parts = [part for text in corpus.texts for part in (np.frombuffer(text.encode(), np.uint8).astype(np.int64), [end])]
    return np.concatenate(parts)


# ---------------------------------------------------------------------- samples
def beginnings(corpus: Corpus, count: int) -> list[tuple[str, str]]:
    """(beginning, rest) of files, cut before a line that starts a function: each file's first, then each one's second …"""
    found: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for text in corpus.texts:
        at = turn = 0
        for line in text.splitlines(keepends=True):
            if at and line.lstrip().startswith(("def ", "async def ")):
                found[turn].append((text[:at], text[at:]))
                turn += 1
            at += len(line)
    return [pair for turn in sorted(found) for pair in found[turn]][:count]


def judged(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Text that repeats one harmless line is Python too: so also how many of a sample's lines, blank ones apart, are
    different ones, on average over samples that have any."""
    texts = [complete_lines(begin + new) for begin, new in pairs]
    written = [[line for line in complete_lines(new).splitlines() if line.strip()] for _, new in pairs]
    different = [len(set(lines)) / len(lines) for lines in written if lines]
    return {
        "parses": share(sum(map(parses, texts)), len(texts)), "can_go_on": share(sum(map(can_go_on, texts)), len(texts)),
        "lines": sum(map(len, written)) / len(pairs), "different_lines": sum(different) / max(1, len(different)),
    }  # fmt: skip


def samples(model: HybridLM, tokenizer: Tokenizer, tokens: Tokens, validation: Corpus) -> dict[str, Any]:
    begun = beginnings(validation, SAMPLES)
    prompts = [tokenizer.encode(begin)[-CONTEXT:] for begin, _ in begun]
    numbers, end = {}, model.config.eos_token_ids
    counting, random = five_gram(tokens, model.config.vocab_size), np.random.default_rng(SEED)

    def text(ids: Sequence[int]) -> str:
        return tokenizer.decode([i for i in ids if i not in end])

    def judge(name: str, written: Sequence[Sequence[int]]) -> None:
        pairs = [(begin, text(ids)) for (begin, _), ids in zip(begun, written, strict=True)]
        numbers[name] = judged(pairs) | {"first": pairs[0][1]}
        print(name, {key: value["share"] if isinstance(value, dict) else value for key, value in numbers[name].items()
                     if key != "first"}, flush=True)  # fmt: skip

    judge("real text", [tokenizer.encode(rest)[:NEW] for _, rest in begun])
    for name, temperature in ((f"model, temperature {TEMPERATURE}", TEMPERATURE), ("model, greedy", 0.0)):
        judge(name, generate(model, prompts, NEW, temperature, seed=SEED).ids)
    for name, temperature in ((f"5-gram, temperature {TEMPERATURE}", TEMPERATURE), ("5-gram, greedy", 0.0)):
        judge(name, [counting.sample(ids, NEW, temperature, random, end) for ids in prompts])
    return numbers


# ---------------------------------------------------------------------- tasks
def by_size(replies: Sequence[Reply]) -> dict[str, Any]:
    groups: dict[int, list[Reply]] = defaultdict(list)
    for reply in replies:
        groups[reply.example.size].append(reply)
    return {str(size): share(sum(r.solved for r in groups[size]), len(groups[size])) for size in sorted(groups)}


def scored(replies: Sequence[Reply]) -> dict[str, Any]:
    return share(sum(r.solved for r in replies), len(replies)) | {
        "by_size": by_size(replies), "finished": sum(r.finished for r in replies) / len(replies),
        "tokens": sum(r.tokens for r in replies) / len(replies),
    }  # fmt: skip


def thoughts(replies: Sequence[Reply]) -> dict[str, Any]:
    """How often the thought is right, to the letter, and how often the answer is right if it is, and if it is not."""
    right = [r for r in replies if r.thought_right]
    wrong = [r for r in replies if not r.thought_right]
    numbers = {"right": share(len(right), len(replies)), "solved_if_right": share(sum(r.solved for r in right), len(right)),
               "solved_if_wrong": share(sum(r.solved for r in wrong), len(wrong))}  # fmt: skip
    if replies[0].example.task == "calculate":  # its thought ends in a result, right or wrong: is that the answer given?
        ends = [(r.thought.rsplit("= ", 1)[-1], r.answer) for r in replies if r.thought is not None]
        numbers["answer_is_the_thoughts"] = share(sum(a == b for a, b in ends), len(ends))
    return numbers


def tasks(model: HybridLM, tokenizer: Tokenizer, questions: dict[str, list[Example]]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for task, asked in questions.items():
        without, with_ = ask(model, tokenizer, asked, thinking=False), ask(model, tokenizer, asked, thinking=True)
        one = {"without": scored(without), "with": scored(with_), "thought": thoughts(with_),
               "thought_unasked": sum(r.thought is not None for r in without), "example": with_[0].text}  # fmt: skip
        one["gain"] = one["with"]["share"] - one["without"]["share"]
        one["enough"] = one["with"]["share"] >= ENOUGH and one["gain"] >= GAIN
        numbers[task] = one
        print(task, *(f"{key} {one[key]['share']:.3f} ({one[key]['tokens']:.0f} tokens)" for key in ("without", "with")),
              f"thought right {one['thought']['right']['share']:.3f}", flush=True)  # fmt: skip
    return numbers


# ---------------------------------------------------------------------- drafts and routers
def code_rows(validation: Corpus, tokenizer: Tokenizer, length: int, most: int) -> torch.Tensor:
    """[B, length] stretches of held-out files, each within one file, evenly from all."""
    rows = []
    for text in validation.texts:
        ids = tokenizer.encode(text)
        rows += [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    return torch.tensor(rows[:: math.ceil(len(rows) / most)])


def conversations(tokenizer: Tokenizer, questions: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Finished conversations with their thoughts, padded behind; and which of their tokens are the model's own."""
    rows = [tokenizer.encode_chat(e.messages(True), add_generation_prompt=False) for e in questions]
    given = [len(prompt(e, tokenizer, True)) for e in questions]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_id] * (longest - len(row)) for row in rows])
    position = torch.arange(longest)
    ends = torch.tensor([row.index(tokenizer.special["<|im_end|>"], n) for row, n in zip(rows, given, strict=True)])
    # a reply's first token is chosen at the prompt's last one, and nothing is chosen at its own end
    return ids, (position >= torch.tensor(given)[:, None] - 1) & (position < ends[:, None])


def drafted(found: Acceptance) -> dict[str, Any]:
    starts = sum(found.lengths)
    return {"given": [share(*pair) for pair in found.given], "any": [share(*pair) for pair in found.any],
            "lengths": found.lengths, "mean_length": found.mean_length, "starts": starts,
            "positions": share(*found.positions)}  # fmt: skip


def in_a_row(tokenizer: Tokenizer, questions: Sequence[Example]) -> Tokens:
    """Finished conversations as training has them, an end-of-text id after each: a round of all tasks with thoughts, then
    a round without."""
    rows = [[*tokenizer.encode_chat(e.messages(n // len(TASKS) % 2 == 0), add_generation_prompt=False), tokenizer.eos_id]
            for n, e in enumerate(questions)]  # fmt: skip
    return Tokens(np.concatenate(rows), sum(len(tokenizer.decode(row[:-1]).encode()) for row in rows))


def along(model: HybridLM, tokens: Tokens, most: int = 8) -> dict[str, Any]:
    """Losses of trunk and MTP block on the same windows, nats a token, and every router's load meanwhile."""
    both, counted = [], []
    with counted_choices(model) as counts:
        for ids, targets in list(in_order(tokens, 8, LENGTH))[:most]:
            segments, targets = split_documents(ids, targets, model.config.eos_token_ids[0])
            both.append([loss.item() for loss in model.losses(ids, targets, segment_ids=segments)])
            counted.append(int((targets != -100).sum()))
    trunk, block = np.average(both, axis=0, weights=counted)
    loads = {layer: load(counts_E) for layer, counts_E in counts.items()}
    return {"trunk": float(trunk), "mtp": float(block), "tokens": sum(counted), "routers": {
        layer: {"shares": found.shares, "peak": found.peak, "entropy": found.entropy, "experts_at_work": found.experts_at_work}
        for layer, found in loads.items()}}  # fmt: skip


# ---------------------------------------------------------------------- everything
def measure(directory: Path) -> tuple[dict[str, Any], dict[str, str]]:
    model, tokenizer = load_model(directory, dtype=torch.float32)
    model.eval()
    training, validation = load_corpus().split()
    tokens, held_out = encode_corpus(training, tokenizer), encode_corpus(validation, tokenizer)
    questions = {task: distinct(ASKED, task, SEED) for task in TASKS}
    numbers: dict[str, Any] = {
        "threads": 1, "seed": SEED, "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": {"training_sha256": training.sha256, "held_out_sha256": validation.sha256, "held_out_files": len(validation.names),
                   "held_out_bytes": held_out.bytes, "held_out_tokens": len(held_out)},
    }  # fmt: skip
    seconds = numbers["cpu_seconds"] = {}

    def part(name: str, work: Callable[[], Any]) -> None:
        start = time.process_time()
        numbers[name] = work()
        seconds[name] = round(time.process_time() - start, 1)
        print(f"{name}: {seconds[name]} CPU seconds", flush=True)

    part("compression", lambda: compression(model, tokens, held_out, training, validation))
    part("samples", lambda: samples(model, tokenizer, tokens, validation))
    part("tasks", lambda: tasks(model, tokenizer, questions))
    code = code_rows(validation, tokenizer, LENGTH, 64)
    talk, replied = conversations(tokenizer, [e for asked in questions.values() for e in asked[:64]])
    part("drafts", lambda: {
        "code": drafted(acceptance(model, code, DEPTH)),
        "tasks": drafted(acceptance(model, talk, DEPTH, every=4, counted=replied)),
    })  # fmt: skip
    mixed = [asked[n] for n in range(ASKED) for asked in questions.values()]
    part("along", lambda: {"code": along(model, held_out), "tasks": along(model, in_a_row(tokenizer, mixed))})
    return numbers, card(numbers)


def card(numbers: dict[str, Any]) -> dict[str, str]:
    squeezed, written = numbers["compression"], numbers["samples"]
    def percent(counted: dict[str, Any]) -> str:
        return f"{counted['share']:.0%}"

    lines = {
        "held-out text": f"{squeezed['model']['bits_per_byte']:.2f} bits a byte",
        "beside it": f"xz {squeezed['xz -9e']['after_training']:.2f}, gzip {squeezed['gzip -9']['after_training']:.2f} after the "
        f"training text ({squeezed['xz -9e']['alone']:.2f} and {squeezed['gzip -9']['alone']:.2f} alone), "
        f"5-gram {squeezed['5-gram over tokens']['bits_per_byte']:.2f}",
        "samples that could be Python": f"{percent(written[f'model, temperature {TEMPERATURE}']['can_go_on'])}, "
        f"5-gram {percent(written[f'5-gram, temperature {TEMPERATURE}']['can_go_on'])}, "
        f"real text {percent(written['real text']['can_go_on'])}",
    }
    for task, found in numbers["tasks"].items():
        lines[f"{task}, with a thought"] = f"{percent(found['with'])}, without {percent(found['without'])}"
    taken = (f"{found['mean_length']:.1f} in {name}" for name, found in numbers["drafts"].items())
    lines[f"drafts taken in a row, of {DEPTH}"] = ", ".join(taken)
    peaks = [found["peak"] for found in numbers["along"]["code"]["routers"].values()]
    lines["busiest expert, code"] = f"{min(peaks):.1f} to {max(peaks):.1f} times its share, {len(peaks)} routers"
    enough = [task for task, found in numbers["tasks"].items() if found["enough"]]
    lines["a thought is worth it in"] = ", ".join(enough) or f"no task: none reaches {ENOUGH:.0%} and {GAIN:.0%} above no thought"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=SHIPPED, metavar="DIR", help="another model; its numbers are printed only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write another model's numbers")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    numbers, lines = measure(args.model)
    print(*(f"{key}: {value}" for key, value in lines.items()), sep="\n")
    path = args.out or (RESULT if args.model.resolve() == SHIPPED else None)
    if path:
        print(write_result(path, numbers, time.perf_counter() - start, lines))
    else:
        print(json.dumps(numbers))


if __name__ == "__main__":
    with torch.no_grad():
        main()
