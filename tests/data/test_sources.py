"""What --data names: shares, mixtures, caches and streams."""

import json

import pytest

from minimoe.data import CorpusError, load_corpus
from minimoe.data.sources import load_sources
from minimoe.data.tasks import TASKS


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    corpus = load_corpus()
    (tmp_path / "text").mkdir()
    for name, text in zip(corpus.names[:40], corpus.texts[:40]):
        (tmp_path / "text" / name.replace("/", "_")).write_text(text[:3000], encoding="utf-8")
    return tmp_path / "text"


@pytest.fixture
def rows(tmp_path):
    """A data set of JSON lines."""
    (tmp_path / "rows").mkdir()
    lines = [json.dumps({"text": f"row {n}: " + "some words to learn from " * 5}) for n in range(400)]
    (tmp_path / "rows" / "a.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows"


def test_shares_and_descriptions(folder, monkeypatch):
    monkeypatch.setattr("minimoe.data.sources.TASK_EXAMPLES", 40)
    read = load_sources([f"{folder}=0.7", "tasks=0.3"], 400)
    assert [share for _, share in read.tokens] == [0.7, 0.3]
    assert [about["name"] for about in read.about] == ["text", "tasks", "held out"]
    assert [about["tokens"] for about in read.about[:2]] == [len(tokens) for tokens, _ in read.tokens]
    training, validation = load_corpus(folder).split()
    assert read.about[0]["sha256"] == training.sha256 and read.about[2]["sha256"] == validation.sha256
    assert read.held_out.bytes == validation.bytes
    text = read.tokenizer.decode(read.tokens[1][0].ids)
    assert text.count("<|im_start|>user") == 40 and all(word in text for word in ("start ", "copy ", "sort ", "close "))
    assert len(TASKS) == 4


def test_a_large_corpus_is_packed_once(folder, monkeypatch, tmp_path):
    small = load_sources([str(folder)], 400)
    monkeypatch.setattr("minimoe.data.sources.LARGE", 1000)
    packed, again = (load_sources([str(folder)], 400) for _ in range(2))
    files = list((tmp_path / "cache" / "tokens").glob("*.bin"))
    assert len(files) == 1 and packed.about == again.about == small.about
    for one in (packed, again):
        assert (one.tokens[0][0].ids == small.tokens[0][0].ids).all()


def test_a_stream_is_held_out_from_and_read_once(rows, monkeypatch, tmp_path):
    read = load_sources([f"hf:{rows}"], 400)
    text, held_out = read.tokenizer.decode(read.tokens[0][0].ids), read.tokenizer.decode(read.held_out.ids)
    numbers = [set(part.split("row ")[1:]) for part in (text, held_out)]
    assert not numbers[0] & numbers[1] and len(numbers[0]) == 380 and len(numbers[1]) == 20
    assert len(list((tmp_path / "cache" / "tokens").glob("*.bin"))) == 1
    assert load_sources([f"hf:{rows}"], 400).about == read.about


def test_a_stream_can_be_the_second_source(folder, rows):
    read = load_sources([str(folder), f"hf:{rows}=0.5"], 400)
    assert read.tokenizer.decode(read.tokens[1][0].ids).count("row ") == 400  # nothing of it is held out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks"], "name a source of text first"),
        (["{folder}=half"], "'half' is no share"),
        (["{folder}/nowhere"], "no such folder"),
        (["hf:{folder}/nowhere"], "cannot be streamed|no connection"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(words, message, folder):
    with pytest.raises(CorpusError, match=message) as error:
        load_sources([word.format(folder=folder) for word in words], 400)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_is_too_large_is_refused(folder, tmp_path):
    load_sources([str(folder)], 400).tokenizer.save(tmp_path / "tok")
    with pytest.raises(CorpusError, match="400 tokens, and the preset has room for 300"):
        load_sources([str(folder)], 300, tmp_path / "tok")
