"""llama.cpp's quants: what a type costs, and which tensor gets which type. Imports no torch.

A quant such as Q4_K_M is not a type but a mixture: most matrices get its *base* type, some get a better one. The whole
of it fits a table (``RECIPES``) with a handful of conditions, and three rules around it:

1. Vectors, norms, routers and convolutions stay in float32 (``TensorShape.always_f32``).
2. The head gets Q6_K, or Q8_0 where the base type's blocks do not divide its rows.
3. Where a type's blocks do not divide a tensor's rows, a type with blocks of 32 takes its place, and where those do not
   either, F16 (``FALLBACK``). The file keeps its name: a "Q2_K" can be 4.5 bits wide.

Matches ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` of llama.cpp's ``src/llama-quant.cpp`` (as of
llama-cpp-python 0.3.36) for the models of the catalogue and their like; rules for Falcon, Llama-2-70B, GLM and
BailingMoE are left out.
"""
from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

from ..errors import MinimoeError

# Numbers in a block, bytes of a block (ggml-common.h).
TYPES: dict[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "IQ4_NL": (32, 18),
    "MXFP4": (32, 17), "NVFP4": (64, 36), "Q2_0": (64, 18), "Q1_0": (128, 18),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_XS": (256, 136), "TQ1_0": (256, 54), "TQ2_0": (256, 66),
}  # fmt: skip
# What stands in for a type whose blocks do not divide a row. Those with blocks of 32 have F16.
FALLBACK: dict[str, str] = {
    "Q2_0": "Q4_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
} | dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL")  # fmt: skip
# Types that llama.cpp writes only with an importance matrix.
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
FLOATS = ("F32", "F16", "BF16")


class QuantError(MinimoeError):
    """A quant that llama.cpp does not have, or that it cannot make of a model."""


@dataclass(frozen=True)
class Place:
    """What the conditions ask: which of ``count`` a tensor is, and what model it is in.

    grouped  block 0 has four or more query heads to a KV head. llama.cpp looks at no other block, so a model that
             begins with Mamba-2, as every Nemotron does, never counts as grouped.
    imatrix  an importance matrix is given
    """

    index: int = 0
    count: int = 1
    grouped: bool = False
    experts: int = 0
    imatrix: bool = False


CONDITIONS: dict[str, Callable[[Place], bool]] = {
    "early": lambda p: p.index < p.count // 8,
    "very early": lambda p: p.index < p.count // 16,
    "in the middle": lambda p: p.count // 8 <= p.index < 7 * p.count // 8,
    # the first and the last eighth, and every third between
    "use_more_bits": lambda p: p.index < p.count // 8 or p.index >= 7 * p.count // 8 or (p.index - p.count // 8) % 3 == 2,
    "of the first two": lambda p: p.index < 2,
    "of the first four": lambda p: p.index < 4,
    "grouped": lambda p: p.grouped,
    "grouped or four experts": lambda p: p.grouped or p.experts >= 4,
    "imatrix": lambda p: p.imatrix,
    "no imatrix": lambda p: not p.imatrix,
}


@dataclass(frozen=True)
class Recipe:
    """A quant: its base type, and who gets another: role -> "TYPE if condition and condition, TYPE if ..., TYPE"."""

    base: str
    roles: Mapping[str, str] = field(default_factory=dict)


def _recipe(base: str, **roles: str) -> Recipe:
    return Recipe(base, roles)


_GROUPED_V = "Q4_K if grouped"
_IQ1 = dict(head="Q5_K", embedding="Q2_K", attn_v="Q4_K if grouped or four experts, Q2_K", ffn_down="Q2_K if early")
_IQ2 = dict(head="Q5_K", embedding="IQ3_S", attn_v="Q4_K if grouped or four experts, IQ3_S", ffn_down="IQ3_S if early",
            attn_output="IQ3_S")  # fmt: skip
_IQ4 = dict(attn_v="Q5_K if grouped", ffn_down="Q5_K if early and no imatrix")

