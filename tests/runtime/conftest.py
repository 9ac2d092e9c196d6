"""Files for llama.cpp; its verdicts about builds are kept out of the reader's home."""

import pytest
from llama_files import plain_file, tiny_file, wide_file  # noqa: F401


@pytest.fixture(autouse=True)
def _cache_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path / "cache"))
