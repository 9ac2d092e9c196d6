"""Files that appear whole or not at all."""
from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write beside ``path`` and put it in its place, so that nobody ever reads half of it, and a full disk leaves what
    was there. Lines end as they do in ``text``. Raises OSError."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")  # opened, not mkstemp: with the reader's usual permissions
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
