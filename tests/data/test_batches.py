"""Tokens of a corpus and the windows drawn from them."""

import numpy as np
import pytest
import torch

from minimoe.data import Batches, Corpus, CorpusError, Tokenizer, Tokens, encode_corpus


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


def test_in_order_reads_each_token_once():
    parts = windows().in_order()
    ids = torch.cat([ids for ids, _ in parts]).flatten()
    targets = torch.cat([targets for _, targets in parts]).flatten()
    assert torch.equal(ids, torch.arange(992)) and torch.equal(targets, ids + 1)


def test_too_few_tokens_are_one_line():
    with pytest.raises(CorpusError, match="999 tokens are fewer than one window of 999 \\+ 1"):
        Batches(Tokens(np.zeros(999, np.uint16), 1), batch=1, length=999)
    Batches(Tokens(np.zeros(1000, np.uint16), 1), batch=1, length=999)(0)
