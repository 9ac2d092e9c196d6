"""Random models as GGUF files in an unpatched llama.cpp: trunk and MTP block, prompt and token by token.

llama.cpp keeps keys and values in float16 and uses flash attention unless told otherwise; with both off ("exact")
it computes in float32 throughout. Where a router's last chosen and first refused scores are closer than the
rounding of a setting, the two may choose different experts: such tokens and those after them are left out.
"""

import contextlib
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from core_helpers import random_ids, router_gaps, scramble
from gguf_helpers import TEXTS, model_of, random_config, random_model, tokenizer

from minimoe import HybridConfig, HybridLM, generate
from minimoe.data import Tokenizer
from minimoe.ggml import batch
from minimoe.interop import load_gguf, save_gguf
from minimoe.layers import Attention
from minimoe.runtime import llamacpp
from minimoe.runtime.decoding import fresh
from minimoe.runtime.mtp import LlamaMTP, shift

EXACT, DEFAULT = 1e-5, 1e-3  # of the range of the logits
GATE = (0, 1, 3, 4, 5, 7, 8, 11, 12, 14, 15, 16)
MORE = [seed for seed in range(60) if seed not in GATE]
L = 40


@contextlib.contextmanager
def opened(model, path, words=None, **keywords):
    """The model in llama.cpp. Files of ours need no child process to try them first; that is what is tested here."""
    save_gguf(model, path, words)
    llama = llamacpp.load(path, check=False, **keywords)
    try:
        yield llama
    finally:
        llama.close()


def clear(model, ids, gap):
    """True [L] before the first near-tie of a router."""
    return (router_gaps(model, ids).cummin(1).values >= gap)[0].numpy()


def difference(theirs, ours, seen):
    """Largest difference, as a part of the range of our logits."""
    return float((np.abs(theirs - ours).max(-1) * seen).max() / (ours.max() - ours.min()))


def step_by_step(llama, ids):
    """The whole sequence, decoded token by token behind a prompt of one."""
    rows = []
    with fresh(llama):
        for at, token in enumerate(ids):
            batch.decode(llama.ctx, [token], at)
            rows.append(batch.logits(llama.ctx, 1)[0])
    return np.stack(rows)


def rounded(model, ids):
    """Our own logits with what attention reads and keeps in float16, as llama.cpp's default is."""
    attentions = [module for module in model.model.modules() if isinstance(module, Attention)]
    hooks = [
        project.register_forward_hook(lambda module, inputs, output: output.half().float())
        for a in attentions for project in (a.q_proj, a.k_proj, a.v_proj)
    ]  # fmt: skip
    try:
        return model(ids).logits[0].numpy()
    finally:
        for hook in hooks:
            hook.remove()


def exact_bound(model, ids, ill_conditioned):
    """EXACT; for models that make much of little twice that, or four times what rounding costs them here."""
    if not ill_conditioned:
        return EXACT
    ours, wide = (m(ids).logits[0].numpy() for m in (model, copy.deepcopy(model).double()))
    bound = max(2 * EXACT, 4 * difference(wide, ours, clear(model, ids, 1e-5)))
    assert bound < 10 * EXACT
    return bound


@torch.no_grad()
def check_trunk(model, path, ill_conditioned=False):
    """The bounds above. An ill-conditioned model, which makes much of little, may be off by four times what the same
    rounding costs it here."""
    vocab = model.config.vocab_size
    ids = max((random_ids(vocab, 1, L, seed=seed) for seed in range(12)), key=lambda ids: clear(model, ids, 3e-4).sum())
    ours, row = model(ids).logits[0].numpy(), ids[0].tolist()
    exact, default = exact_bound(model, ids, ill_conditioned), DEFAULT
    if ill_conditioned:
        default = max(default, 4 * difference(rounded(model, ids), ours, clear(model, ids, 3e-4)))
        assert default < 10 * DEFAULT
    seen = clear(model, ids, 1e-5)
    assert seen.mean() > 0.9
    with opened(model, path, exact=True) as llama:
        assert difference(llamacpp.logits(llama, row), ours, seen) < exact
        assert difference(step_by_step(llama, row), ours, seen) < exact
    seen = clear(model, ids, 3e-4)
    assert seen.mean() > 0.25
    with opened(model, path) as llama:
        theirs = llamacpp.logits(llama, row)
        assert difference(theirs, ours, seen) < default
        assert difference(step_by_step(llama, row), ours, seen) < default
        assert (theirs.argmax(-1) == ours.argmax(-1)).mean() >= 0.99


