"""A model trained for a minute, in three programs: how far apart are they, and how far off is each of four mistakes?

    python experiments/05_one_minute.py [--steps N]        about 4 minutes on one core, 1 GiB of memory

Writes results/05_one_minute.json. Three seeds, each a model of one million weights: trained on the standard library,
saved for transformers and llama.cpp, and read there. Differences are the largest of all logits of 256 held-out tokens,
relative to the range of the right logits (greatest less least).

losses     nats a token on held-out text, of the model and of two tables of counts: single tokens, and pairs
programs   transformers; llama.cpp with exact settings, as its Python binding comes, and with flash attention
mistakes   what minimoe computes with one deliberate mistake, against minimoe without it
greedy     whether all programs continue three prompts by the same 64 tokens
mtp        draft logits of llama.cpp against both of minimoe's final norms of the MTP block
"""
from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from minimoe import HybridConfig, HybridLM, generate
from minimoe.bench.report import write_result
from minimoe.data import Tokenizer, Tokens, encode_corpus, load_corpus
from minimoe.interop import save_gguf, save_hf
from minimoe.layers import Attention, Mamba2, MoE
from minimoe.runtime import llamacpp
from minimoe.runtime.mtp import LlamaMTP, shift
from minimoe.train import TrainOptions, bits_per_byte, evaluate, train

RESULT = Path(__file__).parents[1] / "results" / "05_one_minute.json"
SEEDS, STEPS, LENGTH, NEW = (0, 1, 2), 300, 256, 64
EVALUATED = 40  # batches of held-out text
PROMPTS = ("import ", "class ", "    def __init__(self, ")
SHAPE = dict(
    vocab_size=512, hidden_size=128, head_dim=32, mamba_head_dim=32, ssm_state_size=32, chunk_size=32,
    moe_latent_size=64, moe_intermediate_size=128, moe_shared_expert_intermediate_size=128,
)  # fmt: skip


def counts(tokens: Tokens, held_out_N: np.ndarray, vocabulary: int) -> dict[str, float]:
    """Held-out loss of tables that only count: single tokens; pairs, filled up with 50 tokens' worth of singles."""
    first, second = held_out_N[:-1], held_out_N[1:]
    single_V = np.bincount(tokens.ids, minlength=vocabulary) + 1.0
    single_V /= single_V.sum()
    pair_VV = np.zeros((vocabulary, vocabulary))
    np.add.at(pair_VV, (tokens.ids[:-1], tokens.ids[1:]), 1)
    pair_VV = (pair_VV + 50 * single_V) / (pair_VV.sum(1, keepdims=True) + 50)
    return {"log_V": math.log(vocabulary), "single": float(-np.log(single_V[second]).mean()),
            "pairs": float(-np.log(pair_VV[first, second]).mean())}


# ---------------------------------------------------------------------- the mistakes: each spoils one mixer
def one_rms(mamba: Mamba2) -> None:
    mamba.norm.groups = 1


def clamped(mamba: Mamba2) -> None:
    mamba.dt_limit = (0.001, math.inf)


def rotary(attention: Attention) -> None:
    """Queries and keys turned by their position, as most Transformers do (base 10,000)."""
    def turn(_: nn.Module, __: Any, out_BLI: Tensor) -> Tensor:
        a, b = out_BLI.unflatten(-1, (-1, attention.head_dim)).chunk(2, -1)
        angle = torch.arange(a.shape[1])[:, None] * 10_000.0 ** (-torch.arange(a.shape[-1]) / a.shape[-1])
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    attention.q_proj.register_forward_hook(turn)
    attention.k_proj.register_forward_hook(turn)


