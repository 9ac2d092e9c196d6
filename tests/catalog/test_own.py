"""The reader's own catalogue file: models beside the listed ones, and one line for every mistake in it."""

import json

import pytest

from minimoe import HybridConfig, catalog
from minimoe.catalog import CatalogError, own
from minimoe.errors import MinimoeError

SPEC = {"vocab_size": 100, "hidden_size": 64, "layers": [{"times": 2, "blocks": [
    {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 16}, {"kind": "mlp", "width": 128}]}]}  # fmt: skip


@pytest.fixture
def mine(tmp_path, monkeypatch):
    def write(data):
        path = tmp_path / "own.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        monkeypatch.setenv("MINIMOE_CATALOG", str(path))
        return path

    return write


def refused(call, path):
    with pytest.raises(MinimoeError) as error:
        call()
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def test_models_by_spec_by_config_and_by_file(mine, tmp_path):
    config = HybridConfig.preset("tiny")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    figure = {"value": 2_000_000, "source": "counted"}
    mine({"models": {
        "shape": {"spec": SPEC, "source": "here", "published": {"total_parameters": figure}},
        "hybrid": {"config": config.to_dict(), "source": "here"},
        "filed": {"config": "config.json", "source": "here"},
    }})  # fmt: skip
    assert catalog.models()[-3:] == ["shape", "hybrid", "filed"] and catalog.models()[0] == "nemotron-3-nano-30b-a3b"
    shape = catalog.model("shape")
    assert shape.config is None and shape.spec.count("attention") == 2 and shape.spec.name == "shape"
    assert shape.published["total_parameters"].value == 2_000_000
    assert catalog.model("hybrid").config == catalog.model("filed").config == config
    assert catalog.model("nemotron-3-nano-4b").spec.hidden_size == 3136


def test_an_own_entry_wins_and_a_changed_file_is_read_again(mine):
    mine({"models": {"qwen3-30b-a3b": {"spec": SPEC, "source": "here"}}})
    assert catalog.model("qwen3-30b-a3b").spec.hidden_size == 64
    mine({"models": {"another": {"spec": SPEC | {"hidden_size": 96}, "source": "here"}}})
    assert catalog.model("qwen3-30b-a3b").spec.hidden_size == 2048 and catalog.model("another").spec.hidden_size == 96


def test_use_is_for_a_while(mine, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"models": {"other": {"spec": SPEC, "source": "here"}}}))
    assert own.own_file() is None
    with own.use(other):
        assert catalog.models()[-1] == "other"
        with own.use(None):
            assert own.own_file() == other
    assert own.own_file() is None and "other" not in catalog.models()
    path = mine({})
    with own.use(other):
        pass
    assert own.own_file() == path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object, this is a list"),
        ({"model": {}}, "unknown key 'model'; did you mean models?"),
        ({"devices": []}, "devices must be an object, not []"),
        ({"files": {}}, "files must be a list, not {}"),
    ],
)
def test_files_that_are_none(mine, data, message):
    assert message in refused(catalog.models, mine(data))


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    path = tmp_path / "none.json"
    monkeypatch.setenv("MINIMOE_CATALOG", str(path))
    assert "No such file or directory (MINIMOE_CATALOG or --catalog names it)" in refused(catalog.devices, path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "must be an object, this is a whole number"),
        ({"spec": SPEC}, "source is missing"),
        ({"source": "x"}, "give config (of a Nemotron-H model) or spec"),
        ({"source": "x", "spec": SPEC, "config": {}}, "give config (of a Nemotron-H model) or spec"),
        ({"source": "x", "spec": {"hidden_size": 64, "layers": []}}, "'vocab_size' is missing"),
        ({"source": "x", "spec": SPEC | {"layers": [{"blocks": [{"kind": "rnn"}]}]}}, "'rnn' is missing, or no kind"),
        ({"source": "x", "spec": SPEC | {"layers": [{"blocks": [{"kind": "mlp", "size": 3}]}]}}, "unexpected keyword argument 'size'"),
        ({"source": "x", "spec": SPEC | {"layers": [{"blocks": [{"kind": "mlp", "width": 0}]}]}}, "MLP.width=0: must be"),
        ({"source": "x", "spec": SPEC | {"layers": []}}, "needs at least one block"),
        ({"source": "x", "spec": []}, "spec must be an object or a text, not []"),
        ({"source": "x", "spec": "gone.json"}, "No such file"),
        ({"source": "x", "config": {"model_type": "llama"}}, "model_type='llama'"),
        ({"source": "x", "spec": SPEC, "published": {"total": 3}}, "published.total: must be an object"),
        ({"source": "x", "spec": SPEC, "published": {"total": {"value": -1, "source": "x"}}}, "value must be a number above 0"),
    ],
)
def test_mistakes_in_a_model(mine, entry, message):
    path = mine({"models": {"bad": entry}})
    said = refused(lambda: catalog.model("bad"), path)
    assert said.startswith(f"{path}: models.bad") and message in said


def test_the_other_entries_still_work(mine):
    mine({"models": {"bad": {"spec": {}}, "good": {"spec": SPEC, "source": "here"}}, "devices": {"bad": {}}})
    assert catalog.model("good").spec.hidden_size == 64 and catalog.device("rtx-3060").memory_bytes == 12 << 30


def test_fields():
    item = own.fields({"a": 1, "b": None}, "here", {"a": (float,)}, {"b": (str, type(None))})
    assert item == {"a": 1, "b": None}
    for bad in ({"a": None}, {"a": True}, {"a": float("nan")}, {"a": float("inf")}, {"a": -1}, {}):
        with pytest.raises(CatalogError, match="^here: "):
            own.fields(bad, "here", {"a": (float,)})
