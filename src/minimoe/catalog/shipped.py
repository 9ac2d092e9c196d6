"""The catalogue's own JSON files, each read once. Imports no torch."""
from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any


@cache
def shipped(file: str) -> Any:
    """The content of a file beside this module; shared, so nobody may change it."""
    return json.loads(resources.files(__package__).joinpath(file).read_text(encoding="utf-8"))
