"""``minimoe plan``, as a reader runs it: what it says to the owner of a 12 GiB card, and to everybody's mistakes."""

import json
import os
import re
import subprocess
import sys

import pytest

from minimoe import HybridConfig, catalog, cli
from minimoe.sizing import weight_bytes
from minimoe.sizing.fit import COMPARED

NANO = "nemotron-3-nano-30b-a3b"
GIB = 1 << 30


@pytest.fixture
def said(capsys):
    """Run in this process: what it prints, refused if it is no success."""
    def run(*words):
        assert cli.main(["plan", *map(str, words)]) == 0
        out, error = capsys.readouterr()
        assert not error and "\t" not in out
        return out

    return run


@pytest.fixture
def refused(capsys):
    """Run in this process: the one line that it says on stderr."""
    def run(*words, code=1):
        try:
            got = cli.main(["plan", *map(str, words)])
        except SystemExit as stop:
            got = stop.code
        out, error = capsys.readouterr()
        assert got == code and out == "" and error.count("\n") == 1 and "Traceback" not in error
        return error

    return run


def flat(text):
    return " ".join(text.split())


def test_a_3060_owner_hears_the_truth(said):
    out = flat(said(NANO, "--vram", 12))
    assert "It runs split between GPU and RAM: IQ4_XS, 18.2 GB" in out and "at most 88.4 tokens/s" in out
    assert "No small quant exists: even IQ1_S, the smallest, is 17.9 GB (4.5 bits a weight) instead of 6.8 GB" in out
    assert "97% of its bytes are in tensors with rows of 2,688 and 1,856 numbers" in out
    assert "llama-server -m FILE -ngl 99 --n-cpu-moe 21 -c 8192 -np 1 --jinja" in out
    assert "blocks 1, 3, 6, 8, 10, 13, 15, 17, 20" in out
    assert "bartowski/nvidia_Nemotron-3-Nano-30B-A3B-GGUF" in out and "compute buffer (estimate)" in out
    assert "rtx-3060, the first card of 12 GiB in the catalogue" in out and "published peak" in out


def test_the_answer_comes_first_and_lines_are_short(said):
    for line in (f"{NANO} --vram 12", "nemotron-3-ultra-550b-a55b --vram 12", "awkward --gpu rtx-3060",
                 "step-3.7-flash --gpu rtx-3060 --ram 32 --batch 4", f"{NANO} --gpu none --ram 32"):  # fmt: skip
        words = line.split()
        lines = said(*words).splitlines()
        assert lines[2].startswith(("It fits", "It runs split", "It does not fit"))
        assert max(map(len, lines)) <= 108 and not any(line != line.rstrip() for line in lines)


def test_under_a_second_without_torch():
    """Processor time of the whole process, since a busy machine's wall time says nothing."""
    code = f"import sys; from minimoe.cli import main; main(['plan', '{NANO}', '--vram', '12']); sys.exit('torch' in sys.modules)"
    before = os.times()
    child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = os.times()
    assert child.returncode == 0
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


def test_json_is_a_list_of_quants(said):
    found = json.loads(said(NANO, "--vram", 12, "--json"))
    assert [one["quant"] for one in found] == sorted(COMPARED, key=lambda q: -weight_bytes(catalog.model(NANO).spec, q).total)
    for one in found:
        assert one["bytes"] == weight_bytes(catalog.model(NANO).spec, one["quant"]).total
        assert one["vram_bytes"] == sum(one["vram"].values()) and one["vram_bytes"] + one["headroom_bytes"] == 12 * GIB
        assert one["vram"]["weights"] + one["ram_bytes"] == one["bytes"]
    best = [one for one in found if one["recommended"]]
    assert [one["quant"] for one in best] == ["IQ4_XS"] and best[0]["n_cpu_moe"] == 21
    assert best[0]["flags"][:4] == ["-ngl", "99", "--n-cpu-moe", "21"] and best[0]["ram_blocks"][-1] == 20
    assert best[0]["files"][0]["repo"].startswith("bartowski/")
    assert best[0]["ceiling"]["origin"] == {"vram": "published peak", "ram": "published peak"}


@pytest.mark.parametrize("name", [*catalog.models(), "small", "tiny", "awkward", "base-12gb"])
def test_text_and_json_of_every_model_agree(name, said):
    text = flat(said(name, "--gpu", "rtx-3060", "--ram", 64))
    found = json.loads(said(name, "--gpu", "rtx-3060", "--ram", 64, "--json"))
    best = [one for one in found if one["recommended"]]
    assert ("It does not fit." in text) == (not best)
    for one in best:
        assert f"llama-server -m FILE {' '.join(one['flags'])}" in text
        assert f"* {one['quant']}" in text and one["fits"] in ("whole", "split")
    for one in found:
        unit = 1e9 if found[0]["bytes"] >= 5e8 else 1e6
        assert re.search(rf"{re.escape(one['quant'])}†? {one['bytes'] / unit:.2f} ", text)


