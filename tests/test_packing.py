"""Splits, padding and packing: whatever the calls look like, a document gets the logits it has alone."""

import pytest
import torch
from core_helpers import alone, clear_of_ties, error, feed, random_calls, random_ids, small_model

from minimoe.packing import make_span

PATTERNS = ["M", "*", "ME*-", "MEM*E", "*M*M", "-*EM"]
EXACT = {torch.float64: 1e-11, torch.float32: 5e-5}


def documents(seed, lengths, vocab=61):
    return [random_ids(vocab, 1, n, seed=100 * seed + i)[0] for i, n in enumerate(lengths)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "cuts", [(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1), (7, 4), (1, 10), (10, 1), (4, 4, 3), (2, 1, 5, 1, 2)]
)
@torch.no_grad()
def test_any_split_into_calls_equals_one_call(pattern, cuts):
    model, ids = small_model(pattern), random_ids(61, 2, 11)
    whole = model(ids)
    state, parts = None, []
    for part in ids.split(cuts, 1):
        out = model(part, state)
        state = out.state
        parts.append(out.logits)
    assert error(torch.cat(parts, 1), whole.logits) < 1e-11
    for ours, theirs in zip(state.layers, whole.state.layers, strict=True):
        if ours is not None:
            names = ("k", "v") if hasattr(ours, "k") else ("conv_BKC", "ssm_BHPN")
            for name in names:
                assert error(getattr(ours, name), getattr(theirs, name)) < 1e-11, name


