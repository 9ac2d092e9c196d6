"""benchmarks/: every program gets the same model, every number is a measurement, and what is missing is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import arithmetic  # noqa: E402
import decode  # noqa: E402
import measure  # noqa: E402
import memory  # noqa: E402
import peers  # noqa: E402
import prefill  # noqa: E402
import run_all  # noqa: E402
import train_step  # noqa: E402

from minimoe import HybridConfig, HybridLM  # noqa: E402
from minimoe.layers import moe  # noqa: E402
from minimoe.runtime import llamacpp  # noqa: E402
from minimoe.sizing import count_parameters  # noqa: E402

CPU = torch.device("cpu")
ALL = {"minimoe", "transformers", "llama.cpp"}
QUICK = ["--preset", "tiny", "--device", "cpu", "--seconds", "0"]


@pytest.fixture(autouse=True)
def _global_settings_come_back():
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    yield
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == before
    assert float(torch.tensor(1e-42) * 1) > 0, "denormals are still flushed"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    peers.write_weights(peers.shape("tiny"), folder, torch.float32)
    return folder


def read(folder: Path, what: str) -> dict:
    result = json.loads((folder / f"bench_{what}_tiny_cpu.json").read_text())
    assert result["experiment"] == f"bench_{what}_tiny_cpu" and result["machine"]["threads"] == 1
    assert result["card"] and all(result["card"].values())
    numbers = result["numbers"]
    assert numbers["missing"] == {} and numbers["clock"] == "CPU seconds"
    return numbers


def check_case(done: dict, programs: set[str]) -> None:
    assert set(done["seconds"]) == programs and "failed" not in done
    assert set(done["ratio"]) == programs - {"minimoe"}
    for name, s in done["seconds"].items():
        assert 0 < s["low"] <= s["median"] <= s["high"]
        assert done["tokens_per_second"][name] == pytest.approx(done["tokens"] / s["median"])
        assert done["bound"]["share"][name] * done["bound"]["per_second"] * s["median"] == pytest.approx(done["bound"]["needs"])
    if "choice" in done:
        times = {name: value for name, value in done["choice"].items() if isinstance(value, float)}
        assert set(times) == set(peers.EXPERTS) and min(times, key=times.get) == done["experts"]


def check_where(where: dict, programs: set[str]) -> None:
    assert set(where) == programs
    for shares in where.values():
        assert sum(shares[kind] for kind in ("matmul", "attention", "convolution", "optimizer", "rest")) == pytest.approx(1)
        assert 0 < shares["matmul"] < 1 and shares["calls"] > 100


def test_training_step(tmp_path, capsys):
    train_step.main([*QUICK, "--lengths", "16", "32", "--tokens", "32", "--no-memory", "--out", str(tmp_path)])
    numbers = read(tmp_path, "train_step")
    both = ALL - {"llama.cpp"}
    assert [(c["dtype"], c["batch"], c["length"]) for c in numbers["cases"]] == [
        ("float32", 2, 16), ("float32", 1, 32), ("bfloat16", 2, 16), ("bfloat16", 1, 32),
    ]  # fmt: skip
    for done in numbers["cases"]:
        check_case(done, both)
        assert done["loss_difference"] < {"float32": 1e-5, "bfloat16": 1e-2}[done["dtype"]]
    check_where(numbers["cases"][0]["where"], both)
    first = numbers["cases"][0]["where"]["minimoe"]
    assert first["in_products"] * first["products_at"] == pytest.approx(numbers["cases"][0]["bound"]["share"]["minimoe"])
    assert {len(e) for e in numbers["exponent"]["float32"].values()} == {1}
    assert "training step, bfloat16, 1 x 32" in capsys.readouterr().out


def test_prompt(tmp_path):
    prefill.main([*QUICK, "--lengths", "16", "32", "--no-memory", "--out", str(tmp_path)])
    numbers = read(tmp_path, "prefill")
    assert set(numbers["agreement"]["float32"]) == ALL - {"minimoe"}
    assert all(a["largest"] < 1e-4 for a in numbers["agreement"]["float32"].values())
    for done in numbers["cases"]:
        check_case(done, ALL)
    check_where(numbers["cases"][0]["where"], ALL - {"llama.cpp"})
    assert set(numbers["exponent"]["float32"]) == ALL and set(numbers["versions"]) == ALL


def test_decoding_and_verification(tmp_path):
    decode.main([*QUICK, "--lengths", "16", "--tokens", "4", "--out", str(tmp_path)])
    numbers = read(tmp_path, "decode")
    check_case(numbers["cases"][0], ALL)
    check_where(numbers["cases"][0]["where"], ALL - {"llama.cpp"})
    assert set(numbers["generate"][0]["seconds"]) == ALL and numbers["generate"][0]["tokens"] == 8
    verify = numbers["verify"][0]
    assert verify["tokens"] == [2, 4, 8] and len(verify["seconds"]) == 3
    assert all(0.5 < r["median"] < 8 for r in verify["to_one"])


def test_programs_write_the_same_tokens(weights):
    clock, asked = measure.clock(CPU), []
    ours, theirs, missing = peers.pair(weights, CPU, torch.float32, clock)
    llama = peers.llama(weights, CPU, torch.float32, clock, 64, missing)
    assert theirs and llama and not missing
    ids = torch.arange(5, 12)[None]
    for program in (ours, theirs):
        forward, seen = program.model.forward, []
        program.model.forward = lambda *a, forward=forward, seen=seen, **k: seen.append(a or k["input_ids"]) or forward(*a, **k)
        program.decoder(ids, 6)()
        asked.append([int((x[0] if isinstance(x, tuple) else x).flatten()[-1]) for x in seen])
    assert asked[0] == asked[1] and len(asked[0]) == 7
    assert llama.api.greedy(llama.llama, ids[0].tolist(), 6, ignore_end=True).ids == asked[0][1:]


def test_other_logits_stop_the_benchmark():
    logits = torch.randn(1, 9, 5)
    assert measure.agreement(logits, logits.clone(), "it", "float32") == {"median": 0, "largest": 0}
    one = logits.clone()
    one[0, 3] += 1  # a router's near tie at one token
    assert measure.agreement(logits, one, "it", "float32")["median"] == 0
    for other in (logits + 0.01, logits * torch.nan):
        with pytest.raises(SystemExit, match="it computes other logits"):
            measure.agreement(logits, other, "it", "float32")


def test_what_is_missing_is_one_line(weights, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(llamacpp, "library", llamacpp.library.__wrapped__)  # it remembers what it once imported
    prefill.main([*QUICK, "--lengths", "16", "--no-memory", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.count("without ") == 2 and "without transformers: " in said and "without llama.cpp: " in said
    numbers = json.loads((tmp_path / "bench_prefill_tiny_cpu.json").read_text())["numbers"]
    assert set(numbers["cases"][0]["seconds"]) == {"minimoe"} and set(numbers["missing"]) == ALL - {"minimoe"}


def test_transformers_without_a_choice_of_experts(weights):
    theirs = peers.Transformers(weights, CPU, torch.float32, measure.clock(CPU))
    config, work = peers.shape("tiny"), lambda: theirs.prefill(torch.arange(8)[None])
    theirs.model.set_experts_implementation = None
    assert set(theirs.take_fastest(config, 8, work)) == {"as loaded"}
    assert theirs.experts == "as loaded" and theirs.chosen is None

    def only_eager(name: str) -> None:
        if name != "eager":
            raise ValueError(f"{name} is unknown here\nmore")

    theirs.model.set_experts_implementation = only_eager
    found = theirs.take_fastest(config, 8, work)
    assert theirs.experts == "eager" and found["grouped_mm"] == "ValueError: grouped_mm is unknown here"

    def broken() -> float:
        raise RuntimeError("no kernel")

    missing: dict[str, str] = {}
    assert peers.choose(theirs, config, 8, broken, missing) == (None, {}) and "no kernel" in missing["transformers"]


def test_a_failing_peer_is_left_out_and_a_failing_minimoe_is_not():
    def broken() -> float:
        raise RuntimeError("no kernel\nfor this")

    runs, failed = measure.in_turns({"minimoe": lambda: 1.0, "other": broken}, 0)
    assert runs == {"minimoe": [1.0] * measure.LEAST} and failed == {"other": "RuntimeError: no kernel"}
    with pytest.raises(RuntimeError):
        measure.in_turns({"minimoe": broken, "other": lambda: 1.0}, 0)


def test_ratios_are_taken_repeat_by_repeat_and_the_first_round_is_dropped():
    ours, theirs = iter([99.0, 1.0, 2.0, 4.0]), iter([99.0, 3.0, 4.0, 4.0])
    bound = measure.Bound("FLOP", needs=10.0, does=20.0, work=lambda: 1.0)
    done = measure.case({"minimoe": lambda: next(ours), "other": lambda: next(theirs)}, 0, tokens=8, bound=bound)
    assert done["repeats"] == 3 and done["ratio"]["other"] == {"median": 2.0, "low": 1.0, "high": 3.0, "of_least": 3.0}
    assert done["tokens_per_second"] == {"minimoe": 4.0, "other": 2.0}
    assert done["bound"] == {"of": "FLOP", "needs": 10.0, "per_second": 20.0, "share": {"minimoe": 0.25, "other": 0.125}}


def test_exponents():
    assert measure.exponents([1, 2, 8], [1.0, 2.0, 32.0]) == pytest.approx([1, 2])


@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", "MEM*E"])
def test_flops_are_those_that_torch_counts(monkeypatch, pattern):
    """Counted from the shape against torch's count of the matrices, operator by operator."""
    monkeypatch.setattr(moe, "experts_grouped", moe.experts_loop)  # grouped products are not on torch's list
    config = HybridConfig.preset("tiny", hybrid_override_pattern=pattern, num_nextn_predict_layers=0, intermediate_size=96)
    model, length = HybridLM(config), 24
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None])
    counts = counter.get_flop_counts()["Global"]
    counted = counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0)
    convolution = sum(t.numel() for name, t in model.state_dict().items() if name.endswith("conv1d.weight"))
    scores = pattern.count("*") * 2 * config.num_attention_heads * config.head_dim * length * (length + 1) // 2
    recurrence = pattern.count("M") * 2 * config.mamba_inner_size * config.ssm_state_size * length
    assert arithmetic.forward_flops(config, 1, length) == counted + 2 * (length * convolution + scores + recurrence)
    one = arithmetic.forward_flops(config, 1, length, heads=1)
    assert arithmetic.forward_flops(config, 1, length) - one == 2 * (length - 1) * config.vocab_size * config.hidden_size
    assert arithmetic.training_flops(config, 3, length) == 9 * arithmetic.forward_flops(config, 1, length)


