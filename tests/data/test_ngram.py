"""The n-gram model: probabilities that sum to one, a chain whose best loss is known, and Kneser-Ney by hand."""

import math

import numpy as np
import pytest

from minimoe.data.ngram import NGram, NGramError


def markov(count: int, vocabulary: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A chain of random transitions, and a text drawn from it."""
    random = np.random.default_rng(seed)
    transitions = random.dirichlet(np.full(vocabulary, 0.5), vocabulary)
    ids = [0]
    for draw in random.random(count - 1):
        ids.append(min(int(np.searchsorted(transitions[ids[-1]].cumsum(), draw)), vocabulary - 1))
    return transitions, np.array(ids)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one(order):
    """After contexts that were seen, that were seen in part, and that never were."""
    random = np.random.default_rng(1)
    ids = random.zipf(1.3, 3000) % 40  # rare tokens and common ones, as in text
    model = NGram(ids, 45, order)
    contexts = [ids[at : at + 4] for at in (0, 7, 900)] + [[44, 44, 44, 44], [44, 44, 44, ids[3]], [], [ids[5]]]
    for context in contexts:
        p_V = model.next_probabilities(context)
        assert p_V.shape == (45,) and p_V.min() > 0, "a token that was never seen may come"
        assert p_V.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_many_at_once_are_one_at_a_time(order):
    _, ids = markov(2000, vocabulary=20)
    model = NGram(ids, 23, order)
    asked = np.concatenate([ids[50:60], [22, 21, 22], ids[:20]])
    one_by_one = [model.next_probabilities(asked[:at])[asked[at]] for at in range(1, len(asked))]
    assert np.exp(model.log_probabilities(asked)) == pytest.approx(np.array(one_by_one), rel=1e-12)


def test_it_reaches_the_entropy_of_a_known_chain():
    transitions, ids = markov(60_000)
    _, fresh = markov(60_000)
    train, held_out = ids[:40_000], fresh[40_000:]
    state = np.linalg.matrix_power(transitions, 200)[0]
    entropy = -(state[:, None] * transitions * np.log(np.maximum(transitions, 1e-300))).sum()
    loss = -NGram(train, 6, 2).log_probabilities(held_out).mean()
    assert loss == pytest.approx(entropy, rel=0.01)
    alone = -NGram(train, 6, 1).log_probabilities(held_out).mean()
    # the chain looks one token back: without that it is worse, and looking further back gains nothing
    assert alone > entropy * 1.1
    assert -NGram(train, 6, 4).log_probabilities(held_out).mean() == pytest.approx(entropy, rel=0.03)


def test_orders_help_where_the_past_matters():
    """Each token is the sum of the two before it: a pair of tokens tells all, one tells nothing."""
    random, ids = np.random.default_rng(0), [1, 2]
    for _ in range(40_000):
        ids.append((ids[-1] + ids[-2] + int(random.integers(2))) % 11)
    losses = [-NGram(ids[:36_000], 11, order).log_probabilities(ids[36_000:]).mean() for order in (1, 2, 3)]
    assert losses[0] == pytest.approx(math.log(11), abs=0.02) and losses[1] > 2.3
    assert losses[2] == pytest.approx(math.log(2), abs=0.05)


def test_a_bigram_model_by_hand():
    """Too little text to estimate discounts: 0.5 from a count of 1, 1 from 2, 1.5 from more."""
    a, b, c = 0, 1, 2
    model = NGram([a, b, a, b, a, c], 4, 2)  # ab twice, ba twice, ac once
    # continuations: before a stands b, before b stands a, before c stands a: one each, each discounted by 0.5
    single = {a: (0.5 + 1.5 / 4) / 3, b: (0.5 + 1.5 / 4) / 3, c: (0.5 + 1.5 / 4) / 3, 3: 1.5 / 4 / 3}
    after_a = [(kept + 1.5 * single[w]) / 3 for w, kept in ((a, 0), (b, 2 - 1), (c, 1 - 0.5), (3, 0))]
    assert model.next_probabilities([a]) == pytest.approx(np.array(after_a))
    assert model.next_probabilities([c]) == pytest.approx(np.array(list(single.values()))), "c ended the text"
    assert model.log_probabilities([a, b])[0] == pytest.approx(math.log(after_a[1]))


def test_a_token_that_follows_one_word_only_is_a_poor_guess_elsewhere():
    """Kneser-Ney's point: "Francisco" is frequent, but only after "San"."""
    san, francisco, other, unknown = 0, 1, 2, 9
    ids = []
    for k in range(40):
        ids += [san, francisco, 3 + k % 6, other]
    after_unknown = NGram(ids, 10, 2).next_probabilities([unknown])
    assert ids.count(francisco) == ids.count(other) == 40
    assert after_unknown[other] > 3 * after_unknown[francisco]


def test_samples_follow_the_chain():
    transitions, ids = markov(30_000)
    model = NGram(ids, 6, 2)
    drawn = np.array([0] + model.sample([0], 4000, 1.0, np.random.default_rng(5)))
    counts = np.zeros((6, 6))
    np.add.at(counts, (drawn[:-1], drawn[1:]), 1)
    rows = counts.sum(1) > 200
    assert rows.sum() >= 3
    assert np.abs(counts / counts.sum(1, keepdims=True) - transitions)[rows].max() < 0.08
    greedy = model.sample([0], 5, 0.0, np.random.default_rng(0))
    assert greedy[0] == transitions[0].argmax() and greedy == model.sample([0], 5, 0.0, np.random.default_rng(9))
    assert model.sample([0], 50, 1.0, np.random.default_rng(1), stop=[greedy[0]])[-1] == greedy[0]


def test_misuse_is_one_line():
    with pytest.raises(NGramError, match=r"order=6 with a vocabulary of 4096: .* choose a lower order"):
        NGram([1, 2, 3], 4096, 6)
    NGram(np.arange(9), 4096, 5)
    with pytest.raises(NGramError, match="2 tokens hold no 3-gram"):
        NGram([1, 2], 5, 3)
    with pytest.raises(NGramError, match="token id 5 is outside the vocabulary 0..4"):
        NGram([1, 5, 2], 5, 2)
    with pytest.raises(NGramError, match="token id -1 is outside"):
        NGram([1, 2, 3], 5, 2).log_probabilities([-1])
