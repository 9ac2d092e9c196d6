"""Whether a text is Python: the one thing about a sample of code that needs no judge and no run."""
from __future__ import annotations

import ast
import codeop
import warnings

# as the interactive prompt asks, and without the line end that Python would add where a block is still open
_UNFINISHED = ast.PyCF_ONLY_AST | codeop.PyCF_ALLOW_INCOMPLETE_INPUT | codeop.PyCF_DONT_IMPLY_DEDENT


def complete_lines(text: str) -> str:
    """``text`` up to its last line end: a cut in the middle of a line is nobody's mistake."""
    return text[: text.rfind("\n") + 1]


def parses(text: str) -> bool:
    """Whether ``ast.parse`` takes the text as it is."""
    return _error(text, ast.PyCF_ONLY_AST) is None


def can_go_on(text: str) -> bool:
    """Whether the text could be the beginning of a Python file: it parses, or nothing is wrong with it but that a
    bracket, a string or a block is still open at its end."""
    return parses(text) or "incomplete input" in str(_error(text, _UNFINISHED))


def _error(text: str, flags: int) -> Exception | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd escapes and comparisons, which are no errors
        try:
            compile(text, "<text>", "exec", flags, dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            return error  # besides syntax: NUL bytes, and nesting that the parser gives up on
    return None