@pytest.mark.parametrize("seed", GATE)
def test_a_random_model_gives_llama_cpps_logits(tmp_path, seed):
    check_trunk(random_model(seed), tmp_path / "model.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("seed", MORE)
def test_many_random_models_give_llama_cpps_logits(tmp_path, seed):
    check_trunk(random_model(seed), tmp_path / "model.gguf", ill_conditioned=True)


def test_the_gates_models_cover_everything():
    configs = [random_config(seed) for seed in GATE]
    patterns = [config.hybrid_override_pattern for config in configs]
    assert sum("-" in p for p in patterns) >= 2 and sum("E" in p for p in patterns) >= 6
    moe = [config for config in configs if "E" in config.hybrid_override_pattern]
    assert {bool(c.moe_latent_size) for c in moe} == {c.norm_topk_prob for c in moe} == {True, False}
    assert {c.num_nextn_predict_layers for c in moe} == {0, 1}
    assert {min(c.n_groups, 3) for c in configs} == {1, 2, 3} and {c.conv_kernel for c in configs} == {2, 3, 4, 5}
    assert any(c.hidden_size % 2 for c in configs) and any(c.head_dim % 2 for c in configs)
    assert any(c.num_key_value_heads not in (1, c.num_attention_heads) for c in configs)


@pytest.mark.parametrize("preset", ["tiny", "small", pytest.param("awkward", marks=pytest.mark.slow)])
def test_the_presets(tmp_path, preset):
    model = HybridLM(HybridConfig.preset(preset), device="meta").to_empty(device="cpu")
    check_trunk(scramble(model).eval(), tmp_path / "model.gguf")


def test_one_expert(tmp_path):
    check_trunk(model_of(n_routed_experts=1, num_experts_per_tok=1), tmp_path / "model.gguf")


@pytest.mark.parametrize("mistake", ["dt", "groups", "order of B and C", "experts", "router bias"])
@torch.no_grad()
def test_a_mistake_would_show(tmp_path, mistake):
    """The weights of these tests are such that every part of the model counts."""
    model = model_of()
    ids = random_ids(model.config.vocab_size, 1, L, seed=1)
    with opened(model, tmp_path / "model.gguf", exact=True) as llama:
        theirs = llamacpp.logits(llama, ids[0].tolist())
    seen = clear(model, ids, 1e-5)
    assert difference(theirs, model(ids).logits[0].numpy(), seen) < EXACT
    mixer, moe = model.model.layers[0].mixer, model.model.layers[1].mixer
    if mistake == "dt":  # as transformers clamps it, which changes only some heads
        mixer.dt_limit = (model.config.time_step_min, float("inf"))
        assert 0 < (F.softplus(mixer.dt_bias) < model.config.time_step_min).sum() < len(mixer.dt_bias)
    elif mistake == "groups":
        mixer.norm.groups = 1
    elif mistake == "order of B and C":
        weight, width = mixer.in_proj.weight, mixer.groups * mixer.state_size
        B, C = (slice(2 * mixer.inner + n * width, 2 * mixer.inner + (n + 1) * width) for n in (0, 1))
        weight[B], weight[C] = weight[C].clone(), weight[B].clone()
    elif mistake == "experts":
        moe.experts.up_proj.copy_(moe.experts.up_proj.flip(0))
    else:
        moe.gate.e_score_correction_bias.zero_()
    assert difference(theirs, model(ids).logits[0].numpy(), np.ones(L)) > 1e-2


@torch.no_grad()
def test_dt_on_both_sides_of_every_clamp(tmp_path):
    """From 1e-6 to 20: nothing is clamped here nor there."""
    model = model_of()
    mixer = model.model.layers[0].mixer
    mixer.dt_bias.copy_(torch.linspace(-14, 20, len(mixer.dt_bias)))
    check_trunk(model, tmp_path / "model.gguf")


# ---------------------------------------------------------------------- types
@pytest.mark.parametrize("quant, bound", [("F16", 1e-2), ("BF16", 5e-2), ("Q8_0", 5e-2)])
@torch.no_grad()
def test_half_precision_in_llama_cpp(tmp_path, quant, bound):
    """llama.cpp rounds activations too, so only nearly what load_gguf's weights give."""
    model = scramble(HybridLM(HybridConfig.preset("tiny", hidden_size=128, n_routed_experts=2, num_experts_per_tok=2))).eval()
    save_gguf(model, tmp_path / "model.gguf", None, quant)
    back = load_gguf(tmp_path / "model.gguf", dtype=torch.float32)[0].eval()
    ids = random_ids(256, 1, L, seed=2)
    llama = llamacpp.load(tmp_path / "model.gguf", exact=True)
    theirs = llamacpp.logits(llama, ids[0].tolist())
    llama.close()
    near, far = (difference(theirs, m(ids).logits[0].numpy(), np.ones(L)) for m in (back, model))
    assert near < bound and near < 3 * far


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q4_0", "MXFP4_MOE"])
@torch.no_grad()
def test_quantised_in_llama_cpp(tmp_path, quant):
    """Every file loads and computes nearly what its own numbers, read back, compute here."""
    config = HybridConfig.preset("tiny", hidden_size=256, moe_latent_size=None, n_routed_experts=2, num_experts_per_tok=2)
    model = scramble(HybridLM(config)).eval()
    save_gguf(model, tmp_path / "model.gguf", None, quant)
    back = load_gguf(tmp_path / "model.gguf")[0].eval()
    ids = random_ids(256, 1, L, seed=2)
    llama = llamacpp.load(tmp_path / "model.gguf", exact=True)
    theirs = torch.from_numpy(llamacpp.logits(llama, ids[0].tolist()))
    llama.close()
    assert F.cosine_similarity(theirs, back(ids).logits[0], dim=-1).min() > 0.99


# ---------------------------------------------------------------------- the MTP block
@pytest.mark.parametrize("seed", [s for s in GATE if random_config(s).num_nextn_predict_layers])
@torch.no_grad()
def test_mtp_drafts_of_random_models(tmp_path, seed):
    check_mtp(random_model(seed), tmp_path / "model.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [s for s in MORE if random_config(s).num_nextn_predict_layers])
@torch.no_grad()
def test_mtp_drafts_of_many_random_models(tmp_path, seed):
    check_mtp(random_model(seed), tmp_path / "model.gguf", ill_conditioned=True)


@torch.no_grad()
def test_mtp_behind_a_trunk_without_experts(tmp_path):
    check_mtp(model_of("M*", mtp_final_norm="layernorm"), tmp_path / "model.gguf")


def mtp_gaps(model, ids, before_BLD):
    """Smallest gap of the block's router at each position [L]."""
    gaps = []
    router = model.mtp.layers[1].mixer.gate

    def watch(module, inputs, output):
        biased = (output[2] + module.e_score_correction_bias).sort(-1, descending=True).values
        k = module.top_k
        gaps.append(biased[:, k - 1] - biased[:, k] if k < biased.shape[-1] else torch.full((len(biased),), torch.inf))

    hook = router.register_forward_hook(watch)
    model.draft(ids, before_BLD)
    hook.remove()
    return gaps[0].numpy()


def check_mtp(model, path, ill_conditioned=False):
    """Trunk states, drafts for every position, and three chained drafts behind the last, token by token."""
    ids = random_ids(model.config.vocab_size, 1, L, seed=3)
    row = ids[0].tolist()
    out = model(ids)
    before_BLD = F.pad(out.hidden_BLD[:, :-1], (0, 0, 1, 0))
    seen = clear(model, ids, 1e-5) & (mtp_gaps(model, ids, before_BLD) >= 1e-5)
    assert seen.mean() > 0.9
    bound = exact_bound(model, ids, ill_conditioned)
    drafts, hidden_BLD, state = model.draft(ids, before_BLD)
    with opened(model, path, exact=True, mtp=True) as llama, LlamaMTP(llama) as block:
        logits_LV, hidden_LD = block.trunk(row)
        assert difference(logits_LV, out.logits[0].numpy(), clear(model, ids, 1e-5)) < bound
        theirs, their_hidden_LD = block(row, shift(hidden_LD))
        assert difference(theirs, drafts[0].numpy(), seen) < bound
        token, ours_h, their_h = row[-1], hidden_BLD[:, -1:], their_hidden_LD[-1:]
        for _ in range(3):
            token = int(drafts[0, -1].argmax())
            drafts, ours_h, state = model.draft(torch.tensor([[token]]), ours_h, state)
            theirs, their_h = block([token], their_h)
            assert difference(theirs, drafts[0].numpy(), np.ones(1)) < bound


@torch.no_grad()
def test_the_wrong_choices_about_mtp_would_show(tmp_path):
    """RMSNorm as the last norm; the trunk's state before its final norm; the state of this and not the last token."""
    model = model_of(mtp_final_norm="layernorm")
    ids = random_ids(model.config.vocab_size, 1, L, seed=3)
    before = {}
    hook = model.model.norm_f.register_forward_pre_hook(lambda module, inputs: before.setdefault("norm", inputs[0]))
    hidden_BLD = model(ids).hidden_BLD
    hook.remove()
    shifted = [F.pad(h[:, :-1], (0, 0, 1, 0)) for h in (hidden_BLD, before["norm"])]
    with opened(model, tmp_path / "model.gguf", exact=True, mtp=True) as llama, LlamaMTP(llama) as block:
        _, hidden_LD = block.trunk(ids[0].tolist())
        theirs, _ = block(ids[0].tolist(), shift(hidden_LD))

    def off(model, hidden):
        return difference(theirs, model.draft(ids, hidden)[0][0].numpy(), np.ones(L))

    assert off(model, shifted[0]) < EXACT
    rms = HybridLM(model.config.replace(mtp_final_norm="rmsnorm")).eval()
    rms.load_state_dict(model.state_dict())
    assert off(rms, shifted[0]) > 1e-2
    assert off(model, shifted[1]) > 1e-2
    assert off(model, hidden_BLD) > 1e-2


# ---------------------------------------------------------------------- text
@pytest.mark.parametrize("pre", ["qwen2", "gpt-2", "llama-bpe", "smollm"])
def test_the_files_tokenizer_gives_the_same_ids(tmp_path, pre):
    words = tokenizer(600, pre)
    text = TEXTS[0][:4000] + TEXTS[1] + " , ( x )\r\n\r\n\t\t42  <|im_end|> ½ 👩‍👩‍👧"
    with opened(model_of(vocab_size=640), tmp_path / "model.gguf", words) as llama:
        for special in (False, True):
            ids = llamacpp.tokenize(llama, text, allow_special=special)
            assert ids == words.encode(text, allow_special=special) and (4 in ids) == special
        assert llamacpp.detokenize(llama, ids) == text.encode()
        assert llamacpp.fingerprint(llama) == words.fingerprint
        assert not llama.model_params.vocab_only and llama.token_eos() == 2 and llama.token_bos() == 1


@torch.no_grad()
def test_a_tokenizer_of_bytes_alone_works_there_too(tmp_path):
    words = Tokenizer.train(["a"], 263)
    with opened(model_of(), tmp_path / "model.gguf", words) as llama:
        assert llamacpp.tokenize(llama, "déjà vu") == words.encode("déjà vu")


def test_greedy_text_is_the_same(tmp_path):
    words, model = tokenizer(), model_of(eos_token_id=(2, 4))
    prompt = words.encode("def total_ordering(cls):\n")
    ours = generate(model, [prompt], max_new_tokens=40)
    with opened(model, tmp_path / "model.gguf", words, exact=True) as llama:
        theirs = llamacpp.greedy(llama, prompt, max_new_tokens=40)
    assert theirs.ids == ours.ids[0] and theirs.finish_reason == ours.finish_reason[0]
