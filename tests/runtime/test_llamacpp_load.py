"""Loading: what is asked for is what llama.cpp gets, and a bad file costs one line, never this process."""

import gc
import threading
import weakref

import llama_cpp
import numpy as np
import pytest
from llama_files import VOCABULARY, header_size, rewrite, same, tensor_names, tiny_model, tokenizer

from minimoe.ggml import LlamaError, amx
from minimoe.ggml.binding import model_defaults
from minimoe.ggml.child import LlamaDied
from minimoe.interop import save_gguf
from minimoe.runtime import llamacpp
from minimoe.runtime.llamacpp import check_file, fingerprint, load, logits


def refused(path, words, kind=LlamaError, **keywords):
    with pytest.raises(kind, match=words) as caught:
        load(path, **keywords)
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


# ---------------------------------------------------------------------- what is asked for
def test_it_is_the_bindings_own_class_and_quiet(tiny_file, capfd):
    llama = load(tiny_file)
    assert type(llama) is llama_cpp.Llama
    answer = llama.create_completion("def wrap(", max_tokens=4, temperature=0)
    assert answer["usage"]["completion_tokens"] == 4
    assert llama.create_chat_completion([{"role": "user", "content": "hello"}], max_tokens=2)["choices"]
    del llama
    gc.collect()
    assert capfd.readouterr() == ("", "")


def test_exact_sets_both(tiny_file):
    plain, exact = load(tiny_file).context_params, load(tiny_file, exact=True).context_params
    f16, off = llama_cpp.GGML_TYPE_F16, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    assert (plain.type_k, plain.type_v) == (f16, f16)
    assert (exact.type_k, exact.type_v, exact.flash_attn_type) == (llama_cpp.GGML_TYPE_F32, llama_cpp.GGML_TYPE_F32, off)
    fast = load(tiny_file, flash_attn=True).context_params
    assert fast.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    refused(tiny_file, "flash_attn=True and exact=True exclude each other", exact=True, flash_attn=True)
    refused(tiny_file, "type_k=8 and exact=True", exact=True, type_k=8)


def test_contexts_are_whole(tiny_file):
    llama = load(tiny_file, context=300)
    assert llama.n_ctx() == 512 == len(llama.input_ids), "else Llama's own arrays are shorter than its context"
    assert load(tiny_file, threads=2).context_params.n_threads == 2


def test_model_parameters_without_a_keyword(tiny_file):
    llama = load(tiny_file, mtp=True, use_extra_bufts=False, check_tensors=True)
    assert llama.model_params.load_mtp and llama.model_params.check_tensors and not llama.model_params.use_extra_bufts
    untouched = llama_cpp.llama_cpp.llama_model_default_params()
    assert untouched.use_extra_bufts and not untouched.check_tensors and not untouched.load_mtp
    assert load(tiny_file).model_params.use_extra_bufts is not amx.amx_is_broken()


def test_model_parameters_are_put_back_after_a_failure(plain_file):
    original = llama_cpp.llama_cpp.llama_model_default_params
    refused(plain_file, "quantized V cache", type_v=llama_cpp.GGML_TYPE_Q8_0)
    assert llama_cpp.llama_cpp.llama_model_default_params is original


def test_another_thread_keeps_its_own_parameters():
    seen = []
    with model_defaults({"check_tensors": True}):
        thread = threading.Thread(target=lambda: seen.append(llama_cpp.llama_cpp.llama_model_default_params().check_tensors))
        thread.start()
        thread.join()
        assert seen == [False] and llama_cpp.llama_cpp.llama_model_default_params().check_tensors


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"n_gpu_layer": 3}, "n_gpu_layer is no keyword of load"),
        ({"n_ctx": 512}, "n_ctx is no keyword of load: say context"),
        ({"vocab_only": True}, "vocab_only is no keyword of load: llama.cpp aborts"),
        ({"context": 0}, "context=0: must be a whole number"),
        ({"threads": "2"}, "threads='2': must be a whole number"),
        ({"kv_overrides": {"x": None}}, "kv_overrides: x must be"),
        ({"lora_path": "/nowhere"}, "/nowhere: llama.cpp cannot use it as an adapter: failed to open"),
        ({"type_k": "x"}, "TypeError"),
    ],
)
def test_wishes_that_cannot_be_granted(keywords, words, tiny_file):
    refused(tiny_file, words, **keywords)


