"""Cards: the schema, and files that appear whole or not at all."""

import json
import os

import pytest

from minimoe.bench import cards

CARDS = sorted(cards.folder().glob("*.json"))


def test_there_is_a_card():
    assert CARDS, "results/cards has no card"


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_every_card_of_the_repository_is_one(path):
    found = cards.read(path)
    assert found["name"] == path.stem and found["settings"]["quick"] is False
    assert any("median" in row for row in found["rows"])
    assert found == cards.read(path.stem)


def put(card, where, value):
    """Set ``value`` at a path of keys; None takes the key away."""
    *way, last = where
    for key in way:
        card = card[key]
    if value is None:
        del card[last]
    else:
        card[last] = value


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["schema"], 2, "schema: must be 1, not 2"),
        (["schema"], None, "schema: must be 1, not None"),
        (["rows"], None, "rows: is missing"),
        (["mood"], "good", "mood: is no key of a card"),
        (["name"], "My Card", "name: 'My Card' must be lower-case"),
        (["date"], "yesterday", "date: 'yesterday' must be YYYY-MM-DD"),
        (["machine"], [], r"machine: must be dict, not '\[\]'"),
        (["launch_latency_s"], "3 us", "launch_latency_s: must be float or nothing, not '3 us'"),
        (["bandwidth", "read_bytes_per_second"], 0, "bandwidth.read_bytes_per_second: must be a number above 0"),
        (["bandwidth", "copy_bytes_per_second"], None, "bandwidth.copy_bytes_per_second: must be"),
        (["matmul", "float32"], {"flop_per_second": None}, "matmul.float32: needs flop_per_second above 0"),
        (["cpu_threads", "all"], {}, "cpu_threads.all: must be a number of threads"),
        (["cpu_threads", "2"], {}, "cpu_threads.2.bandwidth and cpu_threads.2.matmul: must be objects"),
        (["rows", 0], "fast", r"rows\[0\]: must be an object"),
        (["rows", 0, "threads"], "1", r"rows\[0\].threads: must be int, not '1'"),
        (["rows", 0, "threads"], True, r"rows\[0\].threads: must be int, not 'True'"),
        (["rows", 0, "speed"], 1.0, r"rows\[0\].speed: is no key of a card"),
        (["rows", 0, "median"], None, r"rows\[0\]: needs one of median, missing and refused, and has none"),
        (["rows", 0, "missing"], "why", "needs one of median, missing and refused, and has median, missing"),
        (["rows", 0, "p90"], None, r"rows\[0\].p90: is missing beside a median"),
        (["rows", 0, "p90"], 1.0, r"rows\[0\]: needs 0 < p10 <= median <= p90"),
        (["rows", 0, "median"], 0, r"rows\[0\]: needs 0 < p10 <= median"),
        (["rows", 0, "ceiling"], 699.0, r"rows\[0\].median: is above its ceiling"),
        (["rows", 0, "unit"], "tok/s", r"rows\[0\].unit: 'tok/s' must be one of tokens/s"),
        (["rows", 0, "clock"], "sun", r"rows\[0\].clock: 'sun' must be one of cpu, wall"),
        (["rows", 0, "flops"], float("inf"), r"rows\[0\].flops: must be a finite number"),
        (["rows", 0, "note"], "see /home/anna/x", r"rows\[0\].note: 'see /home/anna/x' looks like a path"),
        (["machine", "os"], "Linux of anna@work", "machine.os: 'Linux of anna@work' looks like a path"),
        (["settings", "C:\\Users\\anna"], 1, "looks like a path"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_the_key(card, where, value, message):
    cards.check(card)
    put(card, where, value)
    with pytest.raises(cards.CardError, match=message) as error:
        cards.check(card)
    assert "\n" not in str(error.value)


def test_a_file_says_its_name(tmp_path, card):
    path = tmp_path / "x.json"
    for text, message in ((b"{", "not JSON"), (b"[1]", "a card is a JSON object, this is a list"), (b"\xff", "not JSON"),
                          (b'{"schema": NaN}', "NaN is no number")):  # fmt: skip
        path.write_bytes(text)
        with pytest.raises(cards.CardError, match=f"x.json: .*{message}"):
            cards.read(path)
    with pytest.raises(cards.CardError, match="no such file"):
        cards.read(tmp_path / "y.json")
    with pytest.raises(cards.CardError, match="there is no card 'nobodys-card'; give a file, or one of"):
        cards.read("nobodys-card")


def test_written_whole_and_never_over_another(tmp_path, card, monkeypatch):
    path = cards.write(card, tmp_path / "cards" / "a.json")
    assert cards.read(path) == card and os.listdir(path.parent) == ["a.json"]
    with pytest.raises(cards.CardError, match="exists already.*--force"):
        cards.write(card, path)
    card["commit"] = "another"
    assert cards.read(cards.write(card, path, force=True))["commit"] == "another"

    def full(*names):
        raise OSError(28, "No space left on device")

    before = path.read_text()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        cards.write(card | {"commit": "third"}, path, force=True)
    assert path.read_text() == before and os.listdir(path.parent) == ["a.json"]


def test_a_bad_card_is_not_written(tmp_path, card):
    card["rows"][0]["unit"] = "furlongs"
    with pytest.raises(cards.CardError):
        cards.write(card, tmp_path / "a.json")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("cannot open /home/anna/models/x.gguf: no", "cannot open x.gguf: no"),
        (r"C:\Users\anna\x.gguf is no file", "x.gguf is no file"),
        ("~/models/x.gguf, and /tmp/y", "x.gguf, and y"),
        ("mail to anna@example.org", "mail to ..."),
        ("700 tokens/s, 0.1 J/token", "700 tokens/s, 0.1 J/token"),
        ("no counter in /sys/class/powercap", "no counter in /sys/class/powercap"),
    ],
)
def test_reasons_lose_their_folders(card, text, plain):
    assert cards.anonymous(text) == plain
    card["rows"][0]["note"] = cards.anonymous(text)
    cards.check(card)


def test_names_from_devices():
    name = cards.default_name({"device": "cuda", "device_name": "NVIDIA GeForce RTX 3060", "cores": 12})
    assert name.startswith("nvidia-geforce-rtx-3060-2") and cards.NAME.fullmatch(name)
    name = cards.default_name({"device": "cpu", "device_name": "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", "cores": 4})
    assert name.startswith("intel-core-i5-8250u-cpu-1-60ghz-4-cores-2") and cards.NAME.fullmatch(name)


@pytest.mark.parametrize(("size", "rate", "sure"), [(8e6, 22e9, True), (7e6, 14e9, False), (2e9, 14e9, True), (1e6, 14e9, False)])
def test_the_rate_of_a_buffer_of_about_that_size(card, size, rate, sure):
    assert cards.read_rate(card["bandwidth"], size) == (rate, sure)


def test_cards_are_json_for_anybody(card):
    assert json.loads(json.dumps(card)) == card