# Roles: embedding, head, attn_q, attn_k, attn_v, attn_output, ffn_up, ffn_gate, ffn_down (dense, routed and shared
# alike), experts (whatever is stacked by expert). All other matrices, and roles that a recipe does not name, get its base.
RECIPES: dict[str, Recipe] = {
    "F32": _recipe("F32"), "F16": _recipe("F16"), "BF16": _recipe("BF16"),
    "Q8_0": _recipe("Q8_0", head="Q8_0"),
    "Q6_K": _recipe("Q6_K"),
    "Q5_K_M": _recipe("Q5_K", attn_v="Q6_K if use_more_bits", ffn_down="Q6_K if use_more_bits"),
    "Q5_K_S": _recipe("Q5_K"),
    "Q4_K_M": _recipe("Q4_K", attn_v="Q6_K if use_more_bits", ffn_down="Q6_K if use_more_bits"),
    "Q4_K_S": _recipe("Q4_K", attn_v="Q5_K if of the first four", ffn_down="Q5_K if early"),
    "Q3_K_L": _recipe("Q3_K", attn_v="Q5_K", ffn_down="Q5_K", attn_output="Q5_K"),
    "Q3_K_M": _recipe("Q3_K", attn_v="Q5_K if of the first two, Q4_K", ffn_down="Q5_K if very early, Q4_K", attn_output="Q4_K"),
    "Q3_K_S": _recipe("Q3_K"),
    "Q2_K": _recipe("Q2_K", attn_v="Q4_K if grouped, Q3_K", ffn_down="Q3_K", attn_output="Q3_K"),
    "Q2_K_S": _recipe("Q2_K", attn_v=_GROUPED_V, ffn_down="Q4_K if early"),
    "Q5_1": _recipe("Q5_1"), "Q4_1": _recipe("Q4_1"),
    "Q5_0": _recipe("Q5_0", ffn_down="Q5_1 if early and imatrix"),
    "Q4_0": _recipe("Q4_0", ffn_down="Q4_1 if early and imatrix"),
    "IQ4_NL": _recipe("IQ4_NL", **_IQ4), "IQ4_XS": _recipe("IQ4_XS", **_IQ4),
    "IQ3_M": _recipe("IQ3_S", attn_v="Q4_K", ffn_down="Q4_K if early", attn_output="Q4_K"),
    "IQ3_S": _recipe("IQ3_S", attn_v=_GROUPED_V),
    "IQ3_XS": _recipe("IQ3_S", attn_q="IQ3_XXS", attn_k="IQ3_XXS", attn_v=_GROUPED_V, ffn_up="IQ3_XXS if in the middle",
                      ffn_gate="IQ3_XXS if in the middle"),
    "IQ3_XXS": _recipe("IQ3_XXS", head="Q5_K", embedding="IQ3_S", attn_q="IQ2_S", attn_k="IQ2_S",
                       attn_v="Q4_K if grouped, IQ3_S if no imatrix", attn_output="IQ3_S",
                       ffn_down="Q4_K if early and no imatrix, Q3_K if no imatrix"),
    "IQ2_M": _recipe("IQ2_S", **_IQ2), "IQ2_S": _recipe("IQ2_XS", **_IQ2),
    "IQ2_XS": _recipe("IQ2_XS", **_IQ1), "IQ2_XXS": _recipe("IQ2_XXS", **_IQ1),
    "IQ1_M": _recipe("IQ1_M", **_IQ1, attn_output="IQ2_XXS"), "IQ1_S": _recipe("IQ1_S", **_IQ1, attn_output="IQ2_XXS"),
    "TQ2_0": _recipe("TQ2_0", embedding="Q4_K"), "TQ1_0": _recipe("TQ1_0", embedding="Q4_K"),
    "Q2_0": _recipe("Q2_0", embedding="Q4_K"), "Q1_0": _recipe("Q1_0"),
    "MXFP4_MOE": _recipe("Q8_0", head="Q8_0", experts="MXFP4"),
}  # fmt: skip
QUANTS = tuple(RECIPES)
# These count feed-forward tensors where the others count blocks, and treat models of eight experts in their own way.
LOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")


