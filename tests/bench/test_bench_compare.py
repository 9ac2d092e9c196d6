"""Cards side by side."""

import copy

import pytest

from minimoe.bench import compare, table


@pytest.fixture
def other(card):
    """A machine that reads twice as fast, with newer packages, and without llama.cpp."""
    other = copy.deepcopy(card)
    other["name"] = "another"
    other["bandwidth"] |= {"read_bytes_per_second": 28e9, "by_size": [], "cache_bytes": 1 << 20}
    other["versions"]["llama-cpp-python"] = "0.4.0"
    other["settings"]["repeats"] = 9
    row = other["rows"][0]
    for name in ("median", "p10", "p90", "n", "share", "ceiling", "moved_bytes", "clock", "busy", "bound", "flops"):
        del row[name]
    row["missing"] = "llama-cpp-python is not installed"
    return other


def test_unequal_versions_and_settings_are_pointed_out(card, other):
    found = compare.differences([card, other])
    assert found == {"versions.llama-cpp-python": ["0.3.36", "0.4.0"], "settings.repeats": [5, 9]}
    assert compare.differences([card, card]) == {}
    del other["versions"]["llama-cpp-python"]
    assert compare.differences([other, card])["versions.llama-cpp-python"] == [None, "0.3.36"]


def test_measured_beside_the_ceiling_and_beside_what_the_other_could(card, other):
    found = compare.compare([card, other])
    assert found["cards"] == ["a-machine", "another"]
    (row,) = found["rows"]
    assert row["cells"][0] == {name: card["rows"][0][name] for name in ("median", "p10", "p90", "ceiling", "share", "bound")}
    assert row["cells"][1] == {"missing": "llama-cpp-python is not installed", "at_most": 28e9 / 8e6}
    text = compare.text(found)
    assert "700 tokens/s (25%)" in text and "<= 3,500 tokens/s" in text
    assert "Not the same on all cards" in text and "0.3.36 | 0.4.0" in text


def test_what_a_cache_may_hold_is_not_predicted_from_the_large_buffer(card, other):
    other["bandwidth"]["cache_bytes"] = 300 << 20
    assert "at_most" not in compare.compare([card, other])["rows"][0]["cells"][1]


def test_a_refused_figure_is_no_figure(card, other):
    other["rows"][0] |= {"refused": "too fast"}
    del other["rows"][0]["missing"]
    found = compare.compare([card, other])
    assert found["rows"][0]["cells"][1] == {"refused": "too fast"} and "refused" in compare.text(found)


def test_a_prompt_is_bounded_by_its_passes(card, other):
    for one in (card, other):
        one["rows"][0] |= {"test": "pp512", "tokens": 512}
    assert compare.compare([card, other])["rows"][0]["cells"][1]["at_most"] == 512 * 28e9 / 8e6


def test_one_card_is_laid_beside_its_ceilings(card):
    assert "tg128" in compare.text(compare.compare([card]))


def test_columns_are_aligned_and_long_reasons_do_not_widen_them():
    lines = table.columns([["", "median", "n"], ["tg128", "1,234", "10"], ["energy", "not measured: " + "x" * 60]])
    assert lines[0].endswith("median   n") and lines[1].endswith(" 1,234  10")
    assert lines[2].startswith("  energy  not measured")


def test_a_card_as_text(card):
    card["rows"].append(card["rows"][0] | {"test": "tg8", "batch": 8, "depth": 4096})
    card["rows"].append({k: v for k, v in card["rows"][0].items() if k not in ("median", "p10", "p90", "n", "share")}
                        | {"test": "pp512", "refused": "140% of the peak"})  # fmt: skip
    text = table.text(card)
    assert "14.0 GB/s" in text and "150 GFLOP/s" in text and "3.00 us" in text
    assert "25.0% of bandwidth" in text and "refused: 140% of the peak" in text
    assert "tg8 at depth 4,096, batch 8" in text


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(1234.5, "tokens/s", "1,234 tokens/s"), (9.876, "tokens/s", "9.88 tokens/s"), (0.00123, "s", "1.23 ms"), (2.5, "s", "2.5 s"),
     (15.7e6, "bytes", "16 MB"), (0.0123, "J/token", "0.0123 J/token")],
)  # fmt: skip
def test_values_carry_units(number, unit, text):
    assert table.value(number, unit) == text
