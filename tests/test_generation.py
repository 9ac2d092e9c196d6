"""Generation: what is picked, where it stops, and that the batch around a row changes nothing."""

import math

import pytest
import torch
from core_helpers import random_ids, small_model

from minimoe import generate, generation
from minimoe.generation import pick, prefill


@pytest.fixture
def model():
    """A copy for each test: some change its config. A few of its ids follow each other in an uneven way."""
    return small_model(dtype=torch.float64)


def prompt_rows(lengths, seed=0):
    return [random_ids(61, 1, n, seed=seed + n)[0].tolist() for n in lengths]


@torch.no_grad()
def by_hand(model, row, steps):
    """The likeliest next token, again and again, each from the whole text."""
    ids = list(row)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(row) :]


def test_greedy_takes_the_likeliest_token(model):
    (row,) = prompt_rows([7])
    expected = by_hand(model, row, 15)
    assert len(set(expected)) > 3, "a constant text would prove little"
    g = generate(model, [row], max_new_tokens=15)
    assert g.ids == [expected] and g.finish_reason == ["length"]
    assert generate(model, torch.tensor([row]), max_new_tokens=15).ids == [expected]


def test_ragged_batch_equals_each_row_alone(model):
    rows = prompt_rows([5, 1, 12, 8])
    together = generate(model, rows, max_new_tokens=12)
    for row, ids in zip(rows, together.ids):
        assert ids == generate(model, [row], max_new_tokens=12).ids[0] == by_hand(model, row, 12)


def test_rows_that_end_early_leave_the_others_alone(model):
    rows = prompt_rows([5, 1, 12, 8])
    free = generate(model, rows, max_new_tokens=12).ids
    end = free[2][3]
    g = generate(model, rows, max_new_tokens=12, stop=[end])
    for ids, whole, reason in zip(g.ids, free, g.finish_reason):
        cut = whole.index(end) + 1 if end in whole else 12
        assert ids == whole[:cut]
        assert reason == ("stop" if end in whole else "length")
    assert g.ids[2] == free[2][: free[2].index(end) + 1]


def test_same_seed_same_text(model):
    rows = prompt_rows([5, 9])
    first = generate(model, rows, temperature=1.0, seed=3, max_new_tokens=20).ids
    assert generate(model, rows, temperature=1.0, seed=3, max_new_tokens=20).ids == first
    assert generate(model, rows, temperature=1.0, seed=4, max_new_tokens=20).ids != first
    torch.manual_seed(99)
    torch.rand(5)
    assert generate(model, rows, temperature=1.0, seed=3, max_new_tokens=20).ids == first, (
        "not the global generator"
    )


def test_sampling_does_not_depend_on_the_batch(model):
    rows = prompt_rows([5, 9, 2])
    together = generate(model, rows, temperature=1.0, seed=3, max_new_tokens=20).ids
    others = generate(
        model, [rows[0], *prompt_rows([4, 6, 1], seed=50)], temperature=1.0, seed=3, max_new_tokens=20
    ).ids
    assert others[0] == together[0]
    for r, row in enumerate(rows):
        assert generate(model, [row], temperature=1.0, seed=3 + r, max_new_tokens=20).ids[0] == together[r]
    same = generate(model, [rows[0]] * 3, temperature=1.0, seed=3, max_new_tokens=20).ids
    assert len({tuple(ids) for ids in same}) == 3, "equal prompts of a batch get different texts"


def test_sampling_without_a_seed_follows_torchs_own(model):
    (row,) = prompt_rows([5])
    torch.manual_seed(7)
    first = generate(model, [row], temperature=1.0, max_new_tokens=20).ids
    torch.manual_seed(7)
    assert generate(model, [row], temperature=1.0, max_new_tokens=20).ids == first


