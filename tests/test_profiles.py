"""minimoe.profile(): who decides, in which order."""

import pytest

import minimoe
from minimoe.profiles import PROFILES, profile


@pytest.fixture(autouse=True)
def nobody_has_said(monkeypatch):
    for name in ("MINIMOE_PROFILE", "CI"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", PROFILES)
def test_the_variable_decides(monkeypatch, name):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("MINIMOE_PROFILE", f" {name} ")
    assert profile() == name


def test_an_unknown_name_is_refused(monkeypatch):
    monkeypatch.setenv("MINIMOE_PROFILE", "gpu-12gb")
    with pytest.raises(
        ValueError, match="MINIMOE_PROFILE='gpu-12gb' is unknown; set it to one of ci, cpu, gpu"
    ):
        profile()


@pytest.mark.parametrize(("value", "expected"), [("true", "ci"), ("1", "ci"), ("false", "cpu"), ("", "cpu")])
def test_ci_without_the_variable(monkeypatch, value, expected):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CI", value)
    assert profile() == expected


@pytest.mark.parametrize(("cuda", "expected"), [(True, "gpu"), (False, "cpu")])
def test_the_device_decides_when_nobody_has_said(monkeypatch, cuda, expected):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert profile() == expected


def test_it_is_public():
    assert minimoe.profile is profile