@torch.no_grad()
def test_the_split_test_notices_a_lost_state():
    """Dropping any one layer's state changes the logits measurably, so the tests above can fail."""
    model, ids = small_model(), random_ids(61, 2, 11)
    whole, head = model(ids).logits[:, 6:], model(ids[:, :6])
    for dropped, layer in enumerate(head.state.layers):
        if layer is None:
            continue
        layers = list(head.state.layers)
        layers[dropped] = layer.map(torch.zeros_like)
        assert (
            error(model(ids[:, 6:], type(head.state)(tuple(layers), head.state.lengths)).logits, whole) > 1e-3
        )


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_right_padded_rows_equal_rows_alone(pattern):
    model, rows = small_model(pattern), [[d] for d in documents(1, [9, 1, 4, 12, 0])]
    got, out = feed(model, rows, [[9, 1, 4, 12, 0]], packed=False, extra=3)
    assert out.state.lengths == (9, 1, 4, 12, 0)
    for row, logits in zip(rows, got):
        if len(row[0]):
            assert error(logits, alone(model, row)) < 1e-11


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_packed_documents_equal_documents_alone(pattern):
    model, rows = small_model(pattern), [documents(1, [5, 1, 1, 4]), documents(2, [1, 9, 1])]
    got, _ = feed(model, rows, [[11, 11]])
    for row, logits in zip(rows, got):
        assert error(logits, alone(model, row)) < 1e-11
        assert error(model(torch.cat(row)[None]).logits[0], logits) > 1e-3 or pattern in ("-", "E")


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_packing_padding_and_splits_together(pattern, seed, dtype):
    check_everything_together(pattern, seed, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("seed", range(100, 300))
@torch.no_grad()
def test_packing_padding_and_splits_together_many_times(seed, dtype):
    check_everything_together(PATTERNS[seed % len(PATTERNS)], seed, dtype)


def check_everything_together(pattern, seed, dtype):
    random = torch.Generator().manual_seed(seed)
    choose = lambda low, high, n: torch.randint(low, high, (n,), generator=random).tolist()  # noqa: E731
    model = small_model(
        pattern, seed=seed, dtype=dtype, chunk_size=choose(1, 8, 1)[0], conv_kernel=choose(2, 6, 1)[0]
    )
    rows = [documents(seed * 10 + r, choose(1, 12, choose(1, 5, 1)[0])) for r in range(3)]
    calls = random_calls([sum(map(len, row)) for row in rows], seed)
    got, _ = feed(model, rows, calls, extra=choose(0, 3, 1)[0], seed=seed)
    for row, logits in zip(rows, got):
        if dtype == torch.float32:  # rounding may reorder experts with nearly equal scores
            assert all(clear_of_ties(model, doc[None]).all() for doc in row), "choose another seed"
        assert error(logits, alone(model, row)) < EXACT[dtype]


@torch.no_grad()
def test_padding_may_hold_anything():
    """Other ids behind the end of a row change neither its logits nor its state."""
    model, ids = small_model(), random_ids(61, 2, 9)
    first = model(ids, lengths=[9, 4])
    ids[1, 4:] = (ids[1, 4:] + 7) % 61
    second = model(ids, lengths=[9, 4])
    assert torch.equal(first.logits[0], second.logits[0]) and torch.equal(
        first.logits[1, :4], second.logits[1, :4]
    )
    token = random_ids(61, 2, 1, seed=5)
    assert torch.equal(model(token, first.state).logits, model(token, second.state).logits)


@torch.no_grad()
def test_a_row_of_no_tokens_waits():
    """lengths 0 in a first call, in a middle one, and for all rows at once."""
    model, ids = small_model(), random_ids(61, 2, 6)
    whole = model(ids).logits
    out = model(ids[:, :2], lengths=[2, 0])
    assert error(out.logits[0], whole[0, :2]) < 1e-11 and out.state.lengths == (2, 0)
    other = torch.stack([ids[0, 2:4], ids[1, :2]])
    out = model(other, out.state, lengths=[0, 2])
    assert error(out.logits[1], whole[1, :2]) < 1e-11 and out.state.lengths == (2, 2)
    out = model(other, out.state, lengths=[0, 0])
    assert out.state.lengths == (2, 2)
    out = model(ids[:, 2:], out.state)
    assert error(out.logits, whole[:, 2:]) < 1e-11


@torch.no_grad()
def test_an_id_that_comes_back_is_a_new_document():
    model, (a, b, c) = small_model(), documents(3, [4, 3, 5])
    ids = torch.cat([a, b, c])[None]
    segment_ids = torch.tensor([[7] * 4 + [3] * 3 + [7] * 5])
    assert error(model(ids, segment_ids=segment_ids).logits[0], alone(model, [a, b, c])) < 1e-11
    one = model(ids[:, :7], segment_ids=segment_ids[:, :7])
    assert (
        error(model(ids[:, 7:], one.state, segment_ids=segment_ids[:, 7:]).logits[0], alone(model, [c]))
        < 1e-11
    )


@torch.no_grad()
def test_packed_state_goes_on_without_segment_ids():
    """A call without them continues the document that each row is in."""
    model, (a, b) = small_model(), documents(3, [4, 8])
    first = model(torch.cat([a, b[:5]])[None], segment_ids=torch.tensor([[0] * 4 + [1] * 5]))
    assert error(model(b[None, 5:], first.state).logits[0], model(b[None]).logits[0, 5:]) < 1e-11


@torch.no_grad()
def test_one_document_a_row_changes_nothing():
    model, ids = small_model(), random_ids(61, 2, 9)
    assert error(model(ids, segment_ids=torch.full((2, 9), 5)).logits, model(ids).logits) < 1e-11


def test_span_numbers_documents_and_their_first_keys():
    ids = torch.zeros(1, 6, dtype=torch.long)
    span, document, started = make_span(ids, None, None, torch.tensor([[4, 4, 9, 9, 9, 4]]))
    assert span.run_BL.tolist() == [[0, 0, 1, 1, 1, 2]] and span.first_key_BL.tolist() == [[0, 0, 2, 2, 2, 5]]
    assert document.tolist() == [4] and started.tolist() == [5] and span.total == (6,)
    plain, document, started = make_span(ids, None, None, None)
    assert (
        plain.run_BL is plain.valid_BL is plain.first_key_BL is document is started is None
        and not plain.padded
    )


@pytest.mark.parametrize("keywords, words", [
    (dict(lengths=[3]), "lengths has 1 entries for 2 rows"),
    (dict(lengths=[3, 7]), "lengths has 7"),
    (dict(lengths=[3, -1]), "lengths has -1"),
    (dict(segment_ids=torch.zeros(2, 5, dtype=torch.long)), "segment_ids"),
])  # fmt: skip
def test_lengths_and_segments_that_do_not_fit_are_refused(keywords, words):
    with pytest.raises(ValueError, match=words) as caught:
        small_model()(random_ids(61, 2, 6), **keywords)
    assert "\n" not in str(caught.value)


def test_states_that_do_not_fit_are_refused():
    model, ids = small_model(), random_ids(61, 2, 6)
    state = model(ids).state
    for call, words in (
        (lambda: model(ids[:1], state), "select"),
        (lambda: model(ids, state, segment_ids=torch.zeros_like(ids)), "from the first call on"),
        (lambda: small_model("M")(ids, state), "layers"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
def test_training_through_calls_gives_the_gradients_of_one_call(packed):
    """Back-propagation through the states, ragged and packed."""
    model = small_model()
    rows = (
        [documents(1, [5, 4]), documents(2, [3, 1, 2])] if packed else [documents(1, [9]), documents(2, [6])]
    )
    lengths = [sum(map(len, row)) for row in rows]
    grads = []
    for calls in ([lengths], random_calls(lengths, seed=3, most=4)):
        model.zero_grad()
        got, _ = feed(model, rows, calls, packed=packed)
        sum((g.log_softmax(-1)[:, 3] * torch.arange(1, len(g) + 1)).sum() for g in got).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == {n for n, _ in model.named_parameters()}
    for name, grad in grads[0].items():
        assert error(grads[1][name], grad) < 1e-9, name