def test_bytes_of_a_token():
    config = peers.shape("small")
    size = arithmetic.decoding_bytes(config, 1000, "float32")
    kv = config.hybrid_override_pattern.count("*") * 2 * config.num_key_value_heads * config.head_dim * 1000 * 4
    more = arithmetic.decoding_bytes(config, 2000, "float32")
    assert more - size == kv
    assert size > 4 * count_parameters(config).active_with_head + kv


def test_the_trial_shape_is_the_one_the_goals_were_set_with():
    assert 5.1e6 < count_parameters(peers.shape("trial")).total < 5.3e6
    assert peers.shape("small").num_nextn_predict_layers == 0 and peers.shape("small").eos_token_id is None


def test_bad_options_are_one_line(capsys):
    for words, why in ((["--lengths", "0"], "must be 1 or more"), (["--device", "nonsense"], "nonsense")):
        with pytest.raises(SystemExit):
            prefill.main(words)
        assert why in capsys.readouterr().err.splitlines()[-1]


def test_plan_names_presets_and_options_that_exist(capsys):
    assert sum(row[-1] for row in run_all.CPU) <= 20
    for name, preset, lengths, more, _ in run_all.CPU + run_all.CUDA:
        assert peers.shape(preset) and {"train_step": train_step, "prefill": prefill, "decode": decode}[name]
        assert max(lengths) < 16_384 or (name, preset) == ("prefill", "small") or (name, preset, more) in {
            row[:2] + (row[3],) for row in run_all.CUDA
        }
    assert run_all.main(["--list", "--device", "cpu", "--only", "decode"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("3 benchmarks on cpu: about ") and sum("decode.py --preset" in line for line in out) == 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the resident set's peak can be reset on Linux only")
def test_peak_memory_grows_with_the_work(weights):
    same = dict(program="minimoe", folder=weights, batch=4, dtype="float32", device=CPU)
    short, long = (memory.added_bytes("train_step", length=n, **same) for n in (128, 1024))
    activations = 4 * 4 * 1024 * 64 * 5  # one hidden state a layer, at least
    assert isinstance(short, int) and isinstance(long, int) and long > max(3 * short, activations)
    wrong = memory.added_bytes("prefill", **same | {"folder": weights / "none"}, length=8)
    assert isinstance(wrong, str) and "config.json is missing" in wrong
