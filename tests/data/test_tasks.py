"""Tasks: each answer checked by a solver that shares nothing with the maker, each thought followed to its end."""

import collections
import hashlib
import random
import re

import numpy as np
import pytest

from minimoe.data import Tokenizer
from minimoe.data import tasks as module
from minimoe.data.tasks import TASKS, examples, prompt, task_tokens


@pytest.fixture(scope="module")
def tokenizer():
    texts = [part for e in examples(400, 9) for part in (e.question, e.thought, e.answer)]
    return Tokenizer.train([*texts, "user assistant system \n"], 400)


def solve(question: str) -> str:
    """The answer from the question alone, by other means than tasks.py has."""
    word, rest = question.split(" ", 1)
    if word == "copy":
        return rest
    if word == "sort":
        return " ".join(letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter in rest.split())
    if word == "start":
        expression, *steps = rest.split("; ")
        for step in steps:
            step = re.sub(r"^[a-z] ", "", step)
            step = re.sub("^add ", "+", re.sub("^take ", "-", re.sub("^double$", "*2", step)))
            expression = f"({expression}){step}"
        return str(eval(expression, {"__builtins__": {}}))
    open_ = rest.replace(" ", "")
    while (shorter := open_.replace("()", "").replace("[]", "").replace("{}", "")) != open_:
        open_ = shorter  # pairs cancel until only what is open is left
    return " ".join(open_[::-1].translate(str.maketrans("([{", ")]}")))


def test_every_answer_is_the_one_that_another_solver_finds():
    seen = collections.Counter()
    for example in [*examples(6000, 1), *examples(800, 2, held_out=True)]:
        assert example.answer == solve(example.question), example
        seen[example.task] += 1
    assert len(seen) == 4 and min(seen.values()) == max(seen.values())


def test_a_wrong_answer_would_be_seen():
    for example in examples(40, 1):
        assert solve(example.question.replace("start ", "start 1")) != example.answer or example.task != "calculate"
        assert not example.solved_by(example.answer + " 1") and not example.solved_by("")


def test_the_thought_leads_to_the_answer():
    for example in examples(2000, 3):
        lines = example.thought.split("\n")
        if example.task == "calculate":
            sums = [re.fullmatch(r"([a-z]): (\d+) ([-+*]) (\d+) = (\d+)", line).groups() for line in lines]
            values = [int(re.match(r"start (\d+)", example.question)[1])] + [int(result) for *_, result in sums]
            for before, after, (_, left, sign, right, _) in zip(values[:-1], values[1:], sums, strict=True):
                assert int(left) == before and eval(f"{left}{sign}{right}") == after and 0 <= after <= 99
            assert str(values[-1]) == example.answer and len(lines) == example.size
        elif example.task == "copy":
            assert example.thought == f"{len(example.answer.split())} letters"
        elif example.task == "sort":
            asked = example.question.split()[1:]
            assert [line.split() for line in lines] == [sorted(asked[: n + 1]) for n in range(len(asked))]
            assert lines[-1] == example.answer
        else:
            given, open_ = example.question.split()[1:], ""
            for bracket, line in zip(given, lines, strict=True):
                open_ = re.sub(r"\(\)$|\[\]$|\{\}$", "", open_ + bracket)
                assert line.replace(" ", "") == f"{bracket}:{open_}" and line == line.strip()
            assert open_ and len(open_) == len(example.answer.split())


def test_the_seed_decides_and_nothing_else():
    first = list(examples(200, 5))
    random.seed(99)
    assert first == list(examples(200, 5)) != list(examples(200, 6))
    assert first[:50] == list(examples(50, 5))  # more of them begin alike


def test_held_out_questions_are_never_trained_on():
    trained = {e.question for seed in range(3) for e in examples(4000, seed)}
    held = {e.question for seed in range(3) for e in examples(400, seed, held_out=True)}
    assert held and not trained & held
    assert all(hashlib.sha256(q.encode()).digest()[0] % 20 == 0 for q in held)


