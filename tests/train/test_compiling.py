"""torch.compile of the mixers in training, and training on without it."""

import warnings

import pytest
import torch
from core_helpers import error, random_ids, small_model

from minimoe.layers import Mamba2
from minimoe.train.compiling import compiled, missing_compiler


def gradients(model, ids):
    model.zero_grad()
    loss = model.loss(ids, ids)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_a_compiled_step_has_the_loss_and_gradients_of_a_plain_one():
    model, ids = small_model("MM", dtype=torch.float32), random_ids(61, 2, 12)
    loss, plain = gradients(model, ids)
    calls = torch._dynamo.utils.counters["stats"]
    with compiled(model) as works:
        assert works
        before = calls["calls_captured"]
        fast_loss, fast = gradients(model, ids)
        assert calls["calls_captured"] > before, "nothing was compiled"
    assert error(fast_loss, loss) < 1e-6 and fast.keys() == plain.keys()
    for name in plain:
        assert error(fast[name], plain[name]) < 1e-4, name


def test_without_a_compiler_one_line_says_so_and_training_goes_on(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model, ids = small_model("M"), random_ids(61, 2, 12)
    loss, plain = gradients(model, ids)
    with pytest.warns(UserWarning, match="no C.. compiler no-such-compiler; install one or set CXX") as caught:
        with compiled(model) as works:
            assert not works
            same, grads = gradients(model, ids)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert torch.equal(same, loss) and all(torch.equal(grads[name], plain[name]) for name in plain)


def test_calls_without_gradients_are_not_compiled_and_nothing_stays_behind(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *args: pytest.fail("called the compiled form"))
    monkeypatch.setenv("CXX", "sh")  # anything that is there: the compiler is not called
    model, ids = small_model("M"), random_ids(61, 2, 12)
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with compiled(model) as works:
            assert works and list(model.state_dict()) == names
            with torch.no_grad():
                assert torch.equal(model(ids).logits, expected)
            with pytest.raises(pytest.fail.Exception):
                model(ids)
    assert all("forward" not in vars(m) for m in model.modules() if isinstance(m, Mamba2))
    model(ids)


def test_a_compiler_is_looked_for_where_the_model_is(monkeypatch):
    monkeypatch.setenv("CXX", "sh")
    assert missing_compiler(torch.device("cpu")) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton" in missing_compiler(torch.device("cuda"))