def test_an_override_that_aborts_is_tried_in_the_child_too(tiny_file):
    used = "nemotron_h_moe.expert_used_count"
    assert logits(load(tiny_file, kv_overrides={used: 1}), [1, 2]).shape == (2, VOCABULARY)
    refused(tiny_file, r"GGML_ASSERT\(n_expert_used_max <= hparams.n_expert\)", LlamaDied, kv_overrides={used: 9})


def test_memory_goes_with_the_last_reference(tiny_file):
    llama = load(tiny_file, mtp=True)
    alive = weakref.ref(llama)
    gc.disable()
    try:
        del llama
        assert alive() is None, "a cycle would keep the weights until the collector comes"
    finally:
        gc.enable()


def test_a_file_that_has_passed_is_not_tried_again(tiny_file, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_file.read_bytes())
    check_file(path)
    with monkeypatch.context() as patch:
        patch.setattr(llamacpp, "run", lambda *a, **k: pytest.fail("tried again"))
        check_file(path)
    path.write_bytes(tiny_file.read_bytes()[:-1])
    with pytest.raises(LlamaError, match="truncated"):
        check_file(path)


# ---------------------------------------------------------------------- whose token ids
def test_the_fingerprint(tiny_file, tmp_path):
    mine = tokenizer().fingerprint
    assert fingerprint(load(tiny_file, fingerprint=mine)) == mine
    refused(tiny_file, f"was written with tokenizer {mine[:12]}, not with 0000", fingerprint="0" * 32)
    bare = rewrite(tiny_file, tmp_path / "bare.gguf", {"minimoe.tokenizer.fingerprint": lambda old: None})
    assert fingerprint(load(bare)) is None
    refused(bare, "carries no tokenizer fingerprint", fingerprint=mine)


def test_a_file_without_a_tokenizer(tmp_path):
    save_gguf(tiny_model(), tmp_path / "ids.gguf", None)
    llama = load(tmp_path / "ids.gguf")
    assert np.isfinite(logits(llama, [1, 2, 3])).all()
    for text in (lambda: llama("hello"), lambda: llamacpp.tokenize(llama, "a"), lambda: llamacpp.detokenize(llama, [1])):
        with pytest.raises(LlamaError, match="ids.gguf holds no tokenizer"):
            text()


