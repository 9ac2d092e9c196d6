import numpy as np
import torch

from minimoe.exercises import check


def double(x):
    return x * 2


def test_right_answers_pass(capsys):
    assert check(double, [((2,), 4), ((torch.ones(3),), torch.full((3,), 2.0))])
    assert capsys.readouterr().out == "double: all 2 cases are right\n"


def test_an_unsolved_exercise_says_so(capsys):
    def mine(x):
        pass

    assert not check(mine, [((1,), 1)])
    assert "not solved yet" in capsys.readouterr().out


def test_wrong_numbers_shapes_errors_and_nan_are_one_line_each(capsys):
    cases = [((np.ones(4),), np.ones(4))]
    assert not check(double, cases)
    assert not check(lambda x: x[:2], cases)
    assert not check(lambda x: x / 0 if False else x * np.nan, cases)
    assert not check(lambda x: 1 // 0, cases)
    assert not check(lambda x: "four", cases)
    assert not check(lambda x: x, [((1,), (1, 2))])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert "largest difference 1" in lines[0]
    assert "expected shape (4,)" in lines[1]
    assert "not finite" in lines[2]
    assert "ZeroDivisionError" in lines[3]
    assert "expected numbers" in lines[4]
    assert "2 results" in lines[5]


def test_a_small_error_fails(capsys):
    assert not check(lambda x: x * 1.001, [((1.0,), 1.0)])
    assert check(lambda x: x * 1.001, [((1.0,), 1.0)], rtol=1e-2)


def test_whole_numbers_are_printed_in_full(capsys):
    total = 120_668_707_840
    assert not check(lambda: total + 1, [((), total)], rtol=0, atol=0)
    assert not check(lambda: np.inf, [((), np.nan)])
    lines = capsys.readouterr().out.splitlines()
    assert "expected 120,668,707,840, got 120,668,707,841" in lines[0]
    assert "expected nan, got inf" in lines[1]
