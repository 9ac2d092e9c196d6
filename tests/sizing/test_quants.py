"""The table of llama.cpp's mixtures: its types against ggml's own, its cells against themselves, and rows that do not fit."""

import ctypes

import pytest

from minimoe.ggml import quantizer
from minimoe.ggml.library import library, native
from minimoe.sizing import quants
from minimoe.sizing.quants import (
    CONDITIONS,
    FALLBACK,
    QUANTS,
    RECIPES,
    TYPES,
    Place,
    QuantError,
    check_quant,
    fit,
    wanted_type,
)


def test_types_are_those_of_ggml():
    name_of = native("ggml_type_name", ctypes.c_char_p, ctypes.c_int)
    block = native("ggml_blck_size", ctypes.c_int64, ctypes.c_int)
    size = native("ggml_type_size", ctypes.c_size_t, ctypes.c_int)
    theirs = {}
    for number in range(library().GGML_TYPE_COUNT):
        if block(number):
            theirs[(name_of(number) or b"").decode().upper()] = (block(number), size(number))
    assert {name: theirs[name] for name in TYPES} == TYPES


def test_every_quant_of_the_quantizer_is_here():
    assert set(QUANTS) == set(quantizer.QUANTS) | set(quantizer.NEED_IMPORTANCE)


def test_cells_name_types_and_conditions_that_exist():
    used = set()
    for name, recipe in RECIPES.items():
        assert recipe.base in TYPES
        for role, cell in recipe.roles.items():
            parsed = quants._parsed(cell)
            assert parsed, (name, role)
            for words, kind in parsed:
                assert kind in TYPES, (name, role, kind)
                used |= set(words)
            assert all(words for words, _ in parsed[:-1]), f"{name} {role}: what comes after a cell without a condition"
    assert used == set(CONDITIONS)


def test_use_more_bits_is_the_ends_and_every_third_between():
    chosen = [n for n in range(32) if CONDITIONS["use_more_bits"](Place(n, 32))]
    assert chosen == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


def test_the_head_gets_more_unless_its_rows_do_not_fit():
    place = Place()
    assert wanted_type("Q4_K_M", "head", place, 4096) == "Q6_K"
    assert wanted_type("Q4_K_M", "head", place, 2688) == "Q8_0"
    assert wanted_type("Q4_0", "head", place, 2688) == "Q6_K"  # and falls back later, to the same
    assert wanted_type("IQ2_XXS", "head", place, 4096) == "Q5_K"
    assert wanted_type("Q8_0", "head", place, 4096) == "Q8_0"
    assert wanted_type("BF16", "head", place, 4096) == "BF16"


@pytest.mark.parametrize(
    ("kind", "columns", "used"),
    [("Q4_K", 2816, "Q4_K"), ("Q4_K", 2688, "Q5_0"), ("Q6_K", 1856, "Q8_0"), ("IQ2_XXS", 2688, "IQ4_NL"),
     ("Q2_K", 2688, "Q4_0"), ("Q4_K", 2700, "F16"), ("Q8_0", 33, "F16"), ("MXFP4", 48, "F16"), ("BF16", 33, "BF16"),
     ("Q2_0", 2688, "Q2_0"), ("Q2_0", 96, "Q4_0"), ("Q1_0", 2688, "Q1_0")],
)  # fmt: skip
def test_rows_that_do_not_fit(kind, columns, used):
    assert fit(kind, columns) == used


def test_what_llama_cpp_has_no_fallback_for():
    with pytest.raises(QuantError, match="Q1_0 needs rows of a multiple of 128, this one has 1,856"):
        fit("Q1_0", 1856)
    assert all(TYPES[other][0] == 32 for other in FALLBACK.values())


@pytest.mark.parametrize(
    ("name", "said"),
    [("Q4_K", "did you mean .*Q4_K_M"), ("q4km", "did you mean Q4_K_M"), ("iq2", "did you mean IQ2_"),
     ("int4", "llama.cpp has F32, F16")],
)  # fmt: skip
def test_an_unknown_quant_gets_the_nearest(name, said):
    with pytest.raises(QuantError, match=f"unknown quant '{name}'; {said}") as error:
        check_quant(name)
    assert "\n" not in str(error.value) and isinstance(error.value, ValueError)


def test_any_case():
    assert check_quant("q4_k_m") == "Q4_K_M"
