"""Tokens of a corpus and the windows drawn from them."""

import numpy as np
import pytest
import torch

from minimoe.data import Batches, Corpus, CorpusError, Tokenizer, Tokens, encode_corpus
from minimoe.data.batches import in_order, split_documents


@pytest.fixture(scope="module")
def corpus():
    return Corpus("test", ("a", "b"), ("def f(x):\n    return x\n", "héllo <|im_end|> </s>"))


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return Tokenizer.train(corpus.texts, 270)


def test_documents_in_a_row_each_with_its_end(corpus, tokenizer):
    tokens = encode_corpus(corpus, tokenizer)
    ends = np.flatnonzero(tokens.ids == tokenizer.eos_id)
    assert len(ends) == 2 and ends[-1] == len(tokens) - 1  # "</s>" in a text is text
    assert tokenizer.decode(tokens.ids[: ends[0]].tolist()) == corpus.texts[0]
    assert tokenizer.decode(tokens.ids[ends[0] + 1 : ends[1]].tolist()) == corpus.texts[1]
    assert tokens.ids.dtype == np.uint16 and tokens.bytes == corpus.bytes == 23 + 22


def windows(**changes):
    return Batches(Tokens(np.arange(1000, dtype=np.uint16), 1000), **({"batch": 4, "length": 16, "seed": 3} | changes))


def test_targets_are_one_token_later():
    ids, targets = windows()(0)
    assert ids.shape == targets.shape == (4, 16) and ids.dtype == torch.int64
    assert torch.equal(ids + 1, targets)


def test_a_step_is_repeatable_and_no_step_is_like_another():
    first, again = windows(), windows()
    first(0)  # drawing one changes no other
    assert torch.equal(first(7)[0], again(7)[0])
    assert not torch.equal(first(7)[0], first(8)[0])
    assert not torch.equal(first(7)[0], windows(seed=4)(7)[0])


def test_every_window_can_be_drawn_the_last_one_too():
    batches = windows(length=998, batch=64)
    assert {int(start) for start in batches(0)[0][:, 0]} == {0, 1}


@pytest.mark.parametrize("batch", [1, 4, 5, 100])
def test_in_order_reads_each_token_once(batch):
    parts = list(in_order(Tokens(np.arange(1000, dtype=np.uint16), 1000), batch, 16))
    assert [len(ids) for ids, _ in parts] == [batch] * (62 // batch) + ([62 % batch] if 62 % batch else [])
    ids = torch.cat([ids for ids, _ in parts]).flatten()
    targets = torch.cat([targets for _, targets in parts]).flatten()
    assert torch.equal(ids, torch.arange(992)) and torch.equal(targets, ids + 1) and ids.dtype == torch.int64


def three_sources(shares):
    """Sources of very different sizes whose ids tell them apart."""
    sizes = ((0, 30), (10_000, 3000), (20_000, 300))
    return [(Tokens(np.arange(at, at + n, dtype=np.uint16), n), share) for (at, n), share in zip(sizes, shares)]


def drawn(batches, steps):
    """[sources] how often each was drawn; every window is checked to lie in one."""
    counts = np.zeros(3)
    for step in range(steps):
        ids, targets = batches(step)
        assert torch.equal(ids + 1, targets) and torch.equal(ids[:, :1] + torch.arange(ids.shape[1]), ids)
        for row in ids // 10_000:
            counts[row[0]] += 1
    return counts


def test_a_mixture_keeps_its_shares_whatever_the_sizes():
    counts = drawn(Batches(three_sources([2.0, 1.0, 1.0]), 16, 16, seed=1), 250)
    assert counts / counts.sum() == pytest.approx([0.5, 0.25, 0.25], abs=0.03)  # 4,000 draws: sd 0.008


def test_a_mixture_reads_the_whole_of_each_source():
    batches = Batches(three_sources([1, 1, 1]), 64, 16)
    starts = {int(start) for step in range(40) for start in batches(step)[0][:, 0]}
    assert {start for start in starts if start < 10_000} == set(range(14))  # 30 tokens hold 14 windows of 16 + 1
    assert max(starts) > 20_270


def test_a_mixture_is_repeatable_from_any_step():
    one, two = (Batches(three_sources([3, 1, 2]), 8, 16, seed=5) for _ in range(2))
    one(0), one(1)
    assert torch.equal(one(9)[0], two(9)[0]) and not torch.equal(one(9)[0], one(8)[0])


def test_one_source_in_a_list_is_that_source():
    [(tokens, _), *_] = three_sources([1, 1, 1])
    assert torch.equal(Batches(tokens, 4, 16, 3)(2)[0], Batches([(tokens, 7.0)], 4, 16, 3)(2)[0])


@pytest.mark.parametrize("share", [0, -1, float("nan")])
def test_a_share_that_is_none_is_one_line(share):
    with pytest.raises(CorpusError, match="share is .*: must be above 0"):
        Batches(three_sources([1, share, 1]), 4, 16)


def test_a_source_of_a_mixture_that_is_too_short_is_one_line():
    with pytest.raises(CorpusError, match="30 tokens are fewer than one window of 30 \\+ 1"):
        Batches(three_sources([1, 1, 1]), 4, 30)


def test_documents_are_numbered_and_no_document_guesses_the_next():
    end = 2
    ids = torch.tensor([[5, 6, 2, 7, 2, 2, 8, 9], [2, 5, 5, 5, 5, 5, 5, 2], [5, 5, 5, 5, 5, 5, 5, 5]])
    targets = torch.tensor([[6, 2, 7, 2, 2, 8, 9, 4], [5, 5, 5, 5, 5, 5, 2, 6], [5, 5, 5, 5, 5, 5, 5, 2]])
    segments, asked = split_documents(ids, targets, end)
    assert segments.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1], [0] * 8]
    assert asked.tolist() == [
        [6, 2, -100, 2, -100, -100, 9, 4], [-100, 5, 5, 5, 5, 5, 2, -100], [5, 5, 5, 5, 5, 5, 5, 2],
    ]  # fmt: skip
    assert targets[0, 2] == 7 and segments.dtype == torch.int64  # the given targets stay as they are


def test_too_few_tokens_are_one_line():
    with pytest.raises(CorpusError, match="999 tokens are fewer than one window of 999 \\+ 1"):
        Batches(Tokens(np.zeros(999, np.uint16), 1), batch=1, length=999)
    Batches(Tokens(np.zeros(1000, np.uint16), 1), batch=1, length=999)(0)
