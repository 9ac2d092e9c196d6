"""Training steps on a device, for tools/gpu_parts.py: how fast, how much memory, and the same by other kernels."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from gpu_shared import Report, Trouble, memory, one_line
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minimoe import HybridConfig, HybridLM
from minimoe.bench.device import measure_matmul
from minimoe.data import Tokens
from minimoe.layers import without_grouped_mm
from minimoe.sizing import count_parameters, flops_per_token
from minimoe.train import Training, TrainOptions
from minimoe.train.precision import autocast

DOCUMENT = 600  # tokens; as long as a short source file
CASES = (  # what a 12 GB card may choose between: weights and AdamW's state take 3.1 GB, a token's activations 1.8 MB
    dict(batch=2, length=1024),
    dict(batch=4, length=1024),
    dict(batch=8, length=1024, accumulate=4),
    dict(batch=8, length=1024, recompute=True),
    dict(batch=16, length=1024, recompute=True),
    dict(batch=32, length=1024, accumulate=4, recompute=True),
    dict(batch=4, length=4096, recompute=True),
    dict(batch=1, length=16_384, recompute=True),
    dict(batch=2, length=1024, precision="float32"),
)
TOY_CASES = (dict(batch=2, length=64), dict(batch=4, length=64, accumulate=2, recompute=True))
TOO_LARGE = dict(batch=64, length=1024)  # ten times what fits
LIKE_ROUNDING = 4.0  # a form may be this many times as far from another as bfloat16 is from float32
SAME = 1e-4  # or this far, as a part of the gradient


def setting(report: Report) -> tuple[HybridConfig, Tokens, torch.device]:
    """The model to step, random text of documents, and where."""
    config = HybridConfig.preset("tiny" if report.args.quick else "base-12gb")
    random = np.random.default_rng(0)
    ids = random.integers(3, config.vocab_size, 1 << 20, dtype=np.uint16)
    ids[random.random(len(ids)) < 1 / DOCUMENT] = config.eos_token_ids[0]
    torch.manual_seed(0)
    return config, Tokens(ids, 3 * len(ids)), torch.device(report.args.device)


def base(report: Report) -> None:
    """Steps of base-12gb at several choices, and then a batch that cannot fit."""
    config, tokens, device = setting(report)
    count = count_parameters(config)
    peak = measure_matmul(device, torch.bfloat16, 0.1 if report.args.quick else 1.0).flop_per_second
    report.put(parameters=count.total + count.mtp, peak_flop_per_second=peak)
    model = HybridLM(config, device=device)
    for case in TOY_CASES if report.args.quick else CASES:
        report.add("steps", one_case(report, model, tokens, case, peak))
    if device.type == "cuda":
        report.put(out_of_memory=too_large(model, tokens))
    else:
        report.put(out_of_memory="not forced: only a card's memory is capped here")
    if not any("tokens_per_second" in found for found in report.found["steps"]):
        raise Trouble("no step of the model came to its end")


def one_case(
    report: Report, model: HybridLM, tokens: Tokens, case: dict[str, Any], peak: float | None,
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> dict[str, Any]:
    """Some steps with these options, or one line of why not."""
    if report.left() < 10:
        return case | {"trouble": "no time left"}
    try:
        with context():
            return case | steps(model, tokens, TrainOptions(**case), 3 if report.args.quick else 8, report, peak)
    except Exception as error:  # one choice that fails must not cost the others
        return case | {"trouble": one_line(error)}


def steps(
    model: HybridLM, tokens: Tokens, options: TrainOptions, count: int, report: Report, peak: float | None
) -> dict[str, Any]:
    """Median seconds of a step after two that warm up; tokens/s, share of the measured peak, peak memory."""
    device = model.lm_head.weight.device
    release(device)
    training = Training(model, tokens, options)
    try:
        first = time.perf_counter()
        done = [training.step(), training.step()]
        first = wait(device) - first
        seconds = []
        for _ in range(count):
            start = wait(device)
            done.append(training.step())
            seconds.append(wait(device) - start)
            if report.left() < 5:
                break
    finally:
        training.close()
        model.zero_grad(set_to_none=True)
    median, length = statistics.median(seconds), options.length
    flops = flops_per_token(model.config, length, training.with_mtp).training * options.batch * length
    return {
        "seconds": median, "spread": [min(seconds), max(seconds)], "first_two_seconds": first,
        "tokens_per_second": options.batch * options.length / median, "flops": flops,
        "mfu": flops / median / peak if peak else None, "loss": [done[0].loss, done[-1].loss],
        "notes": [step.note for step in done if step.note],
    } | memory(report.args.device)  # fmt: skip


def too_large(model: HybridLM, tokens: Tokens) -> dict[str, Any]:
    """A batch that cannot fit: the step halves it until it does, and training goes on."""
    release(model.lm_head.weight.device)
    training = Training(model, tokens, TrainOptions(**TOO_LARGE))
    try:
        done = [training.step(), training.step()]
    finally:
        training.close()
        model.zero_grad(set_to_none=True)
    if not done[0].note or training.accumulate == 1:
        raise Trouble(f"{TOO_LARGE} was to run out of memory and did not: the cap does not hold")
    return TOO_LARGE | {
        "accumulate": training.accumulate, "note": done[0].note, "losses": [step.loss for step in done],
        "second_step_note": done[1].note,
    } | memory(str(model.lm_head.weight.device))  # fmt: skip


# ---------------------------------------------------------------------- the same by other kernels
def forms(device: torch.device) -> dict[str, Callable[[], AbstractContextManager]]:
    """Contexts in which other kernels compute the same. An RTX 3060 (sm_86) has no grouped kernel of its own and no
    cuDNN attention of Hopper's kind."""
    plain = [SDPBackend.MATH]
    found = {"experts one after another": without_grouped_mm, "attention written out": lambda: sdpa_kernel(plain)}
    if device.type == "cuda":
        others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        found["attention without cuDNN"] = lambda: sdpa_kernel(others)
    return found


