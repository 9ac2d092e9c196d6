"""Where minimoe keeps what it can make again."""
from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """MINIMOE_CACHE, or "minimoe" in the user's cache folder; it need not exist yet."""
    if named := os.environ.get("MINIMOE_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "minimoe"