def test_fit_is_another_name(capsys):
    outs = []
    for name in ("plan", "fit"):
        assert cli.main([name, NANO, "--vram", "12"]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]


def test_one_quant_only(said):
    found = json.loads(said(NANO, "--vram", 24, "--quant", "q4_k_m", "--json"))
    assert [(one["quant"], one["fits"]) for one in found] == [("Q4_K_M", "whole")]
    out = flat(said(NANO, "--vram", 12, "--quant", "Q4_K_M"))
    assert "Q4_K_M is 24.5 GB (6.2 bits a weight) instead of 19.8 GB" in out and "No small quant" not in out


def test_dense_hybrids_fit(said):
    assert flat(said("nemotron-3-nano-4b", "--vram", 12)).count("It fits: Q8_0, 4.2 GB") == 1
    assert "It fits: Q8_0, 9.5 GB" in flat(said("nemotron-nano-9b-v2", "--vram", 12))


def test_what_would_be_needed(said):
    out = flat(said("nemotron-3-ultra-550b-a55b", "--gpu", "rtx-3060", "--ram", 64))
    assert "It does not fit. IQ1_S (the smallest, 113.9 GB) needs 11.7 GB of VRAM" in out and "107.9 GB of RAM" in out
    assert "IQ4_XS (the smallest of four bits, 298.0 GB) needs 20.3 GB of VRAM" in out and "llama-server" not in out
    assert "Nothing of four bits a weight or more fits." in flat(said("nemotron-3-ultra-550b-a55b", "--vram", 12))
    assert "of RAM; --ram GIB checks yours" not in out


def test_a_context_beyond_the_model(said):
    out = flat(said(NANO, "--vram", 12, "--context", 500_000))
    assert "A context of 500,000 is beyond the 262,144 that the model declares; computed all the same." in out
    assert "-c 500224" in out and "its makers claim 1,048,576" in out


def test_unified_memory_and_no_gpu_at_all(said):
    spark = flat(said("nemotron-3-super-120b-a12b", "--gpu", "dgx-spark"))
    assert "It fits: Q8_0, 128.5 GB" in spark and "RAM is taken" not in spark and "n-cpu-moe" not in spark
    bare = flat(said(NANO, "--gpu", "none", "--ram", 32, "--memory", "ddr5-6000"))
    assert "-ngl 0 -c 8192" in bare and "at 96 GB/s" in bare and "on no GPU: 32 GiB of memory" in bare


def test_bandwidths_and_where_they_are_from(said, tmp_path):
    def speeds(*words):
        one = json.loads(said(NANO, "--vram", 12, "--quant", "Q4_0", "--json", *words))[0]
        return one["ceiling"] and (one["ceiling"]["tokens_per_second"], one["ceiling"]["origin"])

    assert speeds()[0] == pytest.approx(90.0, abs=0.1)
    faster, origin = speeds("--bandwidth", 720)
    assert faster > 115 and origin == {"vram": "given", "ram": "published peak"}
    assert speeds("--ram-bandwidth", 96)[1]["ram"] == "given" and speeds("--memory", "ddr5-6000")[0] == speeds("--ram-bandwidth", 96)[0]
    card = tmp_path / "card.json"
    card.write_text(json.dumps({"machine": {"device": "cuda"}, "bandwidth": {"read_bytes_per_second": 720e9}}))
    assert speeds("--card", card) == (faster, {"vram": "measured", "ram": "published peak"})
    card.write_text(json.dumps({"machine": {"device": "cpu"}, "bandwidth": {"read_bytes_per_second": 96e9}}))
    assert speeds("--card", card)[1] == {"vram": "published peak", "ram": "measured"}
    out = flat(said(NANO, "--vram", 13))  # no card of the catalogue has 13 GiB
    assert "No speed is given, because no bandwidth is known" in out and "t/s" not in out


def test_vram_of_a_named_gpu_wins(said):
    one = json.loads(said("nemotron-3-nano-4b", "--gpu", "rtx-4070", "--vram", 11, "--quant", "Q8_0", "--json"))[0]
    assert one["device"]["memory_bytes"] == 11 * GIB and one["device"]["bytes_per_second"] == 504e9


def test_reserve_and_kv_type(said):
    def plan(*words):
        return json.loads(said("nemotron-nano-9b-v2", "--vram", 12, "--quant", "Q4_K_M", "--context", 131_072, "--json", *words))[0]

    assert plan("--reserve", 0)["headroom_bytes"] - plan()["headroom_bytes"] == 900_000_000
    assert plan("--kv-type", "q8_0")["vram"]["kv"] == plan()["vram"]["kv"] * 8.5 / 16


