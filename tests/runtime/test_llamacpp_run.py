"""Logits, greedy decoding and its clock, tokens and texts; quantised files; parity with our own model."""

import time

import numpy as np
import pytest
import torch
from core_helpers import clear_of_ties
from llama_files import VOCABULARY, rewrite, tiny_model, tokenizer

from minimoe import generate
from minimoe.ggml import LlamaError, amx
from minimoe.ggml.quantizer import quantize_file
from minimoe.runtime.llamacpp import detokenize, greedy, load, logits, tokenize

TEXT = "def wrap(text, width=70):\n    # naïve café\n    return [text[i : i + width] for i in range(0, 100)]\n"


def random_ids(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


@pytest.fixture(scope="module")
def exact(tiny_file):
    return load(tiny_file, context=512, exact=True)


# ---------------------------------------------------------------------- logits
def test_logits_are_our_own(exact):
    ids = tokenizer().encode(TEXT)
    with torch.no_grad():
        ours = tiny_model()(torch.tensor([ids])).logits[0].numpy()
    theirs, clear = logits(exact, ids), clear_of_ties(tiny_model(), torch.tensor([ids]))[0].numpy()
    assert theirs.shape == ours.shape == (len(ids), VOCABULARY) and clear.mean() > 0.9
    assert np.abs(theirs - ours)[clear].max() < 2e-5 * np.abs(ours).max()


def test_exact_is_closer_than_the_default(exact, tiny_file):
    ids = tokenizer().encode(TEXT)
    with torch.no_grad():
        ours = tiny_model()(torch.tensor([ids])).logits[0].numpy()
    clear = clear_of_ties(tiny_model(), torch.tensor([ids]))[0].numpy()
    far, near = (np.abs(logits(llama, ids) - ours)[clear].max() for llama in (load(tiny_file), exact))
    assert near < far / 10, "F16 in the KV cache"


def test_logits_in_parts_are_the_same(exact, tiny_file):
    ids = random_ids(200)
    parts = load(tiny_file, exact=True, n_batch=64)
    assert parts.n_batch == 64
    np.testing.assert_allclose(logits(parts, ids), logits(exact, ids), atol=1e-4)


def test_logits_start_afresh_and_leave_nothing(exact):
    ids = random_ids(40)
    first = logits(exact, ids)
    exact.create_completion("import", max_tokens=3, temperature=0)
    assert (logits(exact, ids) == first).all()
    before = exact.create_completion("import", max_tokens=6, temperature=0)["choices"][0]["text"]
    logits(exact, ids)
    assert exact.create_completion("import", max_tokens=6, temperature=0)["choices"][0]["text"] == before


# ---------------------------------------------------------------------- greedy
def test_greedy_is_token_by_token(exact):
    ids = random_ids(30)
    seen = []
    answer = greedy(exact, ids, 25, on_token=seen.append, ignore_end=True)
    assert answer.ids == seen and len(seen) == 25 and answer.finish_reason == "length"
    for n, token in enumerate(answer.ids):
        assert int(logits(exact, ids + answer.ids[:n])[-1].argmax()) == token


def test_greedy_is_what_the_binding_and_our_own_model_say(exact):
    ids = tokenizer().encode(TEXT)
    ours = generate(tiny_model(), [ids], max_new_tokens=20)
    theirs = greedy(exact, ids, 20)
    assert theirs.ids == ours.ids[0] and theirs.finish_reason == ours.finish_reason[0]
    bound = []
    for token in exact.generate(ids, temp=0, repeat_penalty=1.0):
        bound.append(token)
        if len(bound) == len(theirs.ids):
            break
    assert bound == theirs.ids


def test_greedy_stops(exact, tiny_file, tmp_path):
    ids = random_ids(10)
    free = greedy(exact, ids, 12, ignore_end=True).ids
    assert greedy(exact, ids, 12, stop=[free[4]], ignore_end=True).ids == free[: free.index(free[4]) + 1]
    pair = greedy(exact, ids, 12, stop=[free[2:4]], ignore_end=True)
    assert pair.ids == free[:4] and pair.finish_reason == "stop"
    # the file's own end-of-text token
    ending = load(rewrite(tiny_file, tmp_path / "eos.gguf", {"tokenizer.ggml.eos_token_id": lambda old: free[3]}), exact=True)
    assert greedy(ending, ids, 12).ids == free[: free.index(free[3]) + 1]
    assert greedy(ending, ids, 12, ignore_end=True).ids == free


def test_greedy_ends_where_the_context_does(exact):
    answer = greedy(exact, random_ids(510), 64, ignore_end=True)
    assert len(answer.ids) == 2 and answer.finish_reason == "length"


def test_the_clock_counts_llama_cpp_and_nothing_else(exact):
    start = time.perf_counter()
    answer = greedy(exact, random_ids(400), 10, on_token=lambda token: time.sleep(0.05), ignore_end=True)
    wall, timings = time.perf_counter() - start, answer.timings
    assert len(timings.step_s) == 9 and min(timings.step_s) > 0
    slept = 10 * 0.05
    assert 0.3 * (wall - slept) < timings.prefill_s + sum(timings.step_s) <= wall - slept
    assert timings.prefill_s > np.median(timings.step_s), "400 tokens against one"
    assert timings.tokens_per_second == pytest.approx(9 / sum(timings.step_s))


# ---------------------------------------------------------------------- tokens and texts
def test_tokens_are_our_own(exact):
    for text in (TEXT, "", " ", "a\x00b", "100 % ☃ 🙂\r\n\t x", "<|im_start|>user"):
        assert tokenize(exact, text) == tokenizer().encode(text)
        assert detokenize(exact, tokenize(exact, text)).decode() == text
    special = tokenize(exact, "<|im_start|>user", allow_special=True)
    assert special == tokenizer().encode("<|im_start|>user", allow_special=True) != tokenize(exact, "<|im_start|>user")
    assert detokenize(exact, special) == b"<|im_start|>user"
    with pytest.raises(LlamaError, match="half a surrogate pair at character 1"):
        tokenize(exact, "a\ud800")


@pytest.mark.parametrize("length", [31, 32, 33, 64, 65, 500])
def test_long_tokens_are_whole(length, tiny_file, tmp_path):
    """The binding gives a token 32 bytes and drops what is longer."""
    path = tmp_path / "long.gguf"
    llama = load(rewrite(tiny_file, path, {"tokenizer.ggml.tokens": lambda t: [*t[:400], "=" * length, *t[401:]]}), check=False)
    assert detokenize(llama, [400, 400]) == b"=" * 2 * length == llama.detokenize([400, 400])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llama: logits(llama, []), "no tokens"),
        (lambda llama: logits(llama, [1] * 513), "513 tokens do not fit, the context has room for 512"),
        (lambda llama: greedy(llama, [1] * 512), "512 tokens do not fit, the context has room for 511"),
        (lambda llama: logits(llama, [1, VOCABULARY]), f"token id {VOCABULARY} is outside the vocabulary"),
        (lambda llama: greedy(llama, [-1]), "token id -1"),
        (lambda llama: logits(llama, "text"), "encode text with tokenize"),
        (lambda llama: detokenize(llama, [10**6]), "token id 1000000"),
        (lambda llama: greedy(llama, [1], 0), "max_new_tokens=0"),
        (lambda llama: greedy(llama, [1], stop=[[]]), "stop holds an empty sequence"),
        (lambda llama: greedy(llama, [1], stop=[None]), "stop=None"),
    ],
)
def test_misuse_is_one_line(call, words, exact):
    with pytest.raises(LlamaError, match=words) as caught:
        call(exact)
    assert "\n" not in str(caught.value)