def test_about_one_question_in_twenty_is_held_out():
    draw = random.Random(0)
    share = sum(TASKS["copy"](draw).held_out for _ in range(4000)) / 4000
    assert share == pytest.approx(13 / 256, abs=0.015)


def test_only_the_tasks_that_are_asked_for_and_unknown_ones_are_named():
    assert {e.task for e in examples(20, tasks=("sort", "copy"))} == {"sort", "copy"}
    for wrong in (("sort", "poem"), ()):
        with pytest.raises(ValueError, match="is unknown; there are calculate, copy, sort, brackets"):
            list(examples(1, tasks=wrong))


def test_calculate_with_a_number_of_steps():
    for steps in (1, 8, 20):
        example = TASKS["calculate"](random.Random(steps), steps=steps)
        assert example.size == steps == example.question.count(";") and solve(example.question) == example.answer


@pytest.mark.parametrize("thinking", [True, False])
def test_the_prompt_begins_the_conversation_that_was_trained_on(tokenizer, thinking):
    for example in examples(60, 4):
        whole = tokenizer.encode_chat(example.messages(thinking), add_generation_prompt=False)
        begun = prompt(example, tokenizer, thinking)
        assert whole[: len(begun)] == begun and len(whole) > len(begun)
        reply = tokenizer.decode(whole[len(begun) :]).removesuffix("<|im_end|>\n")
        assert example.solved_by(reply) and (example.thought in reply) == thinking
        assert ("</think>" in reply) == thinking


def test_a_thought_is_not_an_answer():
    example = next(e for e in examples(8) if e.task == "sort")
    assert example.solved_by(f"some thought\n</think>\n{example.answer}\n")
    assert not example.solved_by(f"{example.answer}\n</think>\nno idea")


def test_tokens_are_the_conversations_one_after_another(tokenizer):
    tokens = task_tokens(tokenizer, 80, seed=3)
    ends = np.flatnonzero(tokens.ids == tokenizer.eos_id)
    assert len(ends) == 80 and ends[-1] == len(tokens) - 1 and tokens.ids.dtype == np.uint16
    texts = [tokenizer.decode(row[:-1].tolist()) for row in np.split(tokens.ids, ends[:-1] + 1)]
    thought = collections.Counter()
    bytes_ = 0
    for text, example in zip(texts, examples(80, 3), strict=True):
        thinks = example.thought in text and "<think></think>" not in text
        ids = tokenizer.encode_chat(example.messages(thinks), add_generation_prompt=False)
        assert text == tokenizer.decode(ids)
        thought[example.task, thinks] += 1
        bytes_ += sum(len(message["content"]) for message in example.messages(thinks))
    assert len(thought) == 8 and min(thought.values()) >= 3  # every task both ways
    assert tokens.bytes == bytes_
    assert np.array_equal(tokens.ids, task_tokens(tokenizer, 80, seed=3).ids)
    assert not np.array_equal(tokens.ids[:500], task_tokens(tokenizer, 80, seed=4).ids[:500])


def test_making_examples_throws_few_away(monkeypatch):
    """100,000 take seconds because a question is drawn 1.05 times on the average, not searched for; no clock needed."""
    drawn = collections.Counter()

    def counted(name, make):
        def wrapped(draw):
            drawn[name] += 1
            return make(draw)

        return wrapped

    monkeypatch.setattr(module, "TASKS", {name: counted(name, make) for name, make in TASKS.items()})
    count = sum(1 for _ in examples(20_000, 0))
    assert count == 20_000 and drawn.total() < 1.08 * count
    # nor are they kept: the first is there before the second is made
    drawn.clear()
    next(examples(100_000))
    assert drawn.total() < 5


def test_a_question_has_few_letters():
    """Work a question is bounded by its length: what a hundred thousand cost is that many times a small thing."""
    assert max(len(e.question) + len(e.thought) for e in examples(4000)) < 300
