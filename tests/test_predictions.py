"""Predictions: kept, compared, scored; in memory under the ci profile."""

import json
import math
import subprocess
import sys

import pytest

from minimoe import predictions as p


@pytest.fixture(autouse=True)
def on_disk(monkeypatch):
    monkeypatch.setenv("MINIMOE_PROFILE", "cpu")
    monkeypatch.setattr(p, "_memory", {})


def test_kept_and_compared():
    p.predict("02-kv", 1024, unit="MiB")
    assert json.loads(p.path().read_text()) == {"02-kv": {"unit": "MiB", "value": 1024.0}}
    c = p.compare("02-kv", bound=192, measured=192)
    assert (c.prediction, c.bound, c.measured, c.ratio, c.of_bound) == (1024, 192, 192, 0.1875, 1)
    assert repr(c) == (
        "your prediction: 1,024 MiB | bound: 192 MiB | measured: 192 MiB | measured / prediction: 0.19 | measured / bound: 1.00"
    )
    assert '<th scope="row">measured</th><td>192 MiB</td>' in c._repr_html_()


def test_scored_lists_all_with_measurements():
    assert "No predictions" in repr(p.scored()) and "No predictions" in p.scored()._repr_html_()
    p.predict("b", 2.0, unit="s<")
    p.predict("a", 4)
    p.compare("b", measured=3)
    got = p.scored()
    assert [(c.key, c.prediction, c.measured, c.ratio) for c in got] == [("a", 4, None, None), ("b", 2, 3, 1.5)]
    assert "<td>3 s&lt;</td>" in got._repr_html_() and repr(got).splitlines()[2] == "b | 2 s< |  | 3 s< | 1.5 | 0.58"


def test_score():
    """The distance from measurement to guess in doublings, the same in both directions."""
    for guess, measured, score in ((10, 10, 0), (10, 20, 1), (20, 10, 1), (5, 40, 3), (1e-300, 1e300, 2 * 300 / math.log10(2))):
        c = p.Comparison("a", prediction=guess, measured=measured)
        assert c.score == pytest.approx(score, abs=1e-12)
    for guess, measured in ((0, 3), (3, 0), (-2, 3), (-2, -3), (0, 0), (None, 3), (3, None)):
        assert p.Comparison("a", prediction=guess, measured=measured).score is None


def test_the_median_is_of_what_has_a_score():
    for key, guess, measured in (("a", 1, 1), ("b", 1, 4), ("c", 1, 2), ("d", 1, None), ("e", 0, 3), ("f", -1, 2)):
        p.predict(key, guess)
        p.compare(key, measured=measured)
    got = p.scored()
    assert got.median == 1
    said = ("Median score of 3 questions: 1.00, which is 2 times off; 1 question not measured yet; "
            "2 questions without a score, because the guess or the measurement is not above 0.")  # fmt: skip
    assert got.verdict == said and repr(got).endswith(said) and f"<p>{said}</p>" in got._repr_html_()
    assert [row.split(" | ")[-1] for row in repr(got).splitlines()[1:-1]] == ["0.00", "2.00", "1.00", "", "", ""]


def test_without_scores_there_is_no_median():
    p.predict("a", 0)
    p.compare("a", measured=0)
    assert p.scored().median is None and p.scored().verdict.startswith("No question has a score yet; 1 question without")


def test_a_guess_may_be_off_by_more_than_a_float_can_say():
    p.predict("a", 1e-300)
    p.compare("a", measured=1e300)
    assert "1993.16" in p.scored().verdict


def test_a_new_guess_drops_the_old_measurement_and_the_same_one_keeps_it():
    p.predict("a", 1)
    p.compare("a", measured=2)
    p.predict("a", 1)
    assert p.compare("a").measured == 2
    p.predict("a", 5)
    assert p.compare("a").measured is None


def test_without_a_guess():
    c = p.compare("never", measured=3, unit="s")
    assert c.prediction is None and c.ratio is None and "your prediction: none | measured: 3 s" in repr(c)
    assert p.scored() == []


def test_zero_has_no_ratio():
    p.predict("a", 0)
    assert p.compare("a", bound=0, measured=3).rows() == [("your prediction", "0"), ("bound", "0"), ("measured", "3")]


def test_ci_stays_in_memory(monkeypatch):
    monkeypatch.setenv("MINIMOE_PROFILE", "ci")
    p.predict("a", 1)
    assert p.compare("a", measured=1).ratio == 1 and not p.path().exists()
    monkeypatch.delenv("MINIMOE_PROFILE")
    monkeypatch.setenv("CI", "true")
    assert p.compare("a").prediction == 1
    monkeypatch.setenv("MINIMOE_PROFILE", "cpu")
    assert p.compare("a").prediction is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "many"])
def test_a_guess_is_a_finite_number(value):
    with pytest.raises(ValueError, match="the prediction for 'a' must be a finite number"):
        p.predict("a", value)


def test_other_mistakes(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="key must be"):
        p.predict(" ", 1)
    p.predict("a", 1, unit="s")
    with pytest.raises(ValueError, match="predicted in 's' and compared in 'ms'"):
        p.compare("a", measured=1, unit="ms")
    p.path().write_text("{")
    with pytest.raises(ValueError, match="mend or delete it"):
        p.scored()
    p.path().write_text("[1]")
    with pytest.raises(ValueError, match="does not hold predictions"):
        p.scored()
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIMOE_PREDICTIONS", str(tmp_path / "file/x.json"))
    with pytest.raises((OSError, ValueError), match="MINIMOE_PREDICTIONS|cannot be read"):
        p.predict("a", 1)


WHERE = {"linux": "share/minimoe", "darwin": "Application Support/minimoe", "win32": "Local/minimoe"}


@pytest.mark.parametrize(("platform", "tail"), WHERE.items())
def test_where(monkeypatch, platform, tail):
    monkeypatch.delenv("MINIMOE_PREDICTIONS")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    assert p.path().parent.as_posix().endswith(tail)


def test_import_is_light():
    code = "import sys, minimoe.predictions; print(sorted({'torch', 'numpy', 'IPython', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
