"""Python or not: whole texts, beginnings, and mistakes."""

import random

import pytest

from minimoe.data import load_corpus
from minimoe.data.syntax import can_go_on, complete_lines, parses

OPEN = ["if x:\n", "x = (1,\n", '"""text\n', "class A:\n    def f(self):\n", "try:\n    x = 1\n", "@decorator\n", "x = \\\n"]
WRONG = [
    "def f(:\n", "x = (1,\n2]\n", "if x:\ny\n", "def f():\n    x\n  y\n", "return 'abc\n", "for\n", "x = {1: 2,\n  3 4\n",
    "try:\n    x = 1\ny = 2\n", "x\n    y\n", "a\0b\n",
]  # fmt: skip


@pytest.mark.parametrize("text", OPEN)
def test_an_open_end_does_not_parse_but_can_go_on(text):
    assert not parses(text) and can_go_on(text)


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_is_one_whatever_follows(text):
    assert not parses(text) and not can_go_on(text)


def test_whole_texts():
    for text in ("", "x = 1\n", "def f():\n    return 1\n", "if x:\n    y\nelse:\n    z\n", 'x = "\\d"\n'):
        assert parses(text) and can_go_on(text)


def test_nesting_beyond_the_parser_is_no_crash():
    deep = "(" * 5000 + ")" * 5000 + "\n"
    assert not parses(deep) and not can_go_on(deep)


def test_complete_lines():
    assert complete_lines("a = 1\nb = ") == "a = 1\n" == complete_lines("a = 1\n")
    assert complete_lines("a = ") == ""


def test_every_beginning_of_real_code_can_go_on():
    """The control: cut anywhere between two lines. Many such beginnings do not parse, which is why both are asked."""
    draw, texts = random.Random(0), load_corpus().split()[1].texts
    parsed = 0
    for _ in range(120):
        lines = draw.choice(texts).splitlines(keepends=True)
        text = "".join(lines[: draw.randrange(1, len(lines))])
        assert can_go_on(text)
        parsed += parses(text)
    assert 20 < parsed < 110
