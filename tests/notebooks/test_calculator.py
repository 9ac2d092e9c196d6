"""The calculators' stored tables are what minimoe.sizing says, and the page of predictions lists the chapters' questions."""

import json
import math
import random
import re

import pytest
from common import ROOT

from minimoe import catalog, predictions, questions
from minimoe.sizing import plan
from minimoe.sizing.fit import HOST_RESERVE

OUTPUTS = [
    output for cell in json.loads((ROOT / "book/calculator.ipynb").read_text(encoding="utf-8"))["cells"]
    for output in cell.get("outputs", []) if "text/html" in output.get("data", {})
]  # fmt: skip


def payload(title):
    """A calculator as the page gets it."""
    found = [re.search(r'<script type="application/json">(.*)</script>', "".join(o["data"]["text/html"])) for o in OUTPUTS]
    return next(data for data in (json.loads(match[1]) for match in found) if data["title"] == title)


def states(data, number):
    """Random states, and the starting one: {key: text of the slider}, {row: text}."""
    values = [dim["values"] for dim in data["dims"]]
    total = math.prod(map(len, values))
    assert total == len(data["cells"])
    first = 0
    for dim in data["dims"]:
        first = first * len(dim["values"]) + dim["start"]
    for index in [first, *random.Random(0).sample(range(total), number)]:
        at, rest = {}, index
        for dim in reversed(data["dims"]):
            rest, place = divmod(rest, len(dim["values"]))
            at[dim["key"]] = dim["values"][place]
        yield at, dict(zip(data["rows"], data["cells"][index], strict=True))


def number(text):
    return int(text.replace(",", ""))


def amount(text):
    """ "18.20 GB" -> 18.2e9"""
    value, unit = text.split()[:2]
    return float(value) * {"GB": 1e9, "ms": 1e-3, "tokens/s": 1}[unit]


def placed(shown, made):
    moved = [int(word) for word in re.findall(r"\d+", shown)]
    if made.fits == "no":
        return shown.startswith("no")
    return shown == "yes, all of it" if made.fits == "whole" else moved == [len(made.ram_blocks), len(made.expert_blocks)]


def test_will_it_fit():
    data = payload("Will it fit?")
    for at, row in states(data, 150):
        card = catalog.Device("a card", int(at["vram"]) << 30, None, "test")
        made = plan(catalog.model(at["model"]).spec, at["quant"], number(at["context"]), card)
        last = 0.51e7  # half a unit of the last digit shown
        assert placed(row["does it fit?"], made), (at, row)
        assert amount(row["file (its tensors)"]) == pytest.approx(made.weights.total, abs=last)
        assert amount(row["VRAM for weights"]) == pytest.approx(made.vram["weights"], abs=last)
        assert amount(row["for keys and values"]) == pytest.approx(made.vram["kv"], abs=last)
        assert amount(row["for recurrent states"]) == pytest.approx(made.vram["ssm"] + made.vram["conv"], abs=last)
        parts = sum(amount(row[name]) for name in ("VRAM for weights", "for keys and values", "for recurrent states",
                                                   "for buffers and reserve (estimates)"))  # fmt: skip
        left = amount(row["VRAM left"]) * (-1 if "too little" in row["VRAM left"] else 1)
        assert left == pytest.approx(made.headroom, abs=last)
        assert parts + left == pytest.approx(card.memory_bytes, abs=5 * last)
        assert amount(row["RAM, with 4 GB for the system"]) == pytest.approx(sum(made.ram.values()) + HOST_RESERVE, abs=last)
        assert number(row["longest context this way"]) == made.max_context
        assert number(row["longest with all experts in RAM"]) == made.longest_context
        option = row["llama.cpp's option"]
        if made.fits == "split":
            assert f" {option} " in " ".join(made.flags), (at, row)
        else:
            assert option == {"whole": "none needed", "no": "-"}[made.fits]


def test_how_fast_can_it_be():
    data = payload("How fast can it be?")
    for at, row in states(data, 150):
        device, rate = at["device"].split(", ")
        memory, ram_rate = at["ram"].split(", ")
        device, memory = catalog.device(device), catalog.host_memory(memory)
        assert float(rate.split()[0]) == pytest.approx(device.bytes_per_second / 1e9, abs=0.501)
        assert float(ram_rate.split()[0]) == pytest.approx(memory.bytes_per_second / 1e9, abs=0.0501)
        made = plan(catalog.model(at["model"]).spec, at["quant"], number(at["context"]), device, ram_memory=memory)
        assert placed(row["does it fit?"], made), (at, row)
        if made.fits == "no":
            assert set(list(row.values())[1:]) == {"-"}
            continue
        ceiling = made.ceiling
        read, in_ram = sum(ceiling.traffic.vram.values()), sum(ceiling.traffic.ram.values())
        assert amount(row["a token reads on the device"]) == pytest.approx(read, abs=0.51e7)
        assert amount(row["and in RAM"]) == pytest.approx(in_ram, abs=0.51e7)
        assert amount(row["time for that on the device"]) == pytest.approx(read / device.bytes_per_second, abs=0.51e-4)
        assert amount(row["time in RAM"]) == pytest.approx(in_ram / memory.bytes_per_second, abs=0.51e-4)
        assert amount(row["at most"]) == pytest.approx(ceiling.tokens_per_second, rel=0.006)


def test_it_starts_with_a_3060_and_nano_30b():
    fit, fast = ({dim["key"]: dim["values"][dim["start"]] for dim in payload(title)["dims"]}
                 for title in ("Will it fit?", "How fast can it be?"))  # fmt: skip
    assert fit["model"] == fast["model"] == "nemotron-3-nano-30b-a3b" and fit["vram"] == "12"
    assert fast["device"].startswith("rtx-3060, 360 GB/s")


@pytest.mark.slow  # as other stale outputs are
def test_all_questions_are_listed(monkeypatch):
    monkeypatch.setattr(predictions, "_memory", {})
    monkeypatch.setenv("MINIMOE_PROFILE", "ci")
    cells = json.loads((ROOT / "notebooks/90_predictions.ipynb").read_text(encoding="utf-8"))["cells"]
    stored = next(o for c in cells if "unanswered" in "".join(c["source"]) for o in c["outputs"])
    expected = questions.unanswered(ROOT / "notebooks")
    assert "".join(stored["data"]["text/plain"]) == repr(expected), "make run CHAPTERS=90"
