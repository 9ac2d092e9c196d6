"""What save_gguf and load_gguf refuse: one line that names the thing, and nothing half done."""

import os
import random
import warnings

import gguf
import llama_child
import numpy as np
import pytest
import torch
from gguf_helpers import model_of, rewrite, tokenizer

from minimoe import HybridConfig, HybridLM
from minimoe.data import Tokenizer
from minimoe.ggml import LlamaError
from minimoe.ggml.child import LlamaDied, run
from minimoe.interop import GGUFError, load_gguf, save_gguf
from minimoe.interop import gguf as module
from minimoe.runtime import llamacpp


def refuses(match, work, *arguments, error=GGUFError, **keywords):
    with pytest.raises(error, match=match) as caught:
        work(*arguments, **keywords)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


# ---------------------------------------------------------------------- writing
CONFIGS = {
    "experts and a dense block": ("MEM*-", {"num_nextn_predict_layers": 0}, r"hybrid_override_pattern='MEM\*-': .*'E' or '-'"),
    "MTP and a dense block": ("M*-", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1 with .*'-' blocks"),
    "no attention": ("MEM", {}, r"hybrid_override_pattern='MEM': .* without attention \('\*'\)"),
    "no Mamba": ("*E", {}, r"without Mamba \('M'\)"),
    "clamped above": ("MEM*E", {"time_step_limit": (0.0, 0.1)}, r"time_step_limit=\(0.0, 0.1\): .*only \(0, inf\)"),
    "clamped below": ("M*-", {"time_step_limit": (1e-3, float("inf"))}, "time_step_limit"),
    "head of one": ("MEM*E", {"head_dim": 1}, "head_dim=1: "),
    "too many blocks": ("M*" * 257, {"num_nextn_predict_layers": 0}, "514 blocks .*at most 512"),
    "too many with MTP": ("M*" * 256, {}, "513 blocks .*at most 512"),
    "too many experts": ("M*E", {"n_routed_experts": 1025}, "n_routed_experts=1025: .* at most 1024"),
    "more than 32 bits": ("M*E", {"max_position_embeddings": 2**32}, "max_position_embeddings=4294967296: "),
    "epsilon too small": ("M*E", {"layer_norm_epsilon": 1e-40}, "layer_norm_epsilon=1e-40: .*float32"),
    "scale too large": ("M*E", {"routed_scaling_factor": 1e39}, r"routed_scaling_factor=1e\+39: .*float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_what_llama_cpp_cannot_hold_is_named(tmp_path, case):
    pattern, changes, match = CONFIGS[case]
    shallow = len(pattern) > 20
    model = model_of(pattern, **({"hidden_size": 2, "vocab_size": 4, "mamba_head_dim": 1, "ssm_state_size": 1,
                                  "moe_latent_size": 1} if shallow else {}), **changes)  # fmt: skip
    refuses(match, save_gguf, model, tmp_path / "model.gguf", None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", [
    "experts and a dense block", "MTP and a dense block", "no attention", "no Mamba", "head of one",
])  # fmt: skip
def test_llama_cpp_would_indeed_not_take_it(tmp_path, monkeypatch, case):
    """Written all the same, such files do not load or abort the process that tries."""
    pattern, changes, _ = CONFIGS[case]
    monkeypatch.setattr(module, "check_config", lambda config: None)
    save_gguf(model_of(pattern, **changes), tmp_path / "model.gguf", None)
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(llama_child.__file__))
    with pytest.raises(LlamaError, match=r"cannot load it|GGML_ASSERT"):
        run("llama_child:decode_exactly", "child", path=str(tmp_path / "model.gguf"))


def test_as_many_groups_as_experts_would_kill_the_process(tmp_path):
    """So a file of one expert says nothing of groups, though NVIDIA's say one."""
    save_gguf(model_of(n_routed_experts=1, num_experts_per_tok=1), tmp_path / "model.gguf", None)
    llamacpp.check_file(tmp_path / "model.gguf")
    group = {"nemotron_h_moe.expert_group_count": (1, gguf.GGUFValueType.UINT32)}
    rewrite(tmp_path / "model.gguf", tmp_path / "grouped.gguf", extra=group)
    with pytest.raises(LlamaDied, match="n_expert_groups"):
        llamacpp.check_file(tmp_path / "grouped.gguf")


def test_a_tokenizer_that_is_not_the_models(tmp_path):
    model, path = model_of(tokenizer_fingerprint="0" * 32), tmp_path / "model.gguf"
    message = refuses("tokenizer_fingerprint", save_gguf, model, path, tokenizer())
    assert tokenizer().fingerprint in message and "0" * 32 in message
    save_gguf(model_of(tokenizer_fingerprint=tokenizer().fingerprint), path, tokenizer())
    refuses("vocab_size=299: smaller than the tokenizer's 300", save_gguf, model_of(vocab_size=299), path, tokenizer())
    refuses("a str has no tokens; give a minimoe.data.Tokenizer", save_gguf, model_of(), path, "tokenizer.json")
    double = Tokenizer.from_parts(tokenizer().tokens, tokenizer().merges, tokenizer().special.values(), "qwen2")
    double.tokens[290] = double.tokens[280]
    refuses("occurs twice", save_gguf, model_of(), path, double)


@pytest.mark.parametrize("quant, value, match", [
    ("F32", float("nan"), "lm_head.weight holds a number that F32 cannot: it is not finite"),
    ("Q8_0", float("inf"), "it is not finite"),
    ("F16", 65520.0, "F16 cannot: choose BF16 or F32"),
    ("Q8_0", 8.4e6, "Q8_0 cannot: choose BF16 or F32"),
    ("BF16", 3.4e38, "BF16 cannot"),
    ("Q4_K_M", float("-inf"), "it is not finite"),
], ids=str)  # fmt: skip
def test_numbers_that_the_type_cannot_hold(tmp_path, quant, value, match):
    model = model_of(hidden_size=64)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = value
    refuses(match, save_gguf, model, tmp_path / "model.gguf", None, quant)
    assert not list(tmp_path.iterdir())


def test_an_A_beyond_float32(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.model.layers[2].mixer.A_log[1] = 100.0
    refuses("layers.2.mixer.A_log", save_gguf, model, tmp_path / "model.gguf", None)


def test_quants_that_do_not_exist(tmp_path):
    for quant, match in [("Q9", "'Q9' is unknown; .*Q4_K_M"), (None, "unknown"), ("IQ2_XS", "importance matrix")]:
        refuses(match, save_gguf, model_of(), tmp_path / "model.gguf", None, quant, error=ValueError)
    assert not list(tmp_path.iterdir())


def test_no_weights_and_no_file(tmp_path):
    refuses("meta device", save_gguf, HybridLM(HybridConfig.preset("tiny"), device="meta"), tmp_path / "m.gguf", None)
    refuses("is a directory", save_gguf, model_of(), tmp_path, None)


# ---------------------------------------------------------------------- reading
@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.gguf"
    save_gguf(model_of(), path, tokenizer())
    return path


def header_size(path):
    return int(gguf.GGUFReader(path).data_offset)


def test_a_file_that_is_cut_short(good, tmp_path):
    """Anywhere: in the middle of a number, of the keys, of a tensor."""
    data, header, r = good.read_bytes(), header_size(good), random.Random(0)
    cuts = [0, 3, 4, 7, 20, 24, header - 1, header, header + 1, len(data) - 40]
    cuts += [r.randrange(24, header) for _ in range(7)] + [r.randrange(header, len(data) - 40) for _ in range(6)]
    for cut in cuts:
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        message = refuses("cut short or damaged; fetch or export it again", load_gguf, tmp_path / "cut.gguf")
        assert "cut.gguf: " in message


@pytest.mark.parametrize("size", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_a_header_with_a_wrong_bit(good, tmp_path, size):
    """Refused in one line, or read as a file that says so; never another exception."""
    data, header, r = bytearray(good.read_bytes()), header_size(good), random.Random(1)
    refused = 0
    for _ in range(size):
        at, bit = r.randrange(header), 1 << r.randrange(8)
        data[at] ^= bit
        (tmp_path / "flipped.gguf").write_bytes(data)
        data[at] ^= bit
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_gguf(tmp_path / "flipped.gguf")
        except GGUFError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > size // 2


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\0" * 5000, b"PK\x03\x04" + bytes(range(256)), b"{}", b"GGUX" + b"\1" * 99])
def test_what_is_no_gguf_file(tmp_path, content):
    (tmp_path / "bad.gguf").write_bytes(content)
    refuses("bad.gguf: no GGUF file", load_gguf, tmp_path / "bad.gguf")


def test_no_file_at_all(tmp_path):
    refuses("none.gguf: no such file", load_gguf, tmp_path / "none.gguf")
    refuses("is a directory", load_gguf, tmp_path)


def test_another_architecture(good, tmp_path):
    rewrite(good, tmp_path / "llama.gguf", architecture="llama")
    refuses("general.architecture='llama': only nemotron_h and nemotron_h_moe", load_gguf, tmp_path / "llama.gguf")


def without(*names):
    return lambda name, value: None if name in names else value


def but(wanted, change):
    return lambda name, value: change(value) if name == wanted else value


A = "nemotron_h_moe."
KEYS = {
    "a key is missing": (without(f"{A}embedding_length"), f"key {A}embedding_length is missing"),
    "a size is wrong": (but(f"{A}ssm.state_size", lambda n: n + 1), r"tensor blk.0.ssm_in.weight has shape \[.*keys ask for"),
    "no blocks": (but(f"{A}block_count", lambda n: 0), f"{A}block_count=0"),
    "too few entries": (but(f"{A}feed_forward_length", lambda v: v[:3]), f"{A}feed_forward_length needs a whole number for each"),
    "two widths": (but(f"{A}attention.head_count_kv", lambda v: [4 if n else 0 for n in v[:-1]] + v[-1:]), "holds .*one size for all"),
    "heads do not divide": (but(f"{A}attention.head_count", lambda n: 3), "num_attention_heads=3: must be divisible"),
    "no head": (but(f"{A}attention.head_count", lambda n: 0), "head_count holds zeros"),
    "Mamba heads": (but(f"{A}ssm.time_step_rank", lambda n: 7), "ssm.inner_size=48 is no multiple"),
    "value width": (but(f"{A}attention.value_length", lambda n: n + 1), "value_length differs"),
    "no experts chosen": (but(f"{A}expert_used_count", lambda n: 0), "expert_used_count holds zeros"),
    "expert groups": (but(f"{A}expert_group_count", lambda n: 2), "n_group=2"),
    "huge": (but(f"{A}embedding_length", lambda n: 2**31 - 1), "keys (ask for|describe)"),
    "our config is no JSON": (but("minimoe.config", lambda text: text[:40]), "minimoe.config is not a JSON object"),
    "our config is another's": (but("minimoe.config", lambda text: "[1]"), "minimoe.config is not a JSON object"),
    "our A_log is short": (but("minimoe.A_log", lambda v: v[:5]), "minimoe.A_log has 5 entries"),
    "another fingerprint": (but("minimoe.tokenizer.fingerprint", lambda f: "0" * 32), "has fingerprint .* says 00000"),
    "another merge order": (but("tokenizer.ggml.merges", lambda v: v[::-1]), "the vocabulary was changed"),
    "a token changed": (but("tokenizer.ggml.tokens", lambda v: v[:20] + ["漢字"] + v[21:]), "vocabulary was changed"),
    "another pre-tokenizer": (but("tokenizer.ggml.pre", lambda v: "gpt-2"), "the vocabulary was changed"),
    "types of other length": (but("tokenizer.ggml.token_type", lambda v: v[:-1]), "token_type has 309 entries for 310"),
    "no tokens": (without("tokenizer.ggml.tokens"), "key tokenizer.ggml.tokens is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", KEYS)
def test_keys_that_do_not_fit(good, tmp_path, case):
    change, match = KEYS[case]
    rewrite(good, tmp_path / "bad.gguf", change=change)
    assert refuses(match, load_gguf, tmp_path / "bad.gguf").startswith(str(tmp_path / "bad.gguf"))


@pytest.mark.parametrize("name, value, kind, said", [
    ("expert_weights_norm", 1, "UINT32", "holds '1', which is no bool"),
    ("expert_weights_scale", "2.5", "STRING", "holds '2.5', which is no float"),
    ("block_count", True, "BOOL", "holds 'True', which is no int"),
    ("embedding_length", 32.0, "FLOAT32", "holds '32.0', which is no int"),
])  # fmt: skip
def test_keys_of_another_type(good, tmp_path, name, value, kind, said):
    rewrite(good, tmp_path / "bad.gguf", extra={f"{A}{name}": (value, gguf.GGUFValueType[kind])})
    refuses(f"key {A}{name} {said}", load_gguf, tmp_path / "bad.gguf")


TENSORS = {
    "missing": (lambda n, d: None if n == "blk.3.attn_k.weight" else d, "tensor blk.3.attn_k.weight is missing"),
    "missing MTP": (lambda n, d: None if n == "blk.5.nextn.hnorm.weight" else d, "blk.5.nextn.hnorm.weight is missing"),
    "no embedding": (lambda n, d: None if n == "token_embd.weight" else d, "token_embd.weight is missing"),
    "shape": (lambda n, d: d[:, 1:] if n == "blk.1.ffn_up_shexp.weight" else d, "blk.1.ffn_up_shexp.weight has shape"),
    "transposed": (lambda n, d: d.T if n == "blk.3.attn_k.weight" else d, r"attn_k.weight has shape \[32, 16\].* \[16, 32\]"),
    "A not negative": (lambda n, d: -d if n == "blk.2.ssm_a" else d, "blk.2.ssm_a must be negative"),
    "A is NaN": (lambda n, d: d * np.float32("nan") if n == "blk.2.ssm_a" else d, "blk.2.ssm_a must be negative"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(good, tmp_path, case):
    change, match = TENSORS[case]
    rewrite(good, tmp_path / "bad.gguf", tensor=change)
    refuses(match, load_gguf, tmp_path / "bad.gguf")


def test_more_tokens_than_rows(good, tmp_path):
    """llama.cpp goes by the list of tokens and misses rows."""
    rewrite(good, tmp_path / "bad.gguf", tensor=lambda n, d: d[:299] if n in ("token_embd.weight", "output.weight") else d)
    refuses("its tokenizer has 300 tokens, its embedding 299", load_gguf, tmp_path / "bad.gguf")


def test_a_tensor_too_many(good, tmp_path):
    """As a key of the MTP block that somebody took out, but not its tensors."""
    rewrite(good, tmp_path / "bad.gguf", change=lambda name, value: {
        f"{A}block_count": 5, f"{A}nextn_predict_layers": 0}.get(name, value))  # fmt: skip
    refuses(r"tensor blk.5.nextn.enorm.weight has no place in this architecture \(\d+ such\)", load_gguf, tmp_path / "bad.gguf")


def test_a_part_of_several_files(good, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "part", "nemotron_h_moe", split_max_tensors=30)
    for tensor in gguf.GGUFReader(good).tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuses("one part of several; join them first", load_gguf, next(iter(sorted(tmp_path.iterdir()))))


def test_keywords_that_mean_nothing(good):
    refuses("layers=99", load_gguf, good, layers=99)
    refuses("layers=", load_gguf, good, layers=[0, 7])
    refuses("dtype='float32' must be a torch dtype", load_gguf, good, dtype="float32")
    refuses("dtype=torch.int8", load_gguf, good, dtype=torch.int8)
