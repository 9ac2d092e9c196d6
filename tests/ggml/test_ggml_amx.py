"""Quantised prefill: does this build survive it, and do we know?"""

import pytest

from minimoe.ggml import amx, child
from minimoe.ggml.child import LlamaDied


def dies(extra_buffers):
    try:
        amx.try_prefill(extra_buffers)
    except LlamaDied:
        return True
    return False


def test_the_plain_buffers_survive():
    amx.try_prefill(extra_buffers=False)


def test_the_decision_is_what_happens():
    """On a CPU with AMX and a build of gcc 12 for it: True, and a child really dies."""
    assert amx.amx_is_broken() is (amx.amx_compiled() and dies(extra_buffers=True))


def test_the_trial_asks_for_what_breaks(tmp_path):
    """AMX takes over products of quantised weights with a multiple of 32 rows, and more than one token."""
    import gguf

    for kind in ("Q8_0", "Q4_0"):
        amx.write_trial(tmp_path / "trial.gguf", kind)
        tensors = gguf.GGUFReader(tmp_path / "trial.gguf").tensors
        matrices = [tensor for tensor in tensors if len(tensor.shape) == 2]
        assert matrices and {tensor.tensor_type.name for tensor in matrices} == {kind}
        assert all(size % 32 == 0 for tensor in matrices for size in tensor.shape)
    assert amx.TOKENS >= 32


@pytest.fixture
def compiled(monkeypatch):
    """As if this build had AMX; what then happens in the child is real."""
    monkeypatch.setattr(amx, "amx_compiled", lambda: True)
    amx.amx_is_broken.cache_clear()
    yield
    amx.amx_is_broken.cache_clear()


def nobody(*_, **__):
    raise AssertionError("tried again, though the answer is known")


def test_the_verdict_is_kept(compiled, monkeypatch):
    truth = dies(extra_buffers=True)
    assert amx.amx_is_broken() is truth
    assert list(amx._remembered().values()) == [truth]
    amx.amx_is_broken.cache_clear()
    monkeypatch.setattr(amx, "try_prefill", nobody)
    assert amx.amx_is_broken() is truth


def test_another_build_is_tried_again(compiled, monkeypatch, tmp_path):
    amx._remember({"some other build": True})
    before = amx._build()
    library_file = tmp_path / "libggml-cpu.so"
    library_file.write_bytes(b"one")
    monkeypatch.setattr(amx, "library_files", lambda: [library_file])
    first = amx._build()
    library_file.write_bytes(b"another")
    assert len({before, first, amx._build(), "some other build"}) == 4


def test_a_build_that_dies_is_broken(compiled, monkeypatch):
    monkeypatch.setattr(amx, "try_prefill", lambda: child.run("os:abort", "trial"))
    assert amx.amx_is_broken() is True and list(amx._remembered().values()) == [True]


def test_what_cannot_be_tried_is_taken_for_broken_and_not_kept(compiled, monkeypatch):
    monkeypatch.setattr(amx, "try_prefill", lambda: child.run("minimoe.ggml.header:check_magic", "trial", path="/nowhere"))
    assert amx.amx_is_broken() is True and amx._remembered() == {}


def test_a_build_without_amx_is_not_tried(monkeypatch):
    monkeypatch.setattr(amx, "amx_compiled", lambda: False)
    monkeypatch.setattr(amx, "try_prefill", nobody)
    amx.amx_is_broken.cache_clear()
    assert amx.amx_is_broken() is False
    amx.amx_is_broken.cache_clear()


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"a": 3}', "\x00"])
def test_a_damaged_cache_is_no_cache(content, monkeypatch):
    amx.cache_file().parent.mkdir(parents=True, exist_ok=True)
    amx.cache_file().write_text(content)
    assert amx._remembered() == {}
    amx._remember({"build": False})
    assert amx._remembered() == {"build": False}


def test_a_home_that_cannot_be_written_to(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path / "file" / "below"))
    amx._remember({"build": True})
    assert amx._remembered() == {}