def test_a_config_file_and_a_catalogue_of_one_s_own(said, refused, tmp_path):
    config = HybridConfig.preset("small", num_nextn_predict_layers=0)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    by_path = json.loads(said(tmp_path, "--vram", 12, "--json"))
    own = tmp_path / "own.json"
    own.write_text(json.dumps({
        "models": {"mine": {"config": "config.json", "source": "here"}},
        "devices": {"my-card": {"memory_gib": 6, "gb_per_second": 100, "source": "here"}},
        "files": [{"model": "mine", "repo": "me/mine-GGUF", "quant": "Q8_0", "bytes": 12_000_000, "recipe": "default",
                   "source": "here"}],
    }))  # fmt: skip
    words = ["mine", "--gpu", "my-card", "--catalog", own]
    named = json.loads(said(*words, "--json"))
    assert [one["bytes"] for one in named] == [one["bytes"] for one in by_path]
    assert named[0]["device"]["memory_bytes"] == 6 * GIB and "me/mine-GGUF" in said(*words)
    assert "unknown model 'mine'" in refused("mine", "--vram", 12)  # the file counted for that one call
    assert "No such file or directory" in refused("mine", "--vram", 12, "--catalog", tmp_path / "none.json")


def test_the_gpu_of_this_machine(said, refused, tmp_path, monkeypatch):
    """nvidia-smi is asked when nobody says; here it is a script that prints what a driver prints."""
    def install(line):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{line}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")

    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvidia-smi shows no GPU here: say what to plan for" in refused(NANO)
    install("NVIDIA GeForce RTX 3060, 12288, 550.54")
    out = flat(said(NANO))
    assert "This machine's GPU: NVIDIA GeForce RTX 3060, 12.0 GiB." in out and "--n-cpu-moe 21" in out
    install("NVIDIA Unheard Of 9999, 24576, 550.54")
    out = flat(said(NANO))
    assert "24 GiB of VRAM" in out and "the catalogue does not know its bandwidth" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nano", "--vram", 12], "unknown model 'nano'; did you mean nemotron-3-nano-30b-a3b?"),
        ([NANO, "--gpu", "rtx-3061"], "unknown GPU 'rtx-3061'; the nearest are rtx-3060"),
        ([NANO, "--vram", 12, "--memory", "ddr4-3201"], "unknown memory 'ddr4-3201'; the nearest are ddr4-3200"),
        ([NANO, "--vram", 12, "--quant", "Q4_KM"], "unknown quant 'Q4_KM'; did you mean Q4_K_M"),
        ([NANO, "--vram", 0], "--vram 0: must be above 0"),
        ([NANO, "--vram", -12], "--vram -12: must be above 0"),
        ([NANO, "--vram", "nan"], "--vram nan: must be above 0"),
        ([NANO, "--vram", 12, "--ram", -1], "--ram -1: must be above 0"),
        ([NANO, "--vram", 12, "--bandwidth", 0], "--bandwidth 0: must be above 0"),
        ([NANO, "--vram", 12, "--ram-bandwidth", -3], "--ram-bandwidth -3: must be above 0"),
        ([NANO, "--vram", 12, "--reserve", -1], "--reserve -1: must be 0 or more"),
        ([NANO, "--vram", 12, "--context", 0], "--context 0: must be 1 or more"),
        ([NANO, "--vram", 12, "--batch", -2], "--batch -2: must be 1 or more"),
        ([NANO, "--gpu", "dgx-spark", "--ram", 64], "dgx-spark has one memory for all"),
        ([NANO, "--gpu", "none"], "--gpu none: give the host's memory with --ram"),
        (["tiny", "--vram", 12, "--quant", "Q1_0"], "Q1_0"),
    ],
)
def test_mistakes_are_one_line(words, message, refused):
    assert message in refused(*words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"), ("{", "not JSON"), ("[]", "bandwidth.read_bytes_per_second is missing"),
        ("{}", "bandwidth.read_bytes_per_second is missing"),
        ('{"bandwidth": {"missing": "no GPU"}}', "bandwidth.read_bytes_per_second is missing"),
        ('{"bandwidth": {"read_bytes_per_second": "fast"}}', "must be a number above 0"),
        ('{"bandwidth": {"read_bytes_per_second": 0}}', "must be a number above 0"),
    ],
)  # fmt: skip
def test_cards_that_are_none(content, message, refused, tmp_path):
    card = tmp_path / "card.json"
    if content is not None:
        card.write_text(content)
    assert message in refused(NANO, "--vram", 12, "--card", card)


def test_wrong_words_exit_with_2(refused):
    assert "the following arguments are required: MODEL" in refused(code=2)
    assert "argument --vram: invalid float value: 'twelve'" in refused(NANO, "--vram", "twelve", code=2)
    assert "invalid choice: 'q3_0'" in refused(NANO, "--vram", 12, "--kv-type", "q3_0", code=2)
