"""Task accuracy: what counts as solved, and a small real model that learns to answer."""

import dataclasses

import pytest
import torch
from core_helpers import small_config

from minimoe import HybridLM, generate
from minimoe.data import Tokenizer
from minimoe.data.tasks import TASKS, Example, examples, prompt, task_tokens
from minimoe.train import TrainOptions, train
from minimoe.train.scoring import Reply, ask, distinct, score_tasks, wilson

ADD = Example("calculate", "start 7; a add 5", "a: 7 + 5 = 12", "12", 1)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([f"{e.question}\n{e.thought}\n{e.answer}\n" for e in examples(200)], 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    ends = (tokenizer.eos_id, tokenizer.special["<|im_end|>"])
    return HybridLM(small_config(vocab_size=tokenizer.vocab_size, hidden_size=64, eos_token_id=ends)).eval()


@pytest.fixture(scope="module")
def trained(model, tokenizer):
    """It can name the answer of four examples, because it has seen little else."""
    import copy

    import numpy as np

    from minimoe.data import Tokens

    four = list(examples(4, seed=1))
    rows = [tokenizer.encode_chat(e.messages(t), add_generation_prompt=False) + [tokenizer.eos_id]
            for e in four for t in (True, False)]  # fmt: skip
    ids = np.array(sum(rows, []) * 40, dtype=np.uint16)
    ours = copy.deepcopy(model)
    train(ours, Tokens(ids, len(ids)), TrainOptions(steps=160, batch=4, length=160, lr=5e-3, precision="float32"))
    return ours.eval(), four


def reply(text, thinking=True, finished=True, example=ADD):
    return Reply(example, thinking, text, 1, finished)


def test_what_counts_as_solved():
    right = reply("a: 7 + 5 = 12\n</think>\n12")
    assert right.solved and right.thought_right and right.answer == "12"
    lucky = reply("a: 7 + 5 = 13\n</think>\n12")
    assert lucky.solved and not lucky.thought_right and lucky.thought == "a: 7 + 5 = 13"
    assert not reply("a: 7 + 5 = 12\n</think>\n13").solved
    assert not reply("a: 7 + 5 = 12\n").solved and reply("a: 7 + 5 = 12\n").thought is None
    assert not reply("a: 7 + 5 = 12\n</think>\n12", finished=False).solved, "it might have gone on: 123"
    assert reply("12", thinking=False).solved
    assert not reply("a: 7 + 5 = 12\n</think>\n12", thinking=False).solved, "no thought was asked for"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("thinking", [True, False])
def test_a_prompt_is_the_beginning_of_its_conversation(tokenizer, task, thinking):
    """Otherwise a model would be asked in tokens that training never showed."""
    for example in examples(20, tasks=[task], held_out=True):
        whole = tokenizer.encode_chat(example.messages(thinking), add_generation_prompt=False)
        given = prompt(example, tokenizer, thinking)
        assert whole[: len(given)] == given and len(whole) > len(given)


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [True, False])
def test_a_model_that_knows_the_answers_scores(trained, tokenizer, thinking):
    ours, four = trained
    replies = ask(ours, tokenizer, four, thinking)
    assert [r.solved for r in replies] == [True] * 4 == score_tasks(ours, tokenizer, four, thinking)
    assert all(r.finished and r.thought_right == thinking for r in replies)
    for r in replies:
        whole = tokenizer.encode_chat(r.example.messages(thinking), add_generation_prompt=False)
        # the line end after the last <|im_end|> is not the model's
        assert r.tokens == len(whole) - len(prompt(r.example, tokenizer, thinking)) - len(tokenizer.encode("\n"))
    # the same replies, held against other questions' answers, are wrong
    others = [dataclasses.replace(r, example=four[n - 1]) for n, r in enumerate(replies)]
    assert not any(r.solved for r in others)


def test_a_model_that_knows_nothing_does_not(model, tokenizer):
    asked = distinct(24, "calculate", seed=3)
    assert not any(score_tasks(model, tokenizer, asked, False))
    replies = ask(model, tokenizer, asked, True, max_new_tokens=9)
    assert {r.tokens for r in replies if not r.finished} == {9}


def test_batches_change_nothing(model, tokenizer):
    asked = list(examples(7, held_out=True))
    expected = [ask(model, tokenizer, [example], True, max_new_tokens=12)[0] for example in asked]
    assert ask(model, tokenizer, asked, True, batch=3, max_new_tokens=12) == expected
    ids = generate(model, [prompt(asked[0], tokenizer, True)], 12).ids[0]
    assert expected[0].text == tokenizer.decode(ids) or expected[0].finished


def test_distinct_questions():
    found = distinct(200, "calculate", seed=2)
    assert len({e.question for e in found}) == 200 and all(e.held_out and e.task == "calculate" for e in found)
    assert found == distinct(200, "calculate", seed=2) != distinct(200, "calculate", seed=3)
    drawn = list(examples(200, 2, ["calculate"], held_out=True))
    assert len({e.question for e in drawn}) < 200, "drawing alone repeats some"
    with pytest.raises(ValueError, match="task 'nonsense' is unknown"):
        distinct(2, "nonsense")


def test_no_held_out_question_is_trained_on(tokenizer):
    asked = {e.question for task in TASKS for e in distinct(100, task)}
    text = tokenizer.decode(task_tokens(tokenizer, 3000).ids.tolist())
    seen = {part.split("<|im_end|>")[0] for part in text.split("<|im_start|>user\n")[1:]}
    assert len(seen) > 2500 and not asked & seen


def test_wilson():
    """Against the interval's definition: its ends are the shares p at which |right / n - p| is z standard errors."""
    for right, n in ((3, 10), (160, 200), (1, 7)):
        for end in wilson(right, n):
            assert abs(right / n - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5)
    low, high = wilson(0, 50)
    assert low == 0 and 0.06 < high < 0.08
    low, high = wilson(50, 50)
    assert high == pytest.approx(1) and 0.92 < low < 0.94
    assert wilson(0, 0) == (0.0, 1.0)