def test_top_k_of_one_is_greedy(model):
    rows = prompt_rows([5, 9])
    greedy = generate(model, rows, max_new_tokens=10).ids
    assert generate(model, rows, temperature=2.0, top_k=1, seed=0, max_new_tokens=10).ids == greedy
    assert generate(model, rows, temperature=2.0, top_p=1e-6, seed=0, max_new_tokens=10).ids == greedy


def shares(probabilities, draws=4000, **settings):
    """How often ``pick`` takes each id."""
    random = torch.Generator().manual_seed(0)
    settings = dict(temperature=1.0, top_p=1.0, top_k=0) | settings
    counts = torch.zeros(len(probabilities))
    for _ in range(draws):
        counts[pick(torch.log(torch.tensor(probabilities)), **settings, generator=random)] += 1
    return (counts / draws).tolist()


def near(found, expected):
    return all(abs(f - e) < 4.5 * math.sqrt(max(e * (1 - e), 1e-9) / 4000) for f, e in zip(found, expected))


def test_sampling_follows_the_probabilities():
    p = [0.15, 0.5, 0.05, 0.3]
    assert near(shares(p), p)
    assert not near(shares(p), [0.25] * 4), "the tolerance is too wide to notice a uniform draw"


@pytest.mark.parametrize(
    "top_p, kept",
    [(0.2, [1]), (0.49, [1]), (0.7, [1, 3]), (0.79, [1, 3]), (0.9, [0, 1, 3]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_likeliest_until_their_sum_reaches_p(top_p, kept):
    """The token that reaches p is still in; the rest is drawn as likely as before, over their sum."""
    p = [0.15, 0.5, 0.05, 0.3]
    total = sum(p[i] for i in kept)
    assert near(shares(p, top_p=top_p), [p[i] / total if i in kept else 0 for i in range(4)])


@pytest.mark.parametrize(
    "top_k, kept", [(1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k_keeps_the_k_likeliest(top_k, kept):
    p = [0.15, 0.5, 0.05, 0.3]
    total = sum(p[i] for i in kept)
    assert near(shares(p, top_k=top_k), [p[i] / total if i in kept else 0 for i in range(4)])


def test_top_p_counts_within_top_k():
    """k first: of 0.5, 0.3, 0.15 the share of the first is 0.526, so p = 0.51 keeps it alone."""
    assert shares([0.15, 0.5, 0.05, 0.3], draws=200, top_k=3, top_p=0.51) == [0, 1, 0, 0]
    assert near(shares([0.15, 0.5, 0.05, 0.3], top_p=0.51), [0, 0.625, 0, 0.375])


def test_temperature_divides_the_logits():
    p = [0.15, 0.5, 0.05, 0.3]
    for temperature in (0.5, 2.0):
        sharp = [x ** (1 / temperature) for x in p]
        assert near(shares(p, temperature=temperature), [x / sum(sharp) for x in sharp])
    assert shares(p, draws=50, temperature=1e-4) == [0, 1, 0, 0]
    assert shares(p, draws=1, temperature=0.0) == [0, 1, 0, 0]


def test_top_p_is_of_the_distribution_at_the_temperature():
    """At temperature 2 the likeliest has 0.38, so p = 0.45 keeps two; before it, one."""
    kept = shares([0.15, 0.5, 0.05, 0.3], draws=400, temperature=2.0, top_p=0.45)
    assert kept[3] > 0 and kept[0] == kept[2] == 0


def test_equal_logits_go_to_the_smallest_id_when_greedy():
    assert pick(torch.tensor([0.0, 3.0, 3.0, 1.0]), 0.0, 1.0, 0, None) == 1
    assert pick(torch.tensor([0.0, 3.0, 3.0, 1.0]), 1.0, 1.0, 1, torch.Generator().manual_seed(0)) == 1
    assert pick(torch.zeros(5000), 1.0, 1.0, 1, torch.Generator().manual_seed(0)) == 0


def test_top_p_of_one_refuses_nothing(monkeypatch):
    """Also with a vocabulary of 131,072, where a float32 running sum passes 1 before the end."""
    seen = []
    draw = torch.multinomial
    monkeypatch.setattr(
        torch, "multinomial", lambda p, *a, **k: (seen.append(int((p == 0).sum())), draw(p, *a, **k))[1]
    )
    logits = 3 * torch.randn(131_072, generator=torch.Generator().manual_seed(0))
    assert int((logits.softmax(0) == 0).sum()) == 0
    pick(logits, 1.0, 1.0, 0, torch.Generator().manual_seed(0))
    assert seen == [0]


def test_minus_infinity_is_never_drawn():
    logits = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    random = torch.Generator().manual_seed(0)
    assert {pick(logits, 1.0, 1.0, 0, random) for _ in range(100)} == {0, 2}


def test_stop_ids_and_sequences_end_a_row_and_are_kept(model):
    (row,) = prompt_rows([7])
    free = generate(model, [row], max_new_tokens=20).ids[0]
    g = generate(model, [row], max_new_tokens=20, stop=[free[4]])
    assert g.ids[0] == free[: free.index(free[4]) + 1] and g.finish_reason == ["stop"]

    pair = free[6:8]
    first = next(i for i in range(20) if free[i : i + 2] == pair)
    g = generate(model, [row], max_new_tokens=20, stop=[pair])
    assert g.ids[0] == free[: first + 2] and g.finish_reason == ["stop"]
    assert (
        generate(model, [row], max_new_tokens=20, stop=[tuple(free[5:9]), torch.tensor(pair).tolist()]).ids
        == g.ids
    )

    absent = next(i for i in range(61) if i not in free)
    g = generate(model, [row], max_new_tokens=20, stop=[absent, [free[3], absent]])
    assert g.ids[0] == free and g.finish_reason == ["length"]


def test_a_stop_sequence_does_not_reach_back_into_the_prompt(model):
    (row,) = prompt_rows([7])
    free = generate(model, [row], max_new_tokens=5).ids[0]
    g = generate(model, [row], max_new_tokens=5, stop=[[row[-1], free[0]]])
    assert g.ids[0] == free


def test_stop_at_the_last_allowed_token_is_a_stop(model):
    (row,) = prompt_rows([7])
    free = generate(model, [row], max_new_tokens=3).ids[0]
    assert free[2] not in free[:2]
    assert generate(model, [row], max_new_tokens=3, stop=[free[2]]).finish_reason == ["stop"]


@pytest.mark.parametrize(
    "form", [lambda i: i, lambda i: (i,), lambda i: (60, i), lambda i: [i]], ids=["id", "one", "two", "list"]
)
def test_end_of_text_comes_from_the_config(model, form):
    (row,) = prompt_rows([7])
    free = generate(model, [row], max_new_tokens=20).ids[0]
    model.config = model.config.replace(eos_token_id=form(free[4]))
    assert 60 not in free
    g = generate(model, [row], max_new_tokens=20)
    assert g.ids[0] == free[: free.index(free[4]) + 1] and g.finish_reason == ["stop"]


def test_tokens_are_announced_as_they_come(model):
    rows = prompt_rows([5, 1, 12])
    said = []
    free = generate(model, rows, max_new_tokens=8).ids
    g = generate(
        model,
        rows,
        max_new_tokens=8,
        stop=[free[1][2]],
        on_token=lambda row, token: said.append((row, token)),
    )
    for r in range(3):
        assert [token for row, token in said if row == r] == g.ids[r]
    expected = [(r, g.ids[r][t]) for t in range(8) for r in range(3) if t < len(g.ids[r])]
    assert said == expected, "step by step, rows in order"


def test_a_token_is_announced_before_the_next_is_computed(model):
    calls = []
    model.register_forward_pre_hook(lambda *a: calls.append("call"))
    generate(model, prompt_rows([5]), max_new_tokens=3, on_token=lambda row, token: calls.append("token"))
    assert calls == ["call", "token"] * 3


@pytest.mark.parametrize("limit", [1, 3, 4, 100])
def test_a_long_prompt_is_read_in_parts(model, monkeypatch, limit):
    rows = prompt_rows([11, 3, 8, 4])
    expected = [by_hand(model, row, 6) for row in rows]
    widths = []
    model.register_forward_pre_hook(lambda m, args, kw: widths.append(args[0].shape[1]), with_kwargs=True)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", limit)
    assert generate(model, rows, max_new_tokens=6).ids == expected
    assert max(widths) == min(limit, 11)


@torch.no_grad()
def test_prefill_returns_each_rows_last_logits(model, monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 4)
    rows = prompt_rows([11, 3, 8, 4])
    out = prefill(model, rows)
    assert out.state.lengths == (11, 3, 8, 4) and out.logits.shape == (4, 1, 61)
    for r, row in enumerate(rows):
        torch.testing.assert_close(
            out.logits[r, 0], model(torch.tensor([row])).logits[0, -1], rtol=0, atol=1e-10
        )


def test_generation_stops_where_the_context_is_full(model):
    rows = prompt_rows([9, 6])
    free = generate(model, rows, max_new_tokens=20).ids
    model.config = model.config.replace(max_position_embeddings=12)
    g = generate(model, rows, max_new_tokens=20)
    assert g.ids == [free[0][:3], free[1][:6]] and g.finish_reason == ["length"] * 2


def test_timings_count_every_step(model):
    g = generate(model, prompt_rows([5]), max_new_tokens=6)
    assert g.timings.prefill_s > 0 and len(g.timings.step_s) == 5 and g.timings.tokens_per_second > 0
    assert math.isnan(generate(model, prompt_rows([5]), max_new_tokens=1).timings.tokens_per_second)


def test_generation_keeps_no_graph_and_changes_no_weights(model):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()
    generate(model, prompt_rows([5]), max_new_tokens=3)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("prompts, settings, words", [
    ([], {}, "no prompt"),
    ([[]], {}, "prompt 0 is empty"),
    ([[1], []], {}, "prompt 1 is empty"),
    (torch.zeros(1, 0, dtype=torch.long), {}, "prompt 0 is empty"),
    ([[1, 61]], {}, "prompt 0 holds token id 61.*0..60"),
    ([[1], [-3]], {}, "prompt 1 holds token id -3"),
    ([[1] * 4096], {}, "4096 tokens.*max_position_embeddings"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ([[1]], {"temperature": -0.1}, "temperature=-0.1"),
    ([[1]], {"temperature": float("nan")}, "temperature=nan"),
    ([[1]], {"top_p": 0.0}, "top_p=0.0"),
    ([[1]], {"top_p": 1.1}, "top_p=1.1"),
    ([[1]], {"top_k": -1}, "top_k=-1"),
    ([[1]], {"stop": [[]]}, "empty sequence"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(model, prompts, settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        generate(model, prompts, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stop", [5, [[5], "no"], [2.5]])
def test_a_stop_that_is_no_list_of_ids_is_named(stop):
    model = small_model()
    with pytest.raises(ValueError, match="must be a list of ids and id lists"):
        generate(model, [[1, 2]], max_new_tokens=1, stop=stop)


def test_one_row_of_ids_is_told_to_be_wrapped():
    with pytest.raises(ValueError, match="rows of whole-number ids"):
        generate(small_model(), [1, 2, 3], max_new_tokens=1)


@pytest.mark.parametrize("prompts", ["hello", ["123"], [[1.9, 2.2]]])
def test_prompts_that_are_no_ids_are_named(prompts):
    with pytest.raises(ValueError, match="rows of whole-number ids"):
        generate(small_model(), prompts, max_new_tokens=1)


def test_a_tiny_temperature_is_the_likeliest_token():
    logits = torch.tensor([0.0, 3.0, 2.9])
    assert pick(logits, 1e-42, 1.0, 0, None) == 1