def check_quant(quant: str) -> str:
    """The name as llama.cpp spells it; raises QuantError with the nearest names."""
    name = str(quant).upper()
    if name not in RECIPES:
        near = difflib.get_close_matches(name, QUANTS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"llama.cpp has {', '.join(QUANTS)}"
        raise QuantError(f"unknown quant {quant!r}; {hint}")
    return name


def role_of(name: str) -> str:
    """What a tensor of this name is to the quantiser; "other" where it makes no difference."""
    ends = {"token_embd.weight": "embedding", "output.weight": "head"}
    if name in ends:
        return ends[name]
    last = name.split(".", 2)[-1]
    for role in ("attn_q", "attn_k", "attn_v", "attn_output"):
        if last == f"{role}.weight":
            return role
    return next((role for role in ("ffn_up", "ffn_gate", "ffn_down") if last.startswith(role)), "other")


def wanted_type(quant: str, role: str, place: Place, columns: int, stacked: bool = False) -> str:
    """The type that a recipe has for a matrix of ``columns`` a row; ``stacked``: one of a kind for every expert."""
    recipe = RECIPES[quant]
    if quant in FLOATS:
        return recipe.base
    if role == "head":
        fits = columns % TYPES[recipe.base][0] == 0
        return recipe.roles.get("head", "Q6_K") if fits else "Q8_0"
    if stacked and "experts" in recipe.roles:
        return recipe.roles["experts"]
    if place.experts == 8 and (special := _eight_experts(quant, role, place)):
        return special
    for condition, kind in _parsed(recipe.roles.get(role, "")):
        if all(CONDITIONS[word](place) for word in condition):
            return kind
    return recipe.base


def fit(kind: str, columns: int) -> str:
    """``kind``, or what stands in for it because its blocks do not divide rows of ``columns``.

    Raises QuantError where llama.cpp has nothing to put in its place.
    """
    size = TYPES[kind][0]
    if columns % size == 0:
        return kind
    if kind not in FALLBACK and size > 32:
        raise QuantError(f"{kind} needs rows of a multiple of {size}, this one has {columns:,}, "
                         "and llama.cpp has no type to put in its place")
    other = FALLBACK.get(kind, kind)
    return "F16" if columns % TYPES[other][0] else other


def type_bytes(kind: str, columns: int, rows: int = 1) -> int:
    """Bytes of ``rows`` rows of ``columns`` numbers, a multiple of the type's block."""
    size, width = TYPES[kind]
    return columns // size * width * rows


def demands_importance(quant: str, role: str, kind: str) -> bool:
    """Whether llama.cpp refuses to write such a tensor without an importance matrix."""
    return role not in ("embedding", "head") and (kind in NEED_IMPORTANCE or (quant, kind) == ("Q2_K_S", "Q2_K"))


def _eight_experts(quant: str, role: str, place: Place) -> str | None:
    """Rules made for Mixtral, that hit every model of exactly eight experts: attention is small there, so it gets more."""
    low, mixed = quant in LOW, RECIPES[quant].base in ("Q2_K", "Q3_K", "Q4_K", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")
    match role:
        case "attn_k":
            return "Q4_K" if low else "Q8_0"
        case "attn_v" if not low:
            return "Q8_0"
        case "attn_output":
            return "Q5_K" if low or mixed and quant not in ("Q3_K_L", "Q2_K_S") else RECIPES[quant].base
        case "ffn_down" if quant == "IQ3_M" and CONDITIONS["use_more_bits"](place):
            return "Q4_K"
    return None


@cache
def _parsed(cell: str) -> tuple[tuple[tuple[str, ...], str], ...]:
    """ "Q5_K if early and imatrix, Q4_K" -> ((("early", "imatrix"), "Q5_K"), ((), "Q4_K"))"""
    found = []
    for part in filter(None, cell.split(", ")):
        kind, _, words = part.partition(" if ")
        found.append((tuple(filter(None, words.split(" and "))), kind))
    return tuple(found)
