"""The whole model: logits, loss, dtypes, drafts, and construction without memory."""

import copy
import itertools
import pickle
import time

import pytest
import torch
import torch.nn.functional as F
from core_helpers import clear_of_ties, error, normal, random_ids, scramble, small_config, small_model

from minimoe import HybridConfig, HybridLM, catalog, lm_loss
from minimoe import model as module
from minimoe.state import KVState, MambaState


@torch.no_grad()
def test_logits_are_the_blocks_one_after_another():
    """x + mixer(norm(x)) for each block, a final norm, and a head of its own."""
    model, ids = small_model("M*E-"), random_ids(61, 2, 9)
    x = model.model.embeddings.weight[ids]
    for block in model.model.layers:
        y = block.mixer(block.norm(x))
        x = x + (y[0] if isinstance(y, tuple) else y)
    hidden = model.model.norm_f(x)
    out = model(ids)
    assert error(out.hidden_BLD, hidden) < 1e-12
    assert error(out.logits, hidden @ model.lm_head.weight.T) < 1e-12
    assert error(out.logits, hidden @ model.model.embeddings.weight.T) > 1e-3, "the head is not tied"


@pytest.mark.parametrize("pattern", ["".join(p) for p in itertools.permutations("M*E-")])
@torch.no_grad()
def test_every_order_of_blocks_runs_in_calls(pattern):
    model, ids = small_model(pattern), random_ids(61, 1, 9)
    whole, head = model(ids).logits, model(ids[:, :5])
    assert error(model(ids[:, 5:], head.state).logits, whole[:, 5:]) < 1e-11
    kinds = {"M": MambaState, "*": KVState, "E": type(None), "-": type(None)}
    assert [type(layer) for layer in head.state.layers] == [kinds[letter] for letter in pattern]


@torch.no_grad()
def test_a_first_call_of_one_token():
    model, ids = small_model(), random_ids(61, 3, 4)
    assert error(model(ids[:, :1]).logits, model(ids).logits[:, :1]) < 1e-11


@torch.no_grad()
def test_int32_ids_do_as_int64():
    model, ids = small_model(), random_ids(61, 2, 4)
    assert torch.equal(model(ids.int()).logits, model(ids).logits)


@torch.no_grad()
def test_float32_calls_agree_to_rounding():
    model, ids = small_model(dtype=torch.float32), random_ids(61, 4, 25)
    assert clear_of_ties(model, ids).all(), "choose another seed"
    state, parts = None, []
    for part in ids.split([10, 1, 1, 13], 1):
        out = model(part, state)
        state = out.state
        parts.append(out.logits)
    assert error(torch.cat(parts, 1), model(ids).logits) < 5e-5


@torch.no_grad()
def test_last_only_takes_each_rows_last_real_token():
    model, ids = small_model(), random_ids(61, 3, 8)
    whole = model(ids, lengths=[8, 3, 1])
    last = model(ids, lengths=[8, 3, 1], last_only=True)
    assert last.logits.shape == (3, 1, 61)
    expected = torch.stack([whole.logits[0, 7], whole.logits[1, 2], whole.logits[2, 0]])
    assert error(last.logits[:, 0], expected) < 1e-12
    assert error(model(ids, last_only=True).logits, model(ids).logits[:, -1:]) < 1e-12
    assert last.state.lengths == (8, 3, 1)


