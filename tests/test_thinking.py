"""The thinking budget: when a thought is closed, and what is left alone."""

import pytest
import torch

from minimoe import HybridConfig, HybridLM, generate
from minimoe.data import Tokenizer
from minimoe.errors import MinimoeError
from minimoe.thinking import ThinkingBudget

TEXT = "one two\nthree four\n\nfive\n" * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 290)


@pytest.fixture(scope="module")
def model(tokenizer):
    """One that never closes a thought and never ends a line by itself: those logits are far below the others."""
    torch.manual_seed(0)
    model = HybridLM(HybridConfig.preset("tiny", vocab_size=len(tokenizer), eos_token_id=None)).eval()
    budget = ThinkingBudget.of(tokenizer, 1)
    with torch.no_grad():
        model.model.norm_f.weight.zero_()
        model.model.norm_f.weight[0] = 1
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, 0] = torch.randn(len(tokenizer)).abs()
        model.lm_head.weight[[*budget.line_ends, budget.closing[-1]]] = 0
    return model


def test_a_thought_that_never_ends_is_broken_off_after_the_grace(model, tokenizer):
    budget = ThinkingBudget.of(tokenizer, 10, grace=4)
    prompt = tokenizer.encode("<think>\n", allow_special=True)
    free = generate(model, [prompt], max_new_tokens=30, temperature=1.0, seed=1).ids[0]
    kept = generate(model, [prompt], max_new_tokens=30, temperature=1.0, seed=1, thinking_budget=budget).ids[0]
    assert budget.closing[-1] not in free
    assert kept[:14] == free[:14] and kept[14:16] == [*tokenizer.encode("\n"), tokenizer.special["</think>"]]
    assert len(kept) == 30 and kept.count(tokenizer.special["</think>"]) == 1


def test_it_ends_at_the_first_line_end_past_the_budget(tokenizer):
    budget, end = ThinkingBudget.of(tokenizer, 5, grace=50), tokenizer.special["</think>"]
    line, word = tokenizer.encode("\n")[0], tokenizer.encode("o")[0]
    assert budget.forced([line] * 4) == ()  # within the budget lines may end
    assert budget.forced([word] * 5) == ()
    assert budget.forced([word] * 8 + [line]) == (end,)
    assert budget.forced([word] * 55) == (line, end)
    assert budget.forced([word] * 3 + [end] + [line] * 60) == ()  # closed by itself: nothing more to do


def test_line_ends_are_all_tokens_that_end_in_one(tokenizer):
    budget = ThinkingBudget.of(tokenizer, 1)
    assert budget.line_ends == {i for i in range(len(tokenizer)) if tokenizer.decode([i]).endswith("\n")}
    assert len(budget.line_ends) > 1  # "\n\n" is a token of its own


def test_rows_have_budgets_of_their_own(model, tokenizer):
    budget = ThinkingBudget.of(tokenizer, 4, grace=0)
    prompts = [tokenizer.encode("<think>", allow_special=True), tokenizer.encode("a longer one")]
    both = generate(model, prompts, max_new_tokens=9, temperature=1.0, seed=5, thinking_budget=budget).ids
    alone = generate(model, prompts[1:], max_new_tokens=9, temperature=1.0, seed=6, thinking_budget=budget).ids
    assert both[1] == alone[0] and all(ids[4:6] == list(budget.breaking) for ids in both)


@pytest.mark.parametrize(("tokens", "grace"), [(0, 1), (-1, 1), (True, 1), (2.5, 1), (4, -1)])
def test_a_budget_that_cannot_be_is_one_line(tokenizer, tokens, grace):
    with pytest.raises(MinimoeError, match="thinking budget") as error:
        ThinkingBudget.of(tokenizer, tokens, grace)
    assert "\n" not in str(error.value)
