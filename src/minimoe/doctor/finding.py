"""One thing that the doctor found."""
from __future__ import annotations

import sys
from dataclasses import dataclass

# this very Python: the doctor is often called without activating its environment
_QUOTED = f'"{sys.executable}"' if " " in sys.executable else sys.executable
PIP, PURGE = f"{_QUOTED} -m pip install", f"{_QUOTED} -m pip cache purge"


@dataclass(frozen=True)
class Finding:
    """``level``: "ok", "note" (optional) or "fix" (the book cannot run without); ``command`` mends it."""

    level: str
    topic: str
    text: str
    command: str = ""

    def line(self) -> str:
        return f"{self.level:<5}{self.topic}: {self.text}" + (f" -> {self.command}" if self.command else "")
