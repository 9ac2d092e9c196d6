"""Runners compute what their programs compute; only then does a time mean anything."""

import numpy as np
import pytest
import torch

from minimoe.bench import llama, runners, worker
from minimoe.bench.variants import Task
from minimoe.errors import MinimoeError
from minimoe.ggml.library import log
from minimoe.runtime import llamacpp


@pytest.fixture(scope="module")
def both(tiny_folder):
    return [runners.open_runner(name, str(tiny_folder), "cpu", 1, "float32") for name in ("minimoe", "transformers")]


@pytest.fixture
def gguf_runner(plain_file):  # noqa: F811
    return llama.LlamaRunner(str(plain_file), 1, 0, 0)


def written(runner, tokens):
    """The likeliest tokens after what was read, one by one."""
    found = [runner.likeliest()]
    for _ in range(tokens - 1):
        runner.step(found[-1])
        found.append(runner.likeliest())
    return found


def test_both_libraries_read_the_same_tokens_and_write_the_same(both):
    told = []
    for runner in both:
        runner.generator.manual_seed(7)
        runner.start(2, 5, 16)
        runner.read(9)
        told.append(written(runner, 6))
    assert told[0] == told[1] and len(told[0][0]) == 2


@pytest.mark.parametrize("which", [0, 1])
def test_begin_goes_back_to_the_depth(both, which):
    runner = both[which]
    runner.start(1, 12, 16)
    before = runner.logits.clone()
    first = written(runner, 4)
    runner.step()
    runner.begin()
    assert torch.equal(runner.logits, before) and written(runner, 4) == first
    runner.start(1, 0, 4)
    runner.step()
    runner.begin()
    assert runner.state is None and runner.logits is None


def test_a_long_prompt_goes_in_parts_and_gives_the_same(both, monkeypatch):
    ours = both[0]
    ids = torch.arange(40)[None]
    whole, _ = ours.forward(ids, None)
    monkeypatch.setattr(runners, "PREFILL_TOKENS", 16)
    parts, _ = ours.forward(ids, None)
    assert torch.allclose(whole, parts, atol=1e-4)


def test_the_fastest_experts_are_taken_and_kept(both, monkeypatch):
    theirs = both[1]
    monkeypatch.setattr(theirs, "taken", {})
    asked = []
    monkeypatch.setattr(theirs.model, "set_experts_implementation", asked.append)
    seconds = {"eager": 3.0, "grouped_mm": 1.0, "batched_mm": 2.0}
    theirs.choose("tg", lambda: seconds[asked[-1]])
    assert asked == [*runners.EXPERTS, "grouped_mm"] and theirs.notes == {"experts": "grouped_mm"}
    asked.clear()
    theirs.choose("pp", lambda: seconds[asked[-1]])
    assert "batched_mm" not in asked  # it would copy the chosen experts' weights for each token of the prompt
    theirs.use("tg")
    assert asked[-1] == "grouped_mm"

    theirs.taken |= {"pp": "eager"}
    assert worker._notes(theirs, Task("serve", 4, prompt=8)) == {"experts": "eager, then grouped_mm"}

    def broken():
        raise RuntimeError("no kernel")

    theirs.taken.clear()
    with pytest.raises(MinimoeError, match="none of transformers' expert implementations"):
        theirs.choose("tg", broken)


def test_llama_writes_what_greedy_writes(gguf_runner, plain_file):  # noqa: F811
    runner = gguf_runner
    ids = np.arange(3, 20, dtype=np.int32)
    runner.start(1, 0, 64)
    runner._decode(ids[None], last=True)
    llama_ = llamacpp.load(plain_file, context=256, check=False)
    plain = llamacpp.greedy(llama_, ids.tolist(), 5, ignore_end=True).ids
    llama_.close()
    assert [row[0] for row in written(runner, 5)] == plain


def test_llama_goes_back_to_the_depth_and_rows_do_not_mix(gguf_runner):
    runner = gguf_runner
    runner.start(3, 20, 16)
    runner.step([5, 6, 7])
    together = written(runner, 3)
    alone = []
    for row, token in enumerate((5, 6, 7)):
        runner.begin()
        runner.step([token] * 3)
        alone.append([ids[row] for ids in written(runner, 3)])
    assert [list(ids) for ids in zip(*together)] == alone
    assert len(set(map(tuple, alone))) == 3  # else they would prove nothing


def test_llama_reads_a_prompt_longer_than_a_batch(gguf_runner, monkeypatch):
    runner = gguf_runner
    monkeypatch.setattr(llama, "BATCH", 8)
    runner.start(2, 0, 40)
    runner.read(21)
    assert runner.at == 21 and len(runner.likeliest()) == 2


def test_a_build_without_gpu_support_says_so(plain_file, monkeypatch):  # noqa: F811
    monkeypatch.setattr(llama.library(), "llama_supports_gpu_offload", lambda: False)
    with pytest.raises(MinimoeError, match="has no GPU support.*--device cpu"):
        llama.LlamaRunner(str(plain_file), 1, -1, 0)


def test_experts_of_the_first_blocks_stay_in_ram(plain_file):  # noqa: F811
    """As --n-cpu-moe does: by block, whether it has experts or not. llama.cpp says which tensors it put where."""
    with llama.experts_in_ram(3) as overrides, log.listen() as lines:
        model = llamacpp.load(plain_file, context=256, check=False, **overrides)
    model.close()
    moved = [text.split()[1] for _, text in lines if "buffer type overridden" in text]
    owners = {name.split(".")[1] for name in moved}
    assert moved and all("_exps" in name for name in moved)
    assert owners <= {"0", "1", "2"}
    with llama.experts_in_ram(0) as overrides:
        assert overrides == {}


def test_serving_times_add_up(both):
    clock = iter(range(1000))
    times = worker._serve(both[0], Task("serve", 4, prompt=8), 2, lambda: float(next(clock)))
    assert times == {"ttft": [1.0, 1.0], "tpot": [1.0, 1.0], "itl": [1.0] * 6}


@pytest.mark.parametrize("device, threads, name", [("cpu", 1, "cpu"), ("cpu", 2, "wall"), ("cuda", 1, "wall")])
def test_the_clock(device, threads, name):
    assert worker.clock_for(device, threads)[0] == name


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["minimoe", "transformers"])
def test_on_cuda(tiny_folder, runtime):
    runner = runners.open_runner(runtime, str(tiny_folder), "cuda", 1, "float32")
    runner.start(2, 8, 8)
    runner.read(4)
    assert len(written(runner, 3)) == 3