def fallbacks(report: Report) -> None:
    """Each form against the fast one: loss, gradient, speed; then float32, torch.compile and float16."""
    config, tokens, device = setting(report)
    model = HybridLM(config, device=device)
    rows, length = (2, 64) if report.args.quick else (1, 1024)
    ids = torch.from_numpy(tokens.ids[: rows * length + 1].astype(np.int64)).to(device)
    batch = ids[:-1].view(rows, length), ids[1:].view(rows, length)
    exact_loss, exact = gradient(model, batch, "float32")
    fast_loss, fast = gradient(model, batch, "bfloat16")
    rounding = distance(fast, exact)
    report.put(bfloat16={"loss": fast_loss, "loss_in_float32": exact_loss, "gradient_from_float32": rounding})
    for name, context in forms(device).items():
        with context():
            loss, other = gradient(model, batch, "bfloat16")
        apart = distance(other, fast)
        ok = apart <= max(SAME, LIKE_ROUNDING * rounding)
        report.add("forms", {"form": name, "ok": ok, "loss": loss, "gradient_from_fast": apart,
                             "gradient_from_float32": distance(other, exact)})  # fmt: skip
    del exact, fast, other
    model.zero_grad(set_to_none=True)
    report.put(float16=half(HybridLM(config, device=device), batch[0]))

    peak = measure_matmul(device, torch.bfloat16, 0.1 if report.args.quick else 1.0).flop_per_second
    case = dict(batch=2, length=64 if report.args.quick else 1024)
    speeds = {"fast": (case, contextlib.nullcontext), "float32": (case | {"precision": "float32"}, contextlib.nullcontext)}
    speeds |= {name: (case, context) for name, context in forms(device).items()}
    speeds["compiled"] = (case | {"compile": True}, contextlib.nullcontext)
    for name, (options, context) in speeds.items():
        if report.args.quick and name == "compiled":  # on a CPU it needs a C++ compiler and a minute
            continue
        report.add("speeds", {"form": name} | one_case(report, model, tokens, options, peak, context))
    bad = [found["form"] for found in report.found["forms"] if not found["ok"]]
    if bad:
        raise Trouble(f"another gradient than the fast form's: {', '.join(bad)}")


def gradient(model: HybridLM, batch: tuple[Tensor, Tensor], precision: str) -> tuple[float, dict[str, Tensor]]:
    """Loss (both of them, as training adds them up) and the gradient of every weight, in the given precision."""
    model.zero_grad(set_to_none=True)
    with autocast(batch[0].device, precision, model.config.hidden_size):
        main, mtp = model.losses(*batch)
        loss = main + TrainOptions().mtp_weight * mtp
    loss.backward()
    return loss.item(), {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients, as a part of the second one's."""
    apart = sum(float((one[name] - other[name]).double().square().sum()) for name in other)
    return (apart / sum(float(other[name].double().square().sum()) for name in other)) ** 0.5


@torch.no_grad()
def half(model: HybridLM, ids: Tensor) -> dict[str, Any]:
    """Logits of a whole model in bfloat16 and in float16, which has no grouped kernel: distance from float32's."""
    found: dict[str, Any] = {}
    exact = model(ids).logits
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        try:
            logits = HybridLM(model.config, device=ids.device)
            logits.load_state_dict(model.state_dict())
            logits = logits.to(dtype)(ids).logits
            found[name] = {"distance": float((logits - exact).norm() / exact.norm()), "finite": bool(logits.isfinite().all())}
        except (RuntimeError, NotImplementedError) as error:
            found[name] = {"trouble": one_line(error)}
    return found


# ---------------------------------------------------------------------- the device
def wait(device: torch.device) -> float:
    """The clock, once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def release(device: torch.device) -> None:
    """Give cached memory back and count the peaks anew."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
