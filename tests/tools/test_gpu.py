"""tools/gpu.py: every part runs, on a CPU at toy size, and a part that fails costs one line."""

import argparse
import json
import os
import subprocess
import sys
import time

import gpu
import gpu_book
import gpu_card
import gpu_parts
import gpu_shared
import gpu_sweeps
import pytest
from common import ROOT

from minimoe import HybridConfig
from minimoe.bench import cards, session
from minimoe.bench.session import Plan
from minimoe.sizing import flops_per_token

SCRIPT = str(ROOT / "tools" / "gpu.py")


def call(*words, env=None):
    words = [sys.executable, SCRIPT, "--device", "cpu", "--quick", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | (env or {}))


def results(out):
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


def without(folder, *names):
    """Make ``folder``, put into PYTHONPATH, hide these modules: nobody finds them."""
    (folder / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def without(name, path=None, target=None):\n"
        f"    return None if name.split('.')[0] in {names!r} else find(name, path, target)\n"
        "PathFinder.find_spec = staticmethod(without)\n"
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The parts that take seconds."""
    folder = tmp_path_factory.mktemp("gpu")
    done = call("--only", "tests", "base", "chapters", "training", "--chapters", "90", "--budget", "15",
                "--out", folder / "out", "--run", folder / "run")  # fmt: skip
    return done, results(folder / "out"), folder


def test_all_went_well_and_each_part_says_where(quick):
    done, found, folder = quick
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(found) == {"tests", "base", "chapters", "training"}
    for record in found.values():
        assert record["ok"] and record["trouble"] is None and 0 < record["seconds"] < record["limit_s"]
        assert {"python", "torch", "device_name"} <= record["machine"].keys() and record["commit"]
        assert record["versions"]["torch"] and "bitsandbytes" in record["versions"]


def test_no_path_of_this_machine_is_in_the_results(quick):
    _, _, folder = quick
    for path in (folder / "out").iterdir():
        text = path.read_text()
        assert str(ROOT) not in text and sys.prefix not in text and str(folder) not in text, path.name


def test_the_gpus_tests_are_found_and_say_why_they_did_not_run(quick):
    found = quick[1]["tests"]["result"]
    outcomes = {entry["test"].split(".")[-1]: entry for entry in found["tests"]}
    assert outcomes["test_cuda_is_waited_for"]["message"] == "needs CUDA"
    assert "test_a_batch_that_does_not_fit_is_halved_and_training_goes_on" in outcomes
    assert found["counts"]["skipped"] == len(found["tests"]) and found["counts"]["failed"] == 0


def test_steps_have_speed_and_share_of_the_measured_peak(quick):
    found = quick[1]["base"]["result"]
    for case in found["steps"]:
        assert case["tokens_per_second"] == pytest.approx(case["batch"] * case["length"] / case["seconds"])
        assert case["mfu"] == pytest.approx(case["flops"] / case["seconds"] / found["peak_flop_per_second"])
        assert 0 < case["mfu"] < 1 and case["spread"][0] <= case["seconds"] <= case["spread"][1]


def test_a_slice_of_training_leaves_a_log_and_weights(quick):
    found, folder = quick[1]["training"]["result"], quick[2]
    assert found["steps"] == 20 and found["log"][0]["step"] == 0
    weights = folder / "run" / found["weights"]["folder"]
    assert sum(found["weights"]["files"].values()) == sum(path.stat().st_size for path in weights.iterdir())


@pytest.mark.slow
def test_another_slice_goes_on_where_the_first_one_ended(quick, tmp_path):
    folder = quick[2]
    done = call("--only", "training", "--out", tmp_path, "--run", folder / "run", "--train=--steps 24")
    again = results(tmp_path)["training"]["result"]
    assert done.returncode == 0 and again["steps"] == 24 and "--resume" in again["command"]
    assert [line["step"] for line in again["log"]] == list(range(24)) and again["weights"]["folder"].endswith("24")


@pytest.mark.slow
def test_a_slice_that_runs_out_of_time_is_saved(tmp_path):
    done = call("--only", "training", "--out", tmp_path / "out", "--run", tmp_path / "run", "--train=--steps 100000", "--budget", "1.5")
    found = results(tmp_path / "out")["training"]
    assert done.returncode == 0 and found["ok"] and 0 < found["result"]["steps"] < 100_000 and found["result"]["weights"]["files"]
    assert list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))


def test_a_part_that_fails_is_one_line_and_the_next_one_goes_on(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    done = call("--only", "chapters", "training", "--chapters", "90", "--out", tmp_path / "out", "--run", tmp_path / "run",
                "--budget", "3")  # fmt: skip
    found = results(tmp_path / "out")
    assert done.returncode == 1 and found["chapters"]["ok"]
    assert "\n" not in found["training"]["trouble"] and "recipe.json" in found["training"]["trouble"]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_time_that_is_up_stops_a_part_and_the_rest_is_not_begun(tmp_path):
    start = time.monotonic()
    done = call("--only", "benchmarks", "chapters", "--out", tmp_path, "--budget", "0.25")
    found = results(tmp_path)
    assert done.returncode == 1 and time.monotonic() - start < 40
    for name in ("benchmarks", "chapters"):
        trouble = found[name]["trouble"]
        assert "stopped after" in trouble or "not begun" in trouble or "did not go well" in trouble, trouble


@pytest.mark.slow
def test_what_is_not_installed_is_named(tmp_path):
    """As on a machine that has torch and little else."""
    without(tmp_path, "pytest", "ipywidgets", "gguf", "llama_cpp", "nbclient", "nbformat", "IPython")
    done = call("--only", "tests", "chapters", "--chapters", "01", "90", "--out", tmp_path / "out", "--budget", "5",
                env={"PYTHONPATH": str(tmp_path)})  # fmt: skip
    found = results(tmp_path / "out")
    assert done.returncode == 1
    assert found["tests"]["trouble"] == "pytest is not installed here, so its tests were not run"
    chapters = {entry["chapter"]: entry for entry in found["chapters"]["result"]["chapters"]}
    assert chapters["01_map"]["trouble"].endswith("ipywidgets is not installed here") and chapters["90_predictions"]["ok"]


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--device", "cuda:77", "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("gpu: ") and done.stderr.count("\n") == 1 and "cuda:77" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_minutes_are_25_and_the_files_8(capsys):
    assert sum(minutes for minutes, _ in gpu.PARTS.values()) == 25 and len(gpu.PARTS) <= 8
    assert gpu.LARGEST * len(gpu.PARTS) <= 16 << 20
    assert gpu.main(["--list"]) == 0 and capsys.readouterr().out.count("\n") == len(gpu.PARTS)


def test_a_result_that_is_too_large_is_said_not_written(tmp_path):
    gpu.write(tmp_path / "x.json", {"part": "x", "ok": True, "result": {"log": ["y" * 100] * 30_000}})
    record = json.loads((tmp_path / "x.json").read_text())
    assert not record["ok"] and "too many" in record["trouble"] and record["result"] == {}


def test_the_shipped_recipe_becomes_options_that_train_takes():
    recipe = json.loads((ROOT / "checkpoints" / "small" / "recipe.json").read_text())
    words = gpu_book.train_words(recipe)
    from minimoe.commands import train

    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args([*words, "--out", "x"])
    for name in ("steps", "batch", "length", "lr", "seed"):
        assert getattr(args, name) == recipe["options"][name]
    assert args.data and args.preset == recipe["preset"]
    recipe["options"]["clip"] = 0.125
    with pytest.raises(gpu_shared.Trouble, match="clip=0.125"):
        gpu_book.train_words(recipe)


def test_the_benchmarks_are_those_of_make_bench():
    for quick in (False, True):
        plan = gpu_parts.benchmark_plan(quick)
        assert {name for name, _ in plan} == {"train_step", "prefill", "decode"}
        assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name, _ in plan)


def test_steps_are_held_against_the_flops_of_a_token(quick):
    config = HybridConfig.preset("tiny")
    for case in quick[1]["base"]["result"]["steps"]:
        assert case["flops"] == 3 * flops_per_token(config, case["length"]).forward * case["batch"] * case["length"]


# ---------------------------------------------------------------------- the card
class Left:
    """As much of a Report as the plan asks."""

    def __init__(self, *, quick=False):
        self.args = argparse.Namespace(device="cpu", quick=quick)


def test_the_card_is_what_minimoe_bench_would_measure():
    about = session.ask_device("cpu")
    full, toy = gpu_card.bench_plan(Left(), about), gpu_card.bench_plan(Left(quick=True), about)
    settings = {(task.kind, task.depth, task.batch) for task in full.tasks if task.kind != "serve"}
    assert settings == {(kind, depth, batch) for kind in ("pp", "tg") for depth in (0, 4096) for batch in (1, 8)}
    assert {variant.runtime for variant in full.variants} == {"minimoe", "transformers", "llama.cpp"}
    assert {variant.model for variant in full.variants} == {"small", "small-Q8_0"} and not full.quick and toy.quick
    assert len(toy.tasks) == 3 and vars(full).keys() == Plan.__dataclass_fields__.keys()


@pytest.mark.slow
def test_a_card_without_llama_cpp_and_time_says_so_row_by_row(tmp_path):
    """As on a machine that has neither llama-cpp-python nor gguf; then with time for the first processes only."""
    without(tmp_path, "llama_cpp", "gguf")
    words = [sys.executable, str(ROOT / "tools" / "gpu_parts.py"), "card", "--quick"]
    for name, seconds in (("whole", 300), ("short", 6)):
        subprocess.run([*words, "--out", str(tmp_path / name), "--seconds", str(seconds)], capture_output=True,
                       env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])})  # fmt: skip
    found, short = (json.loads((tmp_path / name).read_text()) for name in ("whole", "short"))
    rows = {runtime: [row for row in cards.check(found["card"])["rows"] if row["runtime"] == runtime]
            for runtime in ("minimoe", "transformers", "llama.cpp")}  # fmt: skip
    assert all("llama-cpp-python" in row["missing"] for row in rows["llama.cpp"])
    assert all("median" in row for name in ("minimoe", "transformers") for row in rows[name] if row["unit"] == "tokens/s")
    cut = [row for row in cards.check(short["card"])["rows"] if "no end within" in row.get("missing", "")]
    assert cut and "speeds are not on the card" in short["trouble"] and "\n" not in short["trouble"]


def test_a_missing_speed_is_trouble_only_where_its_program_is():
    rows = [{"runtime": "llama.cpp", "test": "tg8", "unit": "tokens/s", "missing": "not here"},
            {"runtime": "minimoe", "test": "memory_resident", "unit": "bytes", "missing": "not told"}]  # fmt: skip
    gpu_card.complain(rows, {"torch": "2.11.0", "llama-cpp-python": None})
    with pytest.raises(gpu_shared.Trouble, match="1 speeds are not on the card; tg8 in llama.cpp: not here"):
        gpu_card.complain(rows, {"torch": "2.11.0", "llama-cpp-python": "0.3.36"})


# ---------------------------------------------------------------------- the sweeps
SWEEP = """
import argparse, pathlib
from minimoe.bench.report import write_result
if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--device")
    numbers = {"device": p.parse_args().device}
    print(write_result(pathlib.Path(__file__).with_name("99_x.json"), numbers, 1.0, {"rate": "7 a second"}))
"""


def test_a_sweep_writes_into_its_part_and_nowhere_else(tmp_path):
    (tmp_path / "99_x.py").write_text(SWEEP)
    (tmp_path / "out").mkdir()
    words = [sys.executable, str(ROOT / "tools" / "gpu_parts.py"), "sweep", "--out", str(tmp_path / "out" / "x.json"),
             "--sweeps", str(tmp_path / "99_x.py"), "--device", "cpu"]  # fmt: skip
    assert gpu_shared.call(words, 100)[0] is None and not (tmp_path / "99_x.json").exists()
    found = json.loads((tmp_path / "out" / "x.json").read_text())
    assert found["file"] == "results/99_x.json" and found["result"]["experiment"] == "99_x"
    assert found["result"]["numbers"] == {"device": "cpu"} and found["result"]["card"] == {"rate": "7 a second"}


def test_a_sweep_that_there_is_not_is_one_line(tmp_path):
    done = call("--only", "sweeps", "--sweeps", "88", "--out", tmp_path)
    assert done.returncode == 1 and "no such sweep" in results(tmp_path)["sweeps"]["trouble"]


def test_what_is_no_sweep_for_this_device_is_left_out_with_the_reason(tmp_path):
    script = tmp_path / "99_x.py"
    script.write_text(SWEEP)
    assert gpu_sweeps.left_out(script, quick=False) is None and "--quick" in gpu_sweeps.left_out(script, quick=True)
    script.write_text(SWEEP.replace("--device", "--threads"))
    assert "--device" in gpu_sweeps.left_out(script, quick=False)
    assert gpu_sweeps.left_out(ROOT / "experiments" / "16_roofline.py", quick=True) is None
    assert all((ROOT / "experiments" / f"{name}.py").exists() for name in gpu_sweeps.SWEEPS)


def test_the_last_words_of_a_program_that_is_stopped_are_kept(capfd):
    trouble, seconds = gpu_shared.call([sys.executable, "-uc", "print('at 7'); import time; time.sleep(60)"], 2)
    assert trouble == "stopped after 2 s" and seconds < 20 and "at 7" in capfd.readouterr().out


def test_cells_run_as_in_a_kernel():
    names = {}
    gpu_book.run_cell("import inspect\ndef f():\n    return 7\nf()", "cell 1", names)
    gpu_book.run_cell("text = inspect.getsource(f)", "cell 2", names)
    assert names["text"] == "def f():\n    return 7\n"


def test_a_chapter_may_show_several_things_in_a_cell(tmp_path):
    book = tmp_path / "book.ipynb"
    cell = {"cell_type": "code", "metadata": {}, "source": ["for x in (1, None): display(x)\n", "display()"]}
    book.write_text(json.dumps({"cells": [cell]}))
    out = tmp_path / "out.json"
    words = [sys.executable, ROOT / "tools" / "gpu_parts.py", "chapter", "--out", out, "--device", "cpu", "--chapters", book]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(out.read_text())["cells"] == 1, done.stderr


@pytest.mark.slow
def test_every_part_in_one_run(tmp_path):
    done = call("--out", tmp_path / "out", "--run", tmp_path / "run", "--budget", "25")
    found = results(tmp_path / "out")
    assert done.returncode == 0, json.dumps({name: record["trouble"] for name, record in found.items()}, indent=1)
    assert set(found) == set(gpu.PARTS)
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 16 << 20
    forms = found["fallbacks"]["result"]
    assert {form["form"] for form in forms["forms"]} == {"experts one after another", "attention written out"}
    assert all(form["ok"] for form in forms["forms"]) and forms["bfloat16"]["gradient_from_float32"] > 1e-4
    assert all("tokens_per_second" in entry for entry in forms["speeds"])
    assert all(entry["finite"] and entry["distance"] < 0.1 for entry in forms["float16"].values())
    assert found["card"]["result"]["doctor"] and found["benchmarks"]["result"]["benchmarks"]
    card = cards.check(found["card"]["result"]["card"])
    speeds = {(row["runtime"], row["test"]) for row in card["rows"] if "median" in row and row["unit"] == "tokens/s"}
    assert speeds >= {(runtime, test) for runtime in ("minimoe", "transformers") for test in ("pp32", "tg8")}
    roofline = next(entry for entry in found["sweeps"]["result"]["sweeps"] if entry["sweep"] == "16_roofline")
    assert roofline["file"] == "results/16_roofline.json" and roofline["result"]["numbers"]["points"]
    assert all(entry["ok"] for entry in found["sweeps"]["result"]["sweeps"])
    assert all(entry["ok"] for entry in found["chapters"]["result"]["chapters"])
