"""book/_ext/minimoe_book.py: docstrings as plain text in the API reference."""

import importlib.util

from common import ROOT

spec = importlib.util.spec_from_file_location("minimoe_book", ROOT / "book/_ext/minimoe_book.py")
ext = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ext)


def shown(text: str) -> str:
    return "\n".join(ext.plain_docstring(text.split("\n"))).strip()


def test_prose_is_not_markup():
    assert shown("scores_BL_ of a * b, |x| and `code` or ``code``") == r"scores_BL\_ of a \* b, \|x\| and ``code`` or ``code``"
    assert ":class:`Foo`" in shown("see :class:`Foo`")


def test_formulas_stay_as_they_are():
    assert shown("The scan:\n    h_t = a * h\n    y = C h\nthen more") == (
        "The scan:\n\n::\n\n    h_t = a * h\n    y = C h\n\nthen more"
    )


def test_lists_and_directives_survive():
    assert shown("Two:\n- one\n  goes on\n- two") == "Two:\n\n- one\n  goes on\n\n- two"
    assert shown(".. math::\n\n    a_b * c") == ".. math::\n\n    a_b * c"


def test_sections_of_both_styles():
    google = shown("Sum.\n\nArgs:\n    x_BLD: input\n    k: count\n\nRaises:\n    ValueError: if x is empty")
    numpy = shown("Sum.\n\nParameters\n----------\nx_BLD : input\nk : count\n\nRaises\n------\nValueError\n    if x is empty")
    for text in (google, numpy):
        assert "``x_BLD``\n    input\n\n``k``\n    count" in text and "``ValueError``\n    if x is empty" in text
    assert ".. rubric:: Args" in google and ".. rubric:: Parameters" in numpy


def test_two_columns_are_a_definition_list():
    text = shown("Go on.\n\nstop        ids that end a row\ntop_k, top_p  sample only among\n              the likeliest")
    assert "``stop``\n    ids that end a row\n\n``top_k, top_p``\n    sample only among\n    the likeliest" in text
    assert shown("A sentence of prose.  Another one.") == "A sentence of prose.  Another one."