def biased(moe: MoE) -> None:
    """Weights from the scores that chose, bias included."""
    def weigh(gate: nn.Module, _: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        experts_TK, _, scores_TE = out
        weights_TK = (scores_TE + gate.e_score_correction_bias).gather(-1, experts_TK)
        return experts_TK, weights_TK / weights_TK.sum(-1, keepdim=True) * gate.scale, scores_TE

    moe.gate.register_forward_hook(weigh)


MISTAKES: dict[str, tuple[type[nn.Module], Callable[[Any], None]]] = {
    "one RMS for all groups": (Mamba2, one_rms),
    "RoPE in attention": (Attention, rotary),
    "dt clamped at 0.001": (Mamba2, clamped),
    "bias in the weights": (MoE, biased),
}


def spoiled(model: HybridLM, name: str) -> HybridLM:
    """A copy of the model that makes the mistake in every block of the kind."""
    other = copy.deepcopy(model)
    kind, spoil = MISTAKES[name]
    for block in other.model.layers:
        if isinstance(block.mixer, kind):
            spoil(block.mixer)
    return other


# ---------------------------------------------------------------------- one seed
def one_seed(seed: int, steps: int, tokenizer: Tokenizer, tokens: Tokens, held_out: Tokens, folder: Path) -> dict[str, Any]:
    config = HybridConfig.preset(
        "tiny", **SHAPE, tokenizer_fingerprint=tokenizer.fingerprint, bos_token_id=tokenizer.bos_id,
        pad_token_id=tokenizer.pad_id, eos_token_id=(tokenizer.eos_id, tokenizer.special["<|im_end|>"]),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = HybridLM(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # zeros would hide a mistake; in real training a rule sets them
            buffer.uniform_(-0.05, 0.05)
    cpu = time.process_time()
    with torch.enable_grad():
        log = train(model, tokens, TrainOptions(steps=steps, length=128, lr=4e-3, precision="float32", seed=seed), progress=True)
    cpu = time.process_time() - cpu
    model.eval()
    loss = evaluate(model, held_out, length=128, limit=EVALUATED)
    save_hf(model, folder / f"hf-{seed}", tokenizer)
    save_gguf(model, folder / f"{seed}.gguf", tokenizer)
    return {
        "loss": loss, "bits_per_byte": bits_per_byte(loss, held_out), "cpu_seconds": cpu,
        "curve": [statistics.fmean(s.loss for s in log[at : at + 10]) for at in range(0, steps, 10)],
        "mtp_curve": [statistics.fmean(s.mtp_loss for s in log[at : at + 10]) for at in range(0, steps, 10)],
    } | compared(model, tokenizer, held_out.ids[:LENGTH].tolist(), folder / f"hf-{seed}", folder / f"{seed}.gguf")  # fmt: skip


def compared(model: HybridLM, tokenizer: Tokenizer, ids: list[int], directory: Path, gguf: Path) -> dict[str, Any]:
    ids_BL = torch.tensor([ids])
    right = model(ids_BL)
    right_LV, span = right.logits[0], float(right.logits.max() - right.logits.min())

    def off(logits: Any) -> dict[str, float]:
        other_LV = torch.as_tensor(logits)
        return {"off": float((other_LV - right_LV).abs().max()) / span,
                "same_argmax": float((other_LV.argmax(-1) == right_LV.argmax(-1)).double().mean())}

    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    exact = llamacpp.load(gguf, exact=True, mtp=True)
    as_it_comes, flash = llamacpp.load(gguf), llamacpp.load(gguf, flash_attn=True)
    programs = {
        "transformers": off(theirs(ids_BL).logits[0]),
        "llama.cpp, exact": off(llamacpp.logits(exact, ids)),
        "llama.cpp, as it comes": off(llamacpp.logits(as_it_comes, ids)),
        "llama.cpp, flash attention": off(llamacpp.logits(flash, ids)),
    }
    mistakes = {name: off(spoiled(model, name)(ids_BL).logits[0]) for name in MISTAKES}

    same = []
    for prompt in map(tokenizer.encode, PROMPTS):
        hf = theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
        ours = generate(model, [prompt], max_new_tokens=NEW).ids[0]
        same.append(ours == hf == llamacpp.greedy(exact, prompt, NEW).ids == llamacpp.greedy(as_it_comes, prompt, NEW).ids)

    before_BLD = F.pad(right.hidden_BLD[:, :-1], (0, 0, 1, 0))
    with LlamaMTP(exact) as block:
        drafts_LV = torch.as_tensor(block(ids, shift(right.hidden_BLD[0].numpy()))[0])
    mtp = {}
    for norm in ("rmsnorm", "layernorm"):
        other = HybridLM(model.config.replace(mtp_final_norm=norm))
        other.load_state_dict(model.state_dict())
        ours_LV = other.draft(ids_BL, before_BLD)[0][0]
        mtp[norm] = {"off": float((drafts_LV - ours_LV).abs().max() / (ours_LV.max() - ours_LV.min())),
                     "same_argmax": float((drafts_LV.argmax(-1) == ours_LV.argmax(-1)).double().mean())}
    for llama in (exact, as_it_comes, flash):
        llama.close()
    return {"programs": programs, "mistakes": mistakes, "greedy_same": same, "mtp": mtp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer, to try the script; nothing is written then")
    steps = parser.parse_args().steps
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    training, validation = load_corpus().split()
    tokenizer = Tokenizer.train(training.texts, SHAPE["vocab_size"])
    tokens, held_out = encode_corpus(training, tokenizer), encode_corpus(validation, tokenizer)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            runs.append(one_seed(seed, steps, tokenizer, tokens, held_out, Path(folder)))
            print(seed, {key: value for key, value in runs[-1].items() if "curve" not in key}, flush=True)
    seconds = [run["cpu_seconds"] for run in runs]
    losses = [run["loss"] for run in runs]
    table = counts(tokens, held_out.ids[: EVALUATED * TrainOptions().batch * 128 + 1], SHAPE["vocab_size"])
    numbers = {
        "threads": 1, "seeds": list(SEEDS), "steps": steps, "batch": TrainOptions().batch, "length": 128,
        "tokens": steps * TrainOptions().batch * 128, "corpus_bytes": tokens.bytes,
        "parameters": sum(p.numel() for p in HybridLM(HybridConfig.preset("tiny", **SHAPE), device="meta").parameters()),
        "losses": table, "runs": runs,
    }  # fmt: skip
    card = {
        "training, 1 thread": f"{min(seconds):.0f} to {max(seconds):.0f} CPU seconds",
        "tokens a second": f"{numbers['tokens'] / statistics.median(seconds):,.0f}",
        "held-out loss, 3 seeds": f"{min(losses):.2f} to {max(losses):.2f} nats a token",
        "counting pairs": f"{table['pairs']:.2f} nats a token",
    }
    print(*(f"{key}: {value}" for key, value in card.items()), sep="\n")
    if steps == STEPS:
        print(write_result(RESULT, numbers, time.perf_counter() - start, card))


if __name__ == "__main__":
    with torch.no_grad():
        main()