# ---------------------------------------------------------------------- bad files
def places(path, count):
    """Lengths to cut a file to: half of them in the header, half in the data, and the last byte."""
    header, size = header_size(path), path.stat().st_size
    inside = [24 + (header - 24) * n // (count // 2) for n in range(count // 2)]
    return [*inside, *(header + (size - header) * n // (count - count // 2) for n in range(count - count // 2 - 1)), size - 1]


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_truncation(count, tiny_file, tmp_path):
    path = tmp_path / "cut.gguf"
    for length in places(tiny_file, count):
        path.write_bytes(tiny_file.read_bytes()[:length])
        refused(path, "cut.gguf: llama.cpp cannot load it: .*; the file is truncated or damaged, fetch or export it again")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b"\0" * 9000, "is not a GGUF file"), (b"PK\x03\x04" + b"\7" * 900, "zip archive"),
     (b"GGUF\3\0\0\0" + b"\xff" * 900, "cannot load it")],
    ids=["empty", "zeros", "zip", "noise"],
)  # fmt: skip
def test_another_kind_of_file(content, words, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    refused(tmp_path / "model.gguf", words)


def test_no_file(tmp_path):
    refused(tmp_path, "is a directory")
    refused(tmp_path / "nothing.gguf", "does not exist")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fields": {"tokenizer.ggml.tokens": lambda t: [*t[:300], t[40], *t[301:]]}},
         "tokens 40 and 300 have the same text.*SIGABRT.*GGML_ASSERT"),
        ({"fields": {"expert_used_count": same(9)}}, "expert_used_count is 9, and there are 8 experts.*SIGABRT"),
        ({"fields": {"expert_used_count": same(0)}}, "expert_used_count is 0.*SIGABRT"),
        ({"fields": {"nextn_predict_layers": same(9)}}, "SIGABRT.*n_layer_nextn <= hparams.n_layer_all"),
        ({"fields": {"attention.head_count": same(5)}}, "tensor 'blk.3.attn_q.weight' has wrong shape"),
        ({"fields": {"tokenizer.chat_template": same("{{ (}")}}, "TemplateSyntaxError"),
        ({"fields": {"tokenizer.ggml.pre": same("nonsense")}}, "unknown pre-tokenizer type: 'nonsense'"),
        ({"architecture": "xyz"}, "unknown model architecture: 'xyz'"),
        ({"architecture": "llama"}, "tensor 'blk.0.attn_q.weight' not found"),
        ({"architecture": "clip"}, "CLIP cannot be used as main model"),
        ({"tensors": {"blk.0.ssm_in.weight": None}}, "tensor 'blk.0.ssm_in.weight' not found"),
    ],
    ids=["same tokens", "experts", "no experts", "mtp blocks", "heads", "template", "pre-tokenizer", "unknown", "llama",
         "clip", "no tensor"],
)  # fmt: skip
def test_a_header_that_does_not_fit(changes, words, tiny_file, tmp_path):
    refused(rewrite(tiny_file, tmp_path / "bad.gguf", **changes), words)


def test_heads_that_cannot_share_keys(plain_file, tmp_path):
    """Five heads over two, and every shape agrees with the header: only the graph's own assertion finds it."""
    heads, width = 5, tiny_model().config.hidden_size
    inner = heads * tiny_model().config.head_dim
    bad = rewrite(plain_file, tmp_path / "heads.gguf", {"attention.head_count": same(heads)}, tensors={
        "blk.3.attn_q.weight": np.zeros((inner, width), np.float32),
        "blk.3.attn_output.weight": np.zeros((width, inner), np.float32),
    })  # fmt: skip
    refused(bad, "head_count 5 is not divisible by head_count_kv 2.*SIGABRT.*GGML_ASSERT", LlamaDied)


def test_mtp_of_a_file_without_it(plain_file, tiny_file, tmp_path):
    refused(plain_file, "plain.gguf has no MTP block: load it with mtp=False", mtp=True)
    refused(plain_file, "plain.gguf has no MTP block", mtp=True, check=False)
    block = {name: None for name in tensor_names(tiny_file) if name.startswith("blk.5.")}
    promised = rewrite(tiny_file, tmp_path / "promised.gguf", tensors=block)
    refused(promised, "tensor 'blk.5.nextn.enorm.weight' not found", mtp=True)


@pytest.mark.slow
def test_flipped_bits_in_the_header(tiny_file, tmp_path):
    """Refused in one line, or loaded and finite: never the end of this process."""
    random, raw, path = np.random.default_rng(0), tiny_file.read_bytes(), tmp_path / "flipped.gguf"
    outcomes = []
    for at in random.integers(0, header_size(tiny_file), 60):
        bad = bytearray(raw)
        bad[at] ^= 1 << int(random.integers(8))
        path.write_bytes(bad)
        try:
            outcomes.append(np.isfinite(logits(load(path), [1, 2, 3])).all())
        except LlamaError as error:
            assert "\n" not in str(error)
            outcomes.append(False)
    assert any(outcomes) and not all(outcomes)
