"""An n-gram model: what counting alone knows about the next token, and so what a trained model has to beat.

Legend: N tokens of a text, V tokens in the vocabulary, M different n-grams, Q queries.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import MinimoeError

USUAL = (0.5, 1.0, 1.5)  # discounts where a text has too few rare n-grams to estimate them, as KenLM takes


class NGramError(MinimoeError):
    """An n-gram model that cannot be made; the message says what to change."""


class NGram:
    """Kneser-Ney smoothing, interpolated, with three discounts an order ("modified": Chen and Goodman 1999, section 3).

    .. math:: p_n(w | h) = \\frac{c_n(hw) - D_n(c_n(hw)) + \\gamma_n(h) \\, p_{n-1}(w | h')}{\\sum_v c_n(hv)}

    h are the n - 1 tokens before w, and h' is h without its oldest one. At the highest order c_n counts how often hw
    occurs; below it, how many different tokens were seen before hw: a token that follows one word only is a poor guess
    after others. gamma_n(h) is what the discounts D_n took from h's counts, so each p_n sums to one; p_0 = 1 / V.

    ids         [N] the text
    vocabulary  V; an n-gram is kept as one number in base V, so V ** order must stay below 2 ** 63
    order       n of the longest n-grams; a token is predicted from the order - 1 before it

    Raises NGramError for a text shorter than one n-gram, and for an order or ids that do not fit.
    """

    def __init__(self, ids: Sequence[int] | np.ndarray, vocabulary: int, order: int = 5) -> None:
        if order < 1 or vocabulary < 1 or vocabulary**order >= 2**63:
            raise NGramError(f"order={order} with a vocabulary of {vocabulary}: order must be at least 1 and "
                             "vocabulary ** order below 2 ** 63; choose a lower order")
        self.vocabulary, self.order = vocabulary, order
        ids_N = self._checked(ids)
        if len(ids_N) < order:
            raise NGramError(f"{len(ids_N)} tokens hold no {order}-gram; give more text or a lower order")
        grams = _codes(ids_N, vocabulary, order)
        self._tables: list[_Table] = []
        for n in range(order, 0, -1):
            # below the highest order each different longer n-gram counts once: whatever stands before is dropped
            keys_M, counts_M = np.unique(grams % vocabulary**n, return_counts=True)
            self._tables.insert(0, _Table(keys_M, counts_M, vocabulary))
            grams = keys_M

    def log_probabilities(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """[N - 1] ln p of each token but the first, given the (at most order - 1) tokens before it, in nats."""
        ids_N = self._checked(ids)
        p_N = np.full(len(ids_N), 1 / self.vocabulary)
        for n, table in enumerate(self._tables, 1):
            if n <= len(ids_N):
                p_N[n - 1 :] = table.mix(_codes(ids_N, self.vocabulary, n), p_N[n - 1 :])
        return np.log(p_N[1:])

    def next_probabilities(self, context: Sequence[int] | np.ndarray) -> np.ndarray:
        """[V] p of every token after ``context``, of which the last order - 1 tokens count."""
        context = self._checked(context)
        p_V = np.full(self.vocabulary, 1 / self.vocabulary)
        for n, table in enumerate(self._tables[: len(context) + 1], 1):
            code = int(_codes(context[len(context) - n + 1 :], self.vocabulary, n - 1)[0]) if n > 1 else 0
            if not table.mix_all(code, p_V):
                break  # a context that never occurred has no longer one that did
        return p_V

    def sample(
        self, prompt: Sequence[int], count: int, temperature: float, random: np.random.Generator, stop: Sequence[int] = ()
    ) -> list[int]:
        """Up to ``count`` new ids after ``prompt``; ends after an id of ``stop``. Temperature 0 takes the likeliest."""
        ids = [int(i) for i in prompt]
        for _ in range(count):
            p_V = self.next_probabilities(ids[max(0, len(ids) - self.order + 1) :])
            if temperature:
                p_V = (p_V / p_V.max()) ** (1 / temperature)
                ids.append(int(random.choice(self.vocabulary, p=p_V / p_V.sum())))
            else:
                ids.append(int(p_V.argmax()))
            if ids[-1] in stop:
                break
        return ids[len(prompt) :]

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids_N = np.asarray(ids, dtype=np.int64)
        if len(ids_N) and not 0 <= ids_N.min() <= ids_N.max() < self.vocabulary:
            wrong = ids_N.min() if ids_N.min() < 0 else ids_N.max()
            raise NGramError(f"token id {wrong} is outside the vocabulary 0..{self.vocabulary - 1}; "
                             "was the text encoded with another tokenizer?")
        return ids_N


class _Table:
    """The n-grams of one order, sorted, so that those with a common context stand side by side."""

    def __init__(self, keys_M: np.ndarray, counts_M: np.ndarray, vocabulary: int) -> None:
        self.keys_M, self.vocabulary = keys_M, vocabulary
        taken_M = np.array(_discounts(counts_M))[np.minimum(counts_M, 3) - 1]
        self.kept_M = counts_M - taken_M
        # sums of a run of neighbours are differences of these
        self.counts_before = np.concatenate([[0], counts_M.cumsum()])
        self.taken_before = np.concatenate([[0.0], taken_M.cumsum()])

    def mix(self, codes_Q: np.ndarray, lower_Q: np.ndarray) -> np.ndarray:
        """p_n of the n-grams ``codes_Q``, given p_{n-1} of the same tokens."""
        first_Q, end_Q = self._run(codes_Q // self.vocabulary)
        at_Q = np.minimum(np.searchsorted(self.keys_M, codes_Q), len(self.keys_M) - 1)
        kept_Q = np.where(self.keys_M[at_Q] == codes_Q, self.kept_M[at_Q], 0.0)
        total_Q = self.counts_before[end_Q] - self.counts_before[first_Q]
        taken_Q = self.taken_before[end_Q] - self.taken_before[first_Q]
        return np.where(end_Q > first_Q, (kept_Q + taken_Q * lower_Q) / np.maximum(total_Q, 1), lower_Q)

    def mix_all(self, context: int, p_V: np.ndarray) -> bool:
        """:meth:`mix` of every token after one context, in place; False, and no change, if the context is unknown."""
        first, end = self._run(context)
        if first == end:
            return False
        p_V *= self.taken_before[end] - self.taken_before[first]
        p_V[self.keys_M[first:end] % self.vocabulary] += self.kept_M[first:end]
        p_V /= self.counts_before[end] - self.counts_before[first]
        return True

    def _run(self, context: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        return (np.searchsorted(self.keys_M, context * self.vocabulary),
                np.searchsorted(self.keys_M, context * self.vocabulary + self.vocabulary))  # fmt: skip


def _codes(ids_N: np.ndarray, vocabulary: int, n: int) -> np.ndarray:
    """[N - n + 1] every run of n ids as one number, the oldest id its highest digit."""
    codes = np.zeros(len(ids_N) - n + 1, dtype=np.int64)
    for k in range(n):
        codes = codes * vocabulary + ids_N[k : k + len(codes)]
    return codes


def _discounts(counts_M: np.ndarray) -> tuple[float, ...]:
    """What to take from counts of 1, of 2, and of 3 or more: ``D_k = k - (k + 1) Y n_{k+1} / n_k`` with
    ``Y = n_1 / (n_1 + 2 n_2)`` and n_k the n-grams that occur k times."""
    n = [int((counts_M == k).sum()) for k in range(1, 5)]
    if min(n) == 0:
        return USUAL
    y = n[0] / (n[0] + 2 * n[1])
    found = tuple(k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3))
    # little text may estimate a discount that takes more than there is, or gives
    return found if all(0 < d <= k for k, d in enumerate(found, 1)) else USUAL
