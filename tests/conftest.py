"""For all tests: what may be skipped, and that nothing writes into the reader's home."""

from __future__ import annotations

import functools
import os

import pytest

ALLOWED = ("gpu", "download")


def _no_skips() -> bool:
    return os.environ.get("MINIMOE_NO_SKIPS", "") not in ("", "0")


@functools.cache
def _cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not _cuda():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
        if item.get_closest_marker("download") and "download" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="fetches real weights; run by hand with -m download"))


def _fail(report, why: str):
    report.outcome = "failed"
    report.longrepr = f"skipped, which MINIMOE_NO_SKIPS forbids: {why}"
    return report


def _reason(report) -> str:
    return str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    expected = hasattr(report, "wasxfail") or any(item.get_closest_marker(m) for m in ALLOWED)
    return _fail(report, _reason(report)) if report.skipped and _no_skips() and not expected else report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield  # a whole module that skips itself: importorskip at its top
    return _fail(report, _reason(report)) if report.skipped and _no_skips() else report


@pytest.fixture(autouse=True)
def _predictions_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIMOE_PREDICTIONS", str(tmp_path / "predictions.json"))


@pytest.fixture(autouse=True, scope="session")
def _builds_elsewhere(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # what is known about this llama.cpp; one trial serves all tests
        patch.setenv("MINIMOE_CACHE", str(tmp_path_factory.getbasetemp().parent / "minimoe-cache"))
        yield
