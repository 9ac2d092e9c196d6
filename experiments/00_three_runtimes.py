"""One small model in three programs: how many tokens a second, and where does the time of a token go?

    python experiments/00_three_runtimes.py        about 2 minutes on one core, 2 GiB of memory

Writes results/00_three_runtimes.json. The shipped model (checkpoints/small), float32 unless said otherwise, one
thread. CPU seconds, and everything that is compared takes turns, so that a change of the machine's pace meets all of
it; median with least and greatest over repeats. Needs llama-cpp-python.

bandwidth   a matrix times a vector, as minimoe.bench.device.measure_bandwidth does it: a matrix that fits no cache, and
            one as large as the weights that a token reads
speed       greedy continuation of one prompt by each program's own loop, prompt included; transformers with the fastest
            of its expert implementations. "read" is the bound: one matrix of as many bytes as a token reads, times
            a vector
token       one decoding step of minimoe, and what it is made of:

            read      the bytes, as in "speed"
            add       the least that a call of PyTorch does: 1 + 1
            products  the step's own matrix products again, without anything between them
            twin      a model with the same calls and states and a fiftieth of the weights' bytes

Every program's tokens are compared before it is timed.
"""
from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minimoe import HybridConfig, HybridLM, catalog, generate
from minimoe.bench.device import measure_bandwidth
from minimoe.bench.report import write_result
from minimoe.bench.timing import in_turns
from minimoe.ggml import library
from minimoe.interop import load_model, save_gguf
from minimoe.runtime import llamacpp
from minimoe.sizing import count_parameters

ROOT = Path(__file__).parents[1]
RESULT, CHECKPOINT = ROOT / "results" / "00_three_runtimes.json", ROOT / "checkpoints" / "small"
PROMPT, TOKENS = "def fibonacci(n):\n", 48
REPEATS, STEPS = 15, 40
BITS = {"F32": 32, "Q8_0": 8.5}
EXPERTS = ("eager", "grouped_mm", "batched_mm")  # transformers' names
NANO, NANO_BITS = "nemotron-3-nano-30b-a3b", 4.5
TWIN = dict(  # the widths that only weights have: states, heads and experts stay
    vocab_size=512, hidden_size=16, moe_latent_size=8, moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16, num_nextn_predict_layers=0,
)  # fmt: skip


class Calls(TorchDispatchMode):
    """Within, every operator that PyTorch runs is counted, and the factors of matrix products are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.products: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[op.name()] += 1
        if op is torch.ops.aten.mm.default:
            self.products.append(args)
        return op(*args, **(kwargs or {}))


def bytes_per_token(config: HybridConfig, bits: float) -> float:
    """Every weight that is at work on a token, once: the output head with them, of the embedding one row."""
    return (count_parameters(config).active_with_head + config.hidden_size) * bits / 8


def reader(size: float) -> Callable[[], object]:
    """Reads about ``size`` bytes once."""
    matrix, vector = torch.ones(int(size) // 4 // 4096, 4096), torch.ones(4096)
    return lambda: matrix @ vector


def step_of(model: HybridLM, ids: Sequence[int]) -> Callable[[], object]:
    """Decodes the last of ``ids`` after the others; the state is immutable, so it can be called again."""
    state, last = model(torch.tensor([ids[:-1]])).state, torch.tensor([ids[-1:]])
    return lambda: model(last, state)


def repeated(work: Callable[[], object], times: int) -> Callable[[], None]:
    def many() -> None:
        for _ in range(times):
            work()

    return many


def rates(seconds: Sequence[float], count: float) -> dict[str, float]:
    """What ``count`` counts, a CPU second: median, least and greatest."""
    return {"median": count / statistics.median(seconds), "low": count / max(seconds), "high": count / min(seconds)}


def bandwidths(size: float) -> dict[str, dict[str, float]]:
    """GB/s of a buffer as large as a token's weights, and of one that fits no cache."""
    buffers = {"memory": measure_bandwidth("cpu", seconds=0.1).buffer_bytes, "weights": size}
    runs = in_turns({name: repeated(reader(n), max(1, round(1e9 / n))) for name, n in buffers.items()}, REPEATS)
    return {name: rates(r, max(1, round(1e9 / buffers[name])) * buffers[name] / 1e9) for name, r in runs.items()}


