"""llama.cpp's MTP graph against our own block: states, logits, drafts; and no abort where there is none."""

import numpy as np
import pytest
import torch
from core_helpers import clear_of_ties
from llama_files import VOCABULARY, tiny_model, tokenizer

from minimoe.ggml import LlamaError
from minimoe.runtime.llamacpp import load, logits
from minimoe.runtime.mtp import LlamaMTP, shift

IDS = tokenizer().encode("class TextWrapper:\n    def __init__(self, width=70):\n        self.width = width\n")


@pytest.fixture(scope="module")
def llama(tiny_file):
    return load(tiny_file, exact=True, mtp=True)


@pytest.fixture
def block(llama):
    with LlamaMTP(llama) as block:
        yield block


@torch.no_grad()
def ours(ids, hidden=None):
    """Our trunk's states, and our block's logits and states for them (or for ``hidden``)."""
    model, ids = tiny_model(), torch.tensor([ids])
    trunk_BLD = model(ids).hidden_BLD
    given_BLD = torch.from_numpy(shift(trunk_BLD[0].numpy()) if hidden is None else hidden)[None]
    out_BLD, _ = model.mtp(model.model.embeddings(ids), given_BLD)
    return trunk_BLD[0].numpy(), model.lm_head(out_BLD)[0].numpy(), out_BLD[0].numpy()


def close(theirs, ours, rows=slice(None)):
    assert theirs.shape == ours.shape
    assert np.abs(theirs - ours)[rows].max() < 3e-5 * np.abs(ours).max()


def clear(ids):
    rows = clear_of_ties(tiny_model(), torch.tensor([ids]))[0].numpy()
    assert rows.mean() > 0.9
    return rows


def test_the_trunks_states_are_after_the_final_norm(block, llama):
    theirs, hidden = block.trunk(IDS)
    close(hidden, ours(IDS)[0], clear(IDS))
    assert (theirs == logits(llama, IDS)).all(), "asking for states changes no logits"
    with torch.no_grad():
        from_hidden = tiny_model().lm_head(torch.from_numpy(hidden)).numpy()
    close(from_hidden, theirs)


def test_logits_and_states(block):
    hidden = block.trunk(IDS)[1]
    theirs, states = block(IDS, shift(hidden))
    _, our_logits, our_states = ours(IDS)
    close(theirs, our_logits, clear(IDS))
    close(states, our_states, clear(IDS))


def test_reading_on_is_reading_at_once(block):
    given = np.random.default_rng(0).normal(size=(len(IDS), tiny_model().config.hidden_size)).astype(np.float32)
    whole = block(IDS, given)
    assert block.length == len(IDS)
    block.reset()
    parts = [block(IDS[a:b], given[a:b]) for a, b in ((0, 5), (5, 6), (6, len(IDS)))]
    for n in range(2):
        np.testing.assert_allclose(np.concatenate([part[n] for part in parts]), whole[n], atol=1e-4)


def test_parts_of_a_batch(tiny_file):
    small = load(tiny_file, exact=True, mtp=True, n_batch=16)
    assert len(IDS) > 20
    with LlamaMTP(small) as block:
        hidden = block.trunk(IDS)[1]
        close(hidden, ours(IDS)[0], clear(IDS))
        close(block(IDS, shift(hidden))[0], ours(IDS)[1], clear(IDS))


def test_chained_drafts(block):
    """Each draft reads the block's own last state in the trunk's place."""
    drafts = block.draft(IDS, 4)
    model, (trunk, _, _) = tiny_model(), ours(IDS)
    with torch.no_grad():
        token = int(model.lm_head(torch.from_numpy(trunk[-1])).argmax())
    ids, hidden, expected = [*IDS, token], np.concatenate([shift(trunk), trunk[-1:]]), [token]
    for _ in range(4):
        _, our_logits, our_states = ours_at_the_end(ids, hidden)
        expected.append(int(our_logits.argmax()))
        ids, hidden = [*ids, expected[-1]], np.concatenate([hidden, our_states[None]])
    assert drafts == expected
    assert drafts == block.draft(IDS, 4), "from the start again"


def ours_at_the_end(ids, hidden):
    trunk, our_logits, our_states = ours(ids, hidden)
    return trunk, our_logits[-1], our_states[-1]


def test_what_state_stands_beside_a_token_matters(block):
    """States one place off give other logits: the test above can fail."""
    hidden = block.trunk(IDS)[1]
    right = block(IDS, shift(hidden))[0]
    block.reset()
    assert np.abs(block(IDS, hidden)[0] - right).max() > 0.1


def test_misuse_is_one_line(block, plain_file, tiny_file):
    with pytest.raises(LlamaError, match="plain.gguf has no MTP block"):
        LlamaMTP(load(plain_file))
    with pytest.raises(LlamaError, match=r"was not loaded: use load\(path, mtp=True\)"):
        LlamaMTP(load(tiny_file))
    width = tiny_model().config.hidden_size
    with pytest.raises(LlamaError, match=r"hidden has shape \(2, 3\), 2 tokens need"):
        block([1, 2], np.zeros((2, 3)))
    with pytest.raises(LlamaError, match="outside the vocabulary"):
        block([VOCABULARY], np.zeros((1, width)))
    with pytest.raises(LlamaError, match="513 tokens do not fit"):
        block.trunk([1] * 513)
    block([1] * 500, np.zeros((500, width)))
    with pytest.raises(LlamaError, match="13 tokens do not fit, the context has room for 12"):
        block([1] * 13, np.zeros((13, width)))


def test_closing_in_any_order(tiny_file):
    llama = load(tiny_file, mtp=True)
    first, second = LlamaMTP(llama), LlamaMTP(llama)
    first.close()
    first.close()
    with pytest.raises(LlamaError, match="this MTP block is closed"):
        first([1], np.zeros((1, 64)))
    llama.close()
    for call in (lambda: second([1], np.zeros((1, 64))), lambda: second.trunk([1]), lambda: LlamaMTP(llama)):
        with pytest.raises(LlamaError, match="is closed"):
            call()
    second.close()