def test_a_closed_llama_says_so(tiny_file):
    llama = load(tiny_file)
    llama.close()
    for call in (lambda: logits(llama, [1]), lambda: greedy(llama, [1]), lambda: tokenize(llama, "a"), lambda: detokenize(llama, [1])):
        with pytest.raises(LlamaError, match="this Llama is closed"):
            call()


# ---------------------------------------------------------------------- quantised files
@pytest.fixture(scope="module")
def quantised(wide_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    for quant in ("Q8_0", "Q4_0", "Q4_K_S"):
        assert not quantize_file(wide_file, folder / f"{quant}.gguf", quant).fallbacks
    return folder


@pytest.mark.parametrize(("quant", "likeness"), [("Q8_0", 0.98), ("Q4_0", 0.8), ("Q4_K_S", 0.8)])
def test_a_long_prompt_of_a_quantised_file(quant, likeness, quantised, wide_file):
    """Where a build with AMX by gcc 12 dies: here, on such a CPU, load has to keep it from there."""
    ids = random_ids(160)
    theirs, full = logits(load(quantised / f"{quant}.gguf"), ids), logits(load(wide_file), ids)
    assert np.isfinite(theirs).all()
    assert (theirs * full).sum() / np.linalg.norm(theirs) / np.linalg.norm(full) > likeness


def test_extra_buffers_compute_the_same_where_they_work(quantised):
    """CPU_REPACK or AMX against the plain buffers, in whatever combination this build survives."""
    path, ids = quantised / "Q4_0.gguf", random_ids(160)
    llama, plain = load(path), load(path, use_extra_bufts=False)
    assert llama.model_params.use_extra_bufts is not amx.amx_is_broken()
    a, b = logits(llama, ids), logits(plain, ids)
    assert (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) > 0.995