@pytest.mark.parametrize("ids, words", [
    (torch.tensor([[1, 61]]), "token id 61 is outside the vocabulary 0..60"),
    (torch.tensor([[1, -1]]), "token id -1"),
    (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
    (torch.zeros(0, 3, dtype=torch.long), "at least one token"),
    (torch.zeros(3, dtype=torch.long), r"\[batch, length\]"),
    (torch.zeros(1, 3), "int64"),
])  # fmt: skip
def test_wrong_ids_are_refused_in_one_line(ids, words):
    model = small_model()
    for call in (model, lambda i: model.loss(i, i)):
        with pytest.raises(ValueError, match=words) as caught:
            call(ids)
        assert "\n" not in str(caught.value)


def losses(model, ids, targets, **keywords):
    """Loss through the logits, and in slices, each with its gradients."""
    found = []
    for way in ("logits", "slices"):
        model.zero_grad()
        if way == "logits":
            masked = targets.clone()
            for row, n in zip(masked, keywords.get("lengths") or []):
                row[n:] = -100
            loss = lm_loss(model(ids, **keywords).logits, masked)
        else:
            loss = model.loss(ids, targets, **keywords)
        loss.backward()
        found.append(
            (loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    return found


@pytest.mark.parametrize("limit", [64 * 2**20, 4 * 61 * 5, 1], ids=["whole", "five tokens", "one token"])
@pytest.mark.parametrize("case", ["plain", "lengths", "packed", "ignored"])
def test_loss_equals_the_cross_entropy_of_the_logits(monkeypatch, limit, case):
    model, ids, targets = small_model(), random_ids(61, 3, 9), random_ids(61, 3, 9, seed=1)
    keywords = {}
    if case == "lengths":
        keywords = {"lengths": [9, 4, 1]}
    elif case == "packed":
        keywords = {"segment_ids": torch.tensor([[0] * 4 + [1] * 5, [0] * 9, [0] * 8 + [1]])}
    elif case == "ignored":
        targets[0, :7], targets[2, 3] = -100, -100
    monkeypatch.setattr(module, "MAX_LOGIT_BYTES", limit)
    (whole, whole_grads), (sliced, sliced_grads) = losses(model, ids, targets, **keywords)
    assert error(sliced, whole) < 1e-12
    assert whole_grads.keys() == sliced_grads.keys() == {n for n, _ in model.named_parameters()}
    for name, grad in whole_grads.items():
        assert error(sliced_grads[name], grad) < 1e-9, name
    if case == "lengths":
        assert error(model.loss(ids, targets), whole) > 1e-3, "padding would count"


def test_lm_loss_is_the_mean_of_negative_log_probabilities():
    logits, targets = normal(2, 5, 7, seed=1), random_ids(7, 2, 5)
    targets[0, 1] = -100
    picked = [
        -logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(2) for t in range(5) if targets[b, t] >= 0
    ]
    assert error(lm_loss(logits, targets), sum(picked) / 9) < 1e-12
    assert error(lm_loss(logits.float(), targets), sum(picked) / 9) < 1e-5
    assert lm_loss(logits.bfloat16(), targets).dtype == torch.float32
    with pytest.raises(ValueError, match="targets"):
        lm_loss(logits, targets[:, :4])


def test_loss_of_nothing_is_zero_and_not_nan():
    model, ids = small_model(), random_ids(61, 2, 5)
    nothing = torch.full_like(ids, -100)
    loss = model.loss(ids, nothing)
    loss.backward()
    assert float(loss.detach()) == 0 and float(lm_loss(model(ids).logits, nothing).detach()) == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="targets"):
        model.loss(ids, nothing[:, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_loss_never_holds_more_logits_than_the_limit(monkeypatch, dtype):
    """Counted at the head, at the cross-entropy, and in what the graph keeps for the backward pass."""
    limit, sizes, kept = 10_000, [], []
    monkeypatch.setattr(module, "MAX_LOGIT_BYTES", limit)
    entropy = F.cross_entropy
    monkeypatch.setattr(
        module.F, "cross_entropy", lambda x, *a, **k: (sizes.append(x.nbytes), entropy(x, *a, **k))[1]
    )
    model = small_model(dtype=dtype)
    model.lm_head.register_forward_hook(lambda head, inputs, output: sizes.append(output.nbytes))
    head = model.lm_head.weight.untyped_storage().data_ptr()

    def keep(t):
        if t.shape[-1:] == (61,) and t.untyped_storage().data_ptr() != head:
            kept.append(t.nbytes)
        return t

    ids = random_ids(61, 4, 50)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model.loss(ids, ids)
    assert sum(kept) <= limit
    loss.backward()
    with torch.no_grad():
        model.loss(ids, ids)
    assert len(sizes) > 10 and max(sizes) <= limit


def test_the_limit_is_64_megabytes():
    assert module.MAX_LOGIT_BYTES == 64_000_000


def test_logits_are_float32_or_float64():
    ids = random_ids(61, 2, 9)
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        model = small_model(dtype=dtype, num_nextn_predict_layers=1)
        out = model(ids)
        assert out.logits.dtype == model.loss(ids, ids).dtype == expected
        assert model.draft(ids, out.hidden_BLD)[0].dtype == expected
        assert out.state.layers[0].ssm_BHPN.dtype == expected and out.state.layers[0].conv_BKC.dtype == dtype


def test_a_bfloat16_model_computes_nearly_alike():
    """With weights rounded alike, the difference is activations' rounding: per cent, not factors."""
    model, ids = small_model("M*-M", dtype=torch.bfloat16), random_ids(61, 2, 20)
    same = HybridLM(model.config, dtype=torch.float64)
    same.load_state_dict(model.state_dict())
    assert error(model(ids).logits, same(ids).logits) < 0.1


@pytest.mark.parametrize("change", [
    lambda m: m.bfloat16(),
    lambda m: m.half(),
    lambda m: m.to(torch.bfloat16),
    lambda m: m.to("cpu", torch.bfloat16),
    lambda m: copy.deepcopy(m).bfloat16(),
    lambda m: pickle.loads(pickle.dumps(m)).bfloat16(),
])  # fmt: skip
def test_router_bias_stays_float32(change):
    """Close experts would change places; and the value may not have been rounded on the way."""
    model = small_model("EM", dtype=torch.float32)
    bias = model.model.layers[0].mixer.gate.e_score_correction_bias.clone()
    assert not torch.equal(bias.bfloat16().float(), bias)
    changed = change(model)
    assert changed.lm_head.weight.dtype.itemsize == 2
    assert torch.equal(changed.model.layers[0].mixer.gate.e_score_correction_bias, bias)
    assert changed.double().model.layers[0].mixer.gate.e_score_correction_bias.dtype == torch.float64


@torch.no_grad()
def test_half_precision_routes_as_float32_does():
    model, ids = small_model("E", dtype=torch.float32), random_ids(61, 2, 30)
    chosen = []
    for m in (model, copy.deepcopy(model).bfloat16()):
        router = m.model.layers[0].mixer.gate
        weights = model.model.layers[0].mixer.gate.weight.bfloat16()
        router.weight.copy_(weights)
        x = model.model.embeddings(ids).flatten(0, 1).bfloat16()
        chosen.append(router(x)[0].sort().values)
    assert torch.equal(*chosen)


def test_a_550B_model_is_built_without_memory_at_once():
    config = catalog.model("nemotron-3-ultra-550b-a55b").config
    start = time.process_time()
    model = HybridLM(config, device="meta", dtype=torch.bfloat16)
    assert time.process_time() - start < 5
    trunk = {n: t for n, t in model.state_dict().items() if not n.startswith("mtp.")}
    assert sum(t.numel() for t in trunk.values()) == 549_308_993_536
    assert all(t.is_meta for t in model.state_dict().values())


def test_presets_run_and_keep_their_sizes():
    sizes = {}
    for name in ("tiny", "small", "awkward", "base-12gb"):
        model = HybridLM(HybridConfig.preset(name), device="meta")
        sizes[name] = sum(p.numel() for p in model.parameters())
    assert sizes["tiny"] < 1e6 and sizes["small"] <= 15e6 and sizes["base-12gb"] >= 100e6
    model = HybridLM(HybridConfig.preset("tiny"))
    ids = random_ids(256, 2, 20)
    model.loss(ids, ids).backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert unused and all(n.startswith("mtp.") for n in unused)


def test_names_are_those_of_transformers_in_memory():
    names = set(HybridLM(small_config("M*E-", num_nextn_predict_layers=1), device="meta").state_dict())
    assert {
        "model.embeddings.weight", "model.norm_f.weight", "lm_head.weight", "model.layers.0.norm.weight",
        "model.layers.0.mixer.in_proj.weight", "model.layers.0.mixer.conv1d.bias",
        "model.layers.0.mixer.A_log", "model.layers.1.mixer.q_proj.weight",
        "model.layers.2.mixer.gate.e_score_correction_bias",
        "model.layers.2.mixer.experts.up_proj", "model.layers.2.mixer.fc1_latent_proj.weight",
        "model.layers.2.mixer.shared_experts.down_proj.weight", "model.layers.3.mixer.up_proj.weight",
        "mtp.layers.0.eh_proj.weight", "mtp.layers.0.enorm.weight", "mtp.layers.0.hnorm.weight",
        "mtp.layers.0.norm.weight", "mtp.layers.0.mixer.o_proj.weight", "mtp.layers.1.norm.weight",
        "mtp.layers.1.mixer.experts.down_proj",
        "mtp.layers.1.final_layernorm.weight",
    } <= names  # fmt: skip


@pytest.fixture(scope="module")
def drafting():
    model = small_model("M*E", num_nextn_predict_layers=1)
    ids = random_ids(61, 2, 9)
    with torch.no_grad():
        hidden = model(ids).hidden_BLD
    return model, ids, F.pad(hidden[:, :-1], (0, 0, 1, 0))  # h of the token before; zeros before the first


@pytest.mark.parametrize("case", ["plain", "lengths", "packed"])
def test_losses_are_those_of_logits_and_drafts(drafting, case):
    """The second loss reads the block as decoding applies it; packed documents get what each has alone."""
    model, ids, _ = drafting
    targets, keywords = random_ids(61, 2, 9, seed=4), {}
    pieces = [(row, slice(0, 9)) for row in range(2)]
    if case == "lengths":
        keywords, pieces = {"lengths": [9, 4]}, [(0, slice(0, 9)), (1, slice(0, 4))]
    elif case == "packed":
        keywords = {"segment_ids": torch.tensor([[0] * 4 + [1] * 5, [0] * 9])}
        pieces = [(0, slice(0, 4)), (0, slice(4, 9)), (1, slice(0, 9))]
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    with torch.no_grad():
        for row, part in pieces:
            x, y = ids[row : row + 1, part], targets[row : row + 1, part]
            out = model(x)
            drafts, *_ = model.draft(x, F.pad(out.hidden_BLD[:, :-1], (0, 0, 1, 0)))
            sums += torch.stack([lm_loss(out.logits, y), lm_loss(drafts, y)]) * y.numel()
            count += y.numel()
    found = torch.stack(model.losses(ids, targets, **keywords))
    assert error(found, sums / count) < 1e-12
    assert found[0] == model.loss(ids, targets, **keywords)


def test_losses_need_the_block():
    model, ids = small_model("M*E"), random_ids(61, 2, 9)
    with pytest.raises(ValueError, match="no MTP block"):
        model.losses(ids, ids)


@torch.no_grad()
def test_draft_has_logits_hidden_and_a_state(drafting):
    model, ids, before = drafting
    logits, hidden, state = model.draft(ids, before)
    assert logits.shape == (2, 9, 61) and hidden.shape == (2, 9, 32) and state.lengths == (9, 9)
    assert error(logits, hidden @ model.lm_head.weight.T) < 1e-12, "the head is the trunk's own"
    assert error(model.mtp(model.model.embeddings(ids), before)[0], hidden) < 1e-12


@pytest.mark.parametrize("cuts", [(1,) * 9, (4, 5), (8, 1)])
@torch.no_grad()
def test_draft_in_calls_equals_one_call(drafting, cuts):
    model, ids, before = drafting
    whole = model.draft(ids, before)[0]
    state, parts = None, []
    for part, h in zip(ids.split(cuts, 1), before.split(cuts, 1)):
        logits, _, state = model.draft(part, h, state)
        parts.append(logits)
    assert error(torch.cat(parts, 1), whole) < 1e-11


@torch.no_grad()
def test_draft_is_applied_to_its_own_output(drafting):
    """Three guesses ahead: each application reads the one before, with and without a kept state."""
    model, ids, before = drafting
    _, hidden, state = model.draft(ids, before)
    tokens, hs = [ids], [before]
    for step in range(3):
        token, last = random_ids(61, 2, 1, seed=step), hidden[:, -1:]
        logits, hidden, state = model.draft(token, last, state)
        tokens.append(token)
        hs.append(last)
        again = model.draft(torch.cat(tokens, 1), torch.cat(hs, 1))[0]
        assert error(logits, again[:, -1:]) < 1e-11
    other = model.draft(token, before[:, -1:], None)[0]
    assert error(logits, other) > 1e-3


@torch.no_grad()
def test_draft_and_trunk_do_not_touch_each_other(drafting):
    model, ids, before = drafting
    bare = small_model("M*E")
    bare.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("mtp.")})
    assert torch.equal(bare(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="num_nextn_predict_layers=1"):
        bare.draft(ids, before)
    with pytest.raises(ValueError, match="token id 99"):
        model.draft(torch.full_like(ids, 99), before)


def test_gradients_are_finite_from_a_fresh_start():
    torch.manual_seed(0)
    model, ids = HybridLM(HybridConfig.preset("tiny")), random_ids(256, 4, 40)
    first = model.loss(ids, ids.roll(-1, 1))
    assert abs(float(first.detach()) - torch.log(torch.tensor(256.0))) < 0.3
    first.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_few_steps_learn_a_repeated_text():
    torch.manual_seed(0)
    model = HybridLM(HybridConfig.preset("tiny", num_nextn_predict_layers=0))
    ids = random_ids(256, 1, 12).repeat(2, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1.0


@torch.no_grad()
def test_scrambled_weights_make_every_part_count():
    """The other tests would prove little if a layer hardly changed the logits."""
    model, ids = small_model("M*E-"), random_ids(61, 2, 12)
    whole = model(ids).logits
    for layer in range(4):
        broken = copy.deepcopy(model)
        for name, p in broken.model.layers[layer].named_parameters():
            if name.endswith(
                ("out_proj.weight", "o_proj.weight", "down_proj.weight", "fc2_latent_proj.weight")
            ):
                p.zero_()
        assert error(broken(ids).logits, whole) > 0.01, layer
    assert error(scramble(copy.deepcopy(model), 1)(ids).logits, whole) > 0.1


def test_reset_draws_every_weight_anew():
    model = small_model(dtype=torch.float32)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7.0)
    model.reset_parameters()
    assert not any((tensor == 7).any() for tensor in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def test_a_state_that_is_none_of_ours_is_named():
    model, ids = small_model("MEM*E"), random_ids(61, 1, 3)
    out = model(ids)
    with pytest.raises(ValueError, match="such as out.state"):
        model(ids, out)
    with pytest.raises(ValueError, match="another model"):
        small_model("*EM*E")(ids, out.state)


@torch.no_grad()
def test_the_recurrence_stays_in_float32_under_autocast(monkeypatch):
    """The state's error would be carried on: 4e-3 where its products are bfloat16."""
    from minimoe.layers import mamba2

    seen = []

    def watch(*parts):
        y, state = mamba2_chunked(*parts)
        seen.append(error(state, mamba2_chunked(*(p.double() if isinstance(p, torch.Tensor) else p for p in parts))[1]))
        return y, state

    mamba2_chunked = mamba2.ssd_chunked
    monkeypatch.setattr(mamba2, "ssd_chunked", watch)
    layer = small_model("M", dtype=torch.float32, num_nextn_predict_layers=0).model.layers[0].mixer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(normal(1, 40, layer.in_proj.in_features, dtype=torch.float32))
    assert len(seen) == 1 and seen[0] < 1e-5
