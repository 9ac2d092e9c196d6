"""What is measured, and in which order."""

import dataclasses

import pytest

from minimoe.bench.variants import Task, Variant, alternate, tasks


def test_rounds_go_forth_and_back():
    assert alternate("abc", 4) == [list("abc"), list("cba"), list("abc"), list("cba")]


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_an_odd_number_of_rounds_favours_one_side(rounds):
    with pytest.raises(ValueError, match=f"rounds={rounds}: must be even"):
        alternate("ab", rounds)


def test_every_task_at_every_depth_and_batch_then_one_serve():
    found = tasks([512], [128, 16], [0, 4096], [1, 8])
    assert len(found) == 3 * 2 * 2 + 1
    assert len(set(found)) == len(found)
    assert found[-1] == Task("serve", 128, prompt=512)
    assert [task.name for task in found[:3]] == ["pp512", "tg128", "tg16"]


def test_a_path_stays_on_this_machine():
    variant = Variant("minimoe", "/home/somebody/models/x", "x", "float32", "cpu", 1, 10)
    assert "path" not in variant.about and "somebody" not in str(variant.about) + variant.label
    assert set(variant.about) == {field.name for field in dataclasses.fields(variant)} - {"path"}