def speeds(model: HybridLM, tokenizer: Any, ids: list[int], folder: Path) -> dict[str, Any]:
    """Tokens a second of the three programs, and of nothing but reading."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    llamas = {}
    for quant in BITS:
        save_gguf(model, folder / f"{quant}.gguf", tokenizer, quant=quant)
        llamas[quant] = llamacpp.load(folder / f"{quant}.gguf", exact=True, fingerprint=tokenizer.fingerprint)

    def ask_transformers(experts: str) -> list[int]:
        theirs.set_experts_implementation(experts)
        return theirs.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :].tolist()

    def ask_llama(quant: str) -> list[int]:
        return llamacpp.greedy(llamas[quant], ids, TOKENS).ids

    ask: dict[str, Callable[[], list[int]]] = {"minimoe": lambda: generate(model, [ids], TOKENS).ids[0]}
    ask |= {f"transformers {experts}": lambda experts=experts: ask_transformers(experts) for experts in EXPERTS}
    ask |= {f"llama.cpp {quant}": lambda quant=quant: ask_llama(quant) for quant in BITS}
    answers = {name: work() for name, work in ask.items()}
    wanted = answers["minimoe"]
    for name, got in answers.items():
        if name != "llama.cpp Q8_0" and got != wanted:  # rounded weights may choose other tokens
            raise SystemExit(f"{name} continues with {got}, minimoe with {wanted}: not the same model, or a near tie")
    reads = {f"read {quant}": repeated(reader(bytes_per_token(model.config, BITS[quant])), TOKENS) for quant in BITS}
    runs = in_turns({**reads, **ask}, REPEATS)
    done = {name: rates(seconds, len(answers.get(name, range(TOKENS)))) for name, seconds in runs.items()}
    best = max(EXPERTS, key=lambda experts: done[f"transformers {experts}"]["median"])
    return {
        "tokens": len(wanted), "same_as_q8_0": sum(a == b for a, b in zip(wanted, answers["llama.cpp Q8_0"])),
        "experts": best, "programs": done,
    }  # fmt: skip


def token(model: HybridLM, ids: list[int]) -> dict[str, Any]:
    """Milliseconds of one decoding step and of its parts."""
    twin = HybridLM(model.config.replace(**TWIN)).eval()
    step, small_step = step_of(model, ids), step_of(twin, [i % TWIN["vocab_size"] for i in ids])
    with Calls() as calls:
        step()
    with Calls() as small_calls:
        small_step()
    one = torch.ones(1)
    works: dict[str, Callable[[], object]] = {
        "step": step,
        "read": reader(bytes_per_token(model.config, 32)),
        "products": lambda: [torch.mm(*pair) for pair in calls.products],
        "twin": small_step,
        "add": repeated(lambda: one + one, 100),
    }
    runs = in_turns({name: repeated(work, STEPS) for name, work in works.items()}, REPEATS)
    each = {name: {key: 1e3 / rate for key, rate in rates(r, STEPS).items()} for name, r in runs.items()}
    add = each.pop("add")["median"] / 100
    return {
        "calls": calls.names.total(), "twin_calls": small_calls.names.total(), "products": len(calls.products),
        "twin_bytes": bytes_per_token(twin.config, 32),
        "product_bytes": sum(weight.nbytes for _, weight in calls.products),
        "add_us": 1e3 * add, "ms": {name: m["median"] for name, m in each.items()},
        "predicted_ms": each["read"]["median"] + calls.names.total() * add,
        "rebuilt_ms": each["products"]["median"] + each["twin"]["median"],
    }  # fmt: skip


def card(numbers: dict[str, Any]) -> dict[str, str]:
    """What the page shows for the reader's own measurement."""
    programs = numbers["speed"]["programs"]

    def line(name: str, quant: str) -> str:
        r, bound = programs[name], programs[f"read {quant}"]["median"]
        return f"{r['median']:,.0f} tokens/s ({r['low']:,.0f} to {r['high']:,.0f}), {r['median'] / bound:.0%} of the bound"

    return {
        "bound, F32": f"{programs['read F32']['median']:,.0f} tokens/s",
        "minimoe": line("minimoe", "F32"),
        "transformers": line(f"transformers {numbers['speed']['experts']}", "F32"),
        "llama.cpp, F32": line("llama.cpp F32", "F32"),
        "bound, Q8_0": f"{programs['read Q8_0']['median']:,.0f} tokens/s",
        "llama.cpp, Q8_0": line("llama.cpp Q8_0", "Q8_0"),
    }


def main() -> None:
    library()  # is llama.cpp there at all? says so before the work
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer = load_model(CHECKPOINT, dtype=torch.float32)
    model.eval()
    ids, config = tokenizer.encode(PROMPT), model.config
    numbers: dict[str, Any] = {
        "threads": 1, "repeats": REPEATS, "prompt": PROMPT,
        "bytes": {quant: bytes_per_token(config, bits) for quant, bits in BITS.items()},
    }  # fmt: skip
    numbers["bandwidth_gb_s"] = bandwidths(numbers["bytes"]["F32"])
    with tempfile.TemporaryDirectory() as folder:
        numbers["speed"] = speeds(model, tokenizer, ids, Path(folder))
    numbers["token"] = token(model, ids)
    nano = bytes_per_token(catalog.model(NANO).config, NANO_BITS)
    memory = numbers["bandwidth_gb_s"]["memory"]["median"]
    numbers["nano_30b"] = {"bits": NANO_BITS, "bytes": nano, "predicted_tokens_per_s": memory * 1e9 / nano}
    write_result(RESULT, numbers, time.perf_counter() - start, card(numbers))
    print(*(f"{key}: {value}" for key, value in numbers.items()), sep="\n")
    print(*(f"{key}: {value}" for key, value in card(numbers).items()), RESULT, sep="\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
