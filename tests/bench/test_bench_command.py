"""``minimoe bench`` as a reader runs it: real processes, real models, small sizes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import psutil
import pytest

from minimoe import cli
from minimoe.bench import cards
from minimoe.bench.process import ChildError, stream
from minimoe.bench.session import best_rates
from minimoe.bench.variants import Variant

RUNTIMES = {"minimoe": "torch", "transformers": "transformers", "llama.cpp": "llama-cpp-python"}
QUICK = ("--quick", "--threads", "1", "--device", "cpu")


def bench(*words, env=None):
    child = subprocess.run([sys.executable, "-m", "minimoe", "bench", *map(str, words)], capture_output=True, text=True,
                           env=os.environ | (env or {}))  # fmt: skip
    return child


def card_of(child):
    """The last line of stdout, checked by the schema."""
    assert child.returncode == 0, child.stderr
    return cards.check(json.loads(child.stdout.splitlines()[-1]))


def row(card, test, runtime=None):
    (found,) = [one for one in card["rows"] if one["test"] == test and runtime in (None, one["runtime"])]
    return found


def refuses(words, capsys):
    """Run in this process; the one line on stderr."""
    code = cli.main(["bench", *map(str, words)])
    out, error = capsys.readouterr()
    assert code == 1 and out == "" and error.count("\n") == 1 and "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def measured(tiny_folder, plain_file, tmp_path_factory):  # noqa: F811
    """One run of all three runtimes, at depths and batches; what it printed, and the file that it wrote."""
    out = tmp_path_factory.mktemp("out") / "sub" / "card.json"
    child = bench(tiny_folder, plain_file, *QUICK, "--depth", "0,16", "--batch", "1,2", "--out", out)
    return child, out


def test_a_run_gives_a_table_a_card_and_a_file(measured):
    child, out = measured
    card = card_of(child)
    assert cards.read(out) == card and os.listdir(out.parent) == ["card.json"]
    assert "tiny float32, minimoe, 1 thread" in child.stdout and f"kept in {out}" in child.stdout


@pytest.mark.parametrize(("runtime", "package"), RUNTIMES.items())
def test_every_runtime_has_every_row(measured, runtime, package):
    card = card_of(measured[0])
    mine = [one for one in card["rows"] if one["runtime"] == runtime]
    rates = {(test, depth, batch) for test in ("pp32", "tg8") for depth in (0, 16) for batch in (1, 2)}
    others = {("ttft32", 0, 1), ("tpot8", 32, 1), ("itl8", 32, 1), ("memory_resident", 0, 1), ("energy_tg8", 0, 1)}
    assert {(one["test"], one["depth"], one["batch"]) for one in mine} == rates | others
    for one in mine:
        if one["unit"] == "tokens/s":
            assert one["n"] == 2 and one["clock"] == "cpu" and 0 < one["share"] <= 1, one
            assert one["median"] <= one["ceiling"] and one["flops"] > 0
    counts = {one["test"]: one["n"] for one in mine if "n" in one}
    assert (counts["itl8"], counts["tpot8"], counts["ttft32"], counts["memory_resident"]) == (14, 2, 2, 2)
    assert package in card["versions"]
    assert {one["format"] for one in mine} == {"F32" if runtime == "llama.cpp" else "float32"}
    chosen = [one.get("note", "").startswith("experts: ") for one in mine if one["unit"] == "tokens/s"]
    assert all(chosen) if runtime == "transformers" else not any(chosen)


def test_the_card_says_what_measured_it(measured):
    card = card_of(measured[0])
    assert {"minimoe", "torch"} <= card["versions"].keys()
    assert card["settings"]["quick"] is True and card["settings"]["rounds"] == 2 and card["settings"]["depths"] == [0, 16]
    assert card["machine"]["device"] == "cpu" and card["machine"]["cores"] >= 1
    assert set(card["cpu_threads"]) == {"1"} and card["bandwidth"] == card["cpu_threads"]["1"]["bandwidth"]
    assert 1e8 < card["bandwidth"]["read_bytes_per_second"] < 1e13 and 1e8 < card["bandwidth"]["copy_bytes_per_second"] < 1e13
    assert card["matmul"]["float32"]["flop_per_second"] > 1e8 and 0 < card["launch_latency_s"] < 1e-3
    text = json.dumps(card)
    assert str(measured[1].parent) not in text and os.path.expanduser("~") + "/" not in text


def test_variants_take_turns(measured):
    said = [line.split(": ", 1) for line in measured[0].stderr.splitlines() if line.startswith("round ")]
    assert [turn for turn, _ in said] == ["round 1 of 2"] * 4 + ["round 2 of 2"] * 4
    assert [what for _, what in said[:4]] == [what for _, what in reversed(said[4:])]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_a_runtime_that_dies_says_so_and_the_rest_goes_on(tmp_path, tiny_folder, plain_file):  # noqa: F811
    (tmp_path / "llama_cpp.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)")
    child = bench(plain_file, tiny_folder, *QUICK, "--runtime", "minimoe", env={"PYTHONPATH": str(tmp_path)})
    card = card_of(child)
    dead = [one for one in card["rows"] if one["runtime"] == "llama.cpp"]
    assert len(dead) == 7 and all("its process ended with SIGILL" in one["missing"] for one in dead)
    assert row(card, "tg8", "minimoe")["median"] > 0
    assert f"not measured: {dead[0]['missing']}" in child.stdout


@pytest.mark.parametrize(
    ("runtime", "package", "words"),
    [
        ("llama.cpp", "llama_cpp", "llama-cpp-python is not installed: pip install"),
        ("transformers", "transformers", "transformers cannot be imported"),
    ],
)
def test_a_package_that_is_missing(tmp_path, tiny_folder, plain_file, monkeypatch, runtime, package, words):  # noqa: F811
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}', name='{package}')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    variant = Variant(runtime, str(plain_file if runtime == "llama.cpp" else tiny_folder), "x", "float32", "cpu", 1, 1, 0)
    with pytest.raises(ChildError, match=words) as error:
        list(stream("minimoe.bench.worker:measure", {"variant": asdict(variant), "tasks": [], "repeats": 1}, 1, 60))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_shipped_checkpoint_is_the_default():
    card = card_of(bench(*QUICK))
    assert {one["model"] for one in card["rows"]} == {"small", "small-Q8_0"}
    assert {one["runtime"] for one in card["rows"]} == {"minimoe", "transformers", "llama.cpp"}
    assert row(card, "tg8", "llama.cpp")["share"] > 0.01


def test_a_figure_above_the_peak_is_refused_in_the_end_too(plain_file, monkeypatch, capsys):  # noqa: F811
    """A device that is said to be slower than it is: what was really measured then lies above its ceiling."""
    from minimoe.bench import session

    def slow(parts, ends):
        found = best_rates(parts, ends)
        found["bandwidth"] |= {"read_bytes_per_second": 1e3, "by_size": []}
        return found

    monkeypatch.setattr(session, "best_rates", slow)
    assert cli.main(["bench", str(plain_file), *QUICK]) == 0
    out = capsys.readouterr().out
    card = cards.check(json.loads(out.splitlines()[-1]))
    refused = row(card, "tg8")
    assert "median" not in refused and "of what the device's measured bandwidth allows" in refused["refused"]
    assert f"refused: {refused['refused']}" in out
    assert row(card, "tpot8")["median"] > 0  # the rest goes on


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_ctrl_c_leaves_no_child_and_no_file(tmp_path, tiny_folder):
    out = tmp_path / "out" / "card.json"
    command = [sys.executable, "-m", "minimoe", "bench", str(tiny_folder), "--threads", "1", "--device", "cpu", "--out", str(out)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stderr.readline().startswith("round 1 of 2")
    time.sleep(1.0)
    children = psutil.Process(parent.pid).children(recursive=True)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: parent and child get it
    stdout, stderr = parent.communicate(timeout=20)
    assert parent.returncode == 130 and stdout == "" and "Traceback" not in stderr
    assert children and not psutil.wait_procs(children, timeout=5)[1]
    assert not out.parent.exists()


def test_a_card_is_compared_with_itself(measured, capsys):
    path = str(measured[1])
    assert cli.main(["bench", "compare", path, path]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found["differences"] == {} and "tiny float32, minimoe, 1 thread" in out
    assert all(one["cells"][0] == one["cells"][1] for one in found["rows"])
    assert cli.main(["bench", "compare", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cards"] == [card_of(measured[0])["name"]]


def test_comparing_needs_no_torch(measured):
    code = ("import sys; from minimoe.cli import main; "
            f"main(['bench', 'compare', {str(measured[1])!r}]); sys.exit('torch' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", 3], "--rounds 3: must be even and at least 2"),
        (["--tg", 1], "--tg 1: must be 2 or more"),
        (["--pp", "512,0"], "--pp 0: must be 1 or more"),
        (["--threads", 0], "--threads 0: must be 1 or more"),
        (["--depth", -1], "--depth -1: must be 0 or more"),
        (["--repeats", 0], "--repeats 0: must be 1 or more"),
        (["--timeout", 0], "--timeout 0: must be above 0"),
        (["--n-cpu-moe", -2], "--gpu-layers and --n-cpu-moe: must be 0 or more"),
        (["--quick", "--save"], "--save: a quick run is no reader card"),
        (["compare"], "compare: name one card or more"),
        (["compare", "nobodys-card"], "there is no card 'nobodys-card'"),
        (["compare", "no/such.json"], "no such file"),
    ],
)
def test_user_mistakes_are_one_line(words, message, capsys):
    assert message in refuses(words, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--pp", "many"], "'many' must be whole numbers with commas"), (["--runtime", "vllm"], "'vllm' must be minimoe or transformers")],
)
def test_options_that_are_no_numbers_or_names(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.fixture
def no_children(monkeypatch):
    from minimoe.bench import session

    def told(name):
        return {"machine": {"device": "cpu", "device_name": "Some CPU", "cores": 2}, "device": "cpu", "uuid": "", "versions": {}}

    monkeypatch.setattr(session, "ask_device", told)
    monkeypatch.setattr(session, "run", lambda *arguments, **options: pytest.fail("it should have been refused before"))


def test_models_and_targets_are_refused_before_anything_is_measured(tmp_path, tiny_folder, no_children, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text((tiny_folder / "config.json").read_text())
    for words, message in (
        ([tmp_path / "no.gguf"], "no such file"),
        ([tmp_path / "no"], "no such file or directory"),
        ([tmp_path / "empty"], "no config.json; give a model's directory or a .gguf file"),
        ([tmp_path / "there.json"], "give a model's directory or a .gguf file"),
        ([tmp_path / "other", "--runtime", "minimoe"], "model_type is 'llama', and minimoe runs nemotron_h"),
        ([tmp_path / "weightless"], "no .safetensors files"),
        ([tiny_folder, "--out", tmp_path], "is a directory; give the name of a file"),
        ([tiny_folder, "--out", tmp_path / "there.json"], "there.json exists already; choose another name"),
        ([tiny_folder, "--save", "My Card"], "a card's name has lower-case letters"),
    ):
        assert message in refuses(words, capsys)


def test_a_device_that_is_not_there(capsys):
    assert "device 'cuda:99'" in refuses(["--device", "cuda:99", "--quick"], capsys)


@pytest.fixture
def run_before(measured, monkeypatch):
    """In the place of a run the card of the one that was made, as if it had been a whole one."""
    from minimoe.bench import session

    card = card_of(measured[0])
    monkeypatch.setattr(session, "ask_device", lambda name: {"machine": card["machine"], "device": "cpu", "uuid": "", "versions": {}})
    card = {name: value for name, value in card.items() if name not in ("schema", "name")}
    card["settings"] = card["settings"] | {"quick": False}
    monkeypatch.setattr(session, "run", lambda *arguments, **options: card)


def test_saved_under_the_cards_folder_and_not_twice(tmp_path, tiny_folder, run_before, monkeypatch, capsys):
    monkeypatch.setattr(cards, "folder", lambda: tmp_path / "cards")
    assert cli.main(["bench", str(tiny_folder), "--save", "mine"]) == 0
    assert cards.read("mine")["name"] == "mine" and os.listdir(tmp_path / "cards") == ["mine.json"]
    capsys.readouterr()
    assert "mine.json exists already" in refuses([tiny_folder, "--save", "mine"], capsys)
    assert cli.main(["bench", str(tiny_folder), "--save", "mine", "--force"]) == 0
    assert cli.main(["bench", str(tiny_folder), "--save"]) == 0
    (other,) = set(cards.names()) - {"mine"}
    assert other == cards.read(other)["name"] == cards.default_name(cards.read(other)["machine"])


def test_json_is_all_that_is_printed(tiny_folder, run_before, capsys):
    assert cli.main(["bench", str(tiny_folder), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and cards.check(json.loads(out))["rows"]


def test_the_best_of_several_processes_is_the_peak():
    def part(read, rate, launch):
        return [
            {"bandwidth": {"read_bytes_per_second": read, "copy_bytes_per_second": read / 2, "buffer_bytes": 9,
                           "by_size": [{"buffer_bytes": 1, "read_bytes_per_second": 3 * rate}]}},
            {"matmul": {"float32": {"flop_per_second": rate}, "int8": {"flop_per_second": None, "missing": "see /tmp/x/y.log"}}},
            {"launch": {"launch_latency_s": launch, "round_trip_s": None}},
        ]  # fmt: skip

    found = best_rates([*part(10.0, 7.0, 3.0), *part(12.0, 6.0, 2.0)], [])
    assert found["bandwidth"]["read_bytes_per_second"] == 12.0 and found["bandwidth"]["copy_bytes_per_second"] == 6.0
    assert found["bandwidth"]["by_size"] == [{"buffer_bytes": 1, "read_bytes_per_second": 21.0}]
    assert found["matmul"]["float32"]["flop_per_second"] == 7.0 and found["launch_latency_s"] == 2.0
    assert found["matmul"]["int8"]["missing"] == "see y.log"
    assert best_rates([], ["it died"])["bandwidth"] == {"missing": "it died"}
