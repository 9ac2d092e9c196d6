"""The questions that chapters ask, and those among them that the reader has not answered yet."""

from __future__ import annotations

import ast
import html
import json
import os
import pathlib
from dataclasses import dataclass

from .predictions import html_table, scored


@dataclass(frozen=True)
class Question:
    """A prediction that a chapter asks for: its key, and the notebook and its title."""

    key: str
    file: str
    title: str


class Questions(list[Question]):
    """A list of questions that shows itself as a table with links to their chapters."""

    EMPTY = "You have answered every question of these chapters."

    def _repr_html_(self) -> str:
        if not self:
            return f'<p class="mm-volatile">{self.EMPTY}</p>'
        rows = ((html.escape(q.key), f'<a href="{html.escape(q.file, quote=True)}">{html.escape(q.title)}</a>') for q in self)
        return f'<div class="mm-card">{html_table(("question", "chapter"), rows)}</div>'

    def __repr__(self) -> str:
        return "\n".join(f"{q.key} | {q.title} ({q.file})" for q in self) or self.EMPTY


def unanswered(folder: str | os.PathLike[str] = ".") -> Questions:
    """The questions that the notebooks of a folder ask and that have no stored prediction, in the notebooks' order.

    A question is a call ``predict("key", ...)`` in a code cell.
    """
    asked: dict[str, Question] = {}
    for file in sorted(pathlib.Path(folder).glob("*.ipynb")):
        try:
            cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
            texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{file} cannot be read as a notebook ({e or type(e).__name__})") from None
        title = next((line[2:].strip() for kind, text in texts if kind == "markdown" for line in text.splitlines()
                      if line.startswith("# ")), file.stem)  # fmt: skip
        for key in (key for kind, text in texts if kind == "code" for key in _keys(text)):
            asked.setdefault(key, Question(key, file.name, title))
    answered = {c.key for c in scored()}
    return Questions(q for q in asked.values() if q.key not in answered)


def _keys(source: str) -> list[str]:
    """The keys that a cell predicts, in its order."""
    try:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    except SyntaxError:
        return []  # IPython's own syntax
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    names = ((getattr(call.func, "id", getattr(call.func, "attr", "")), call.args[0]) for call in calls)
    return [key.value for name, key in names if name == "predict" and isinstance(key, ast.Constant) and isinstance(key.value, str)]
