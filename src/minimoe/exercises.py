"""The check behind a chapter's exercise: compare a reader's function with cases, and say what is off in one line."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def check(answer: Callable[..., Any], cases: Sequence[tuple[tuple[Any, ...], Any]], rtol: float = 1e-4, atol: float = 1e-6) -> bool:
    """Call ``answer(*arguments)`` for every ``(arguments, expected)`` of ``cases`` and print the verdict.

    ``expected`` is a number, an array, a tensor, or a tuple of them. ``None`` as a result means that nobody has
    solved it yet. Returns whether all cases are right; errors of the answer are reported, not raised.
    """
    name = getattr(answer, "__name__", "answer")
    for i, (arguments, expected) in enumerate(cases, 1):
        try:
            got = answer(*arguments)
        except Exception as error:  # whatever a learner's code may raise
            print(f"{name}: case {i} of {len(cases)} raised {type(error).__name__}: {error}")
            return False
        if got is None:
            print(f"{name}: not solved yet (it returned None)")
            return False
        problem = _difference(got, expected, rtol, atol)
        if problem:
            print(f"{name}: case {i} of {len(cases)}: {problem}")
            return False
    print(f"{name}: all {len(cases)} cases are right")
    return True


def _difference(got: Any, expected: Any, rtol: float, atol: float) -> str:
    if isinstance(expected, tuple):
        if not isinstance(got, tuple) or len(got) != len(expected):
            return f"expected {len(expected)} results, got {type(got).__name__}"
        problems = (_difference(g, e, rtol, atol) for g, e in zip(got, expected))
        return next((p for p in problems if p), "")
    got, expected = _array(got), _array(expected)
    if got is None:
        return "expected numbers"
    if got.shape != expected.shape:
        return f"expected shape {expected.shape}, got {got.shape}"
    if not np.isfinite(got).all() and np.isfinite(expected).all():
        return "some results are not finite"
    if np.allclose(got, expected, rtol=rtol, atol=atol):
        return ""
    if expected.ndim == 0:
        return f"expected {_number(expected.item())}, got {_number(got.item())}"
    return f"largest difference {np.abs(got - expected).max():.3g} where values reach {np.abs(expected).max():.3g}"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x.is_integer() else f"{x:.6g}"  # whole numbers in full: their last digit may be the mistake


def _array(value: Any) -> np.ndarray | None:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
