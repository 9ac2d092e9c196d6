"""The command line, run as a reader runs it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import minimoe
from minimoe import HybridConfig, catalog, cli, doctor
from minimoe.sizing import count_parameters


def run(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "minimoe", *words], capture_output=True, text=True, **options
    )


def refuses(words, code, capsys):
    """Run in this process; return the one line on stderr."""
    try:
        got = cli.main(words)
    except SystemExit as stop:
        got = stop.code
    out, error = capsys.readouterr()
    assert got == code and out == ""
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def test_version():
    child = run("--version")
    assert (child.returncode, child.stdout, child.stderr) == (0, f"minimoe {minimoe.__version__}\n", "")


def test_help_names_every_command():
    child = run("--help")
    assert child.returncode == 0
    assert all(f"{name} " in child.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: minimoe {name}" in capsys.readouterr().out


def test_inspect_text(capsys):
    assert cli.main(["inspect", "nemotron-3-nano-30b-a3b"]) == 0
    out = capsys.readouterr().out
    for figure in ("31,577,940,288", "2,875,433,280", "192 MiB", "46 MiB", "23 mamba2, 6 attention, 23 moe"):
        assert figure in out


def test_inspect_shows_sliding_windows_apart(capsys):
    assert cli.main(["inspect", "step-3.7-flash"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in ("KV, each token 48 KiB", "KV, full sliding windows 66 MiB", "KV, 8,192 tokens 450 MiB"):
        assert line in lines
    assert cli.main(["inspect", "qwen3-30b-a3b"]) == 0
    assert "sliding" not in capsys.readouterr().out


@pytest.mark.parametrize("name", catalog.models())
def test_inspect_json_of_every_model(name, capsys):
    assert cli.main(["inspect", name, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    count = count_parameters(catalog.model(name).spec)
    assert figures["parameters"]["total"] == count.total and figures["parameters"]["mtp"] == count.mtp
    state = figures["state"]
    assert state["kv_bytes"]["32768"] == 32_768 * state["kv_bytes_per_token"] + state["kv_window_bytes"]
    assert (state["kv_window_bytes"] > 0) == (name == "step-3.7-flash")
    assert figures["source"] == catalog.model(name).source


def test_inspect_a_file_a_folder_and_a_preset(tmp_path, capsys):
    config = HybridConfig.preset("small", num_nextn_predict_layers=0)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    totals = []
    for name in (str(tmp_path), str(tmp_path / "config.json"), "small"):
        assert cli.main(["inspect", name, "--json"]) == 0
        totals.append(json.loads(capsys.readouterr().out)["parameters"]["total"])
    assert totals == [count_parameters(config).total] * 3


def test_inspect_lists_no_context_beyond_the_declared_one(capsys):
    assert cli.main(["inspect", "tiny", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["state"]["kv_bytes"]) == ["4096"]


def test_inspect_needs_no_torch():
    code = (
        "import sys; from minimoe.cli import main; main(['inspect', 'nemotron-3-nano-30b-a3b']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_user_mistakes_are_one_line(tmp_path, capsys):
    assert "required: COMMAND" in refuses([], 2, capsys)
    assert "invalid choice: 'inspekt'" in refuses(["inspekt"], 2, capsys)
    assert "unrecognized arguments: --jsn" in refuses(["inspect", "tiny", "--jsn"], 2, capsys)
    assert "did you mean nemotron-3-nano-4b?" in refuses(["inspect", "nemotron-3-nano-4"], 1, capsys)
    assert "no such file" in refuses(["inspect", str(tmp_path / "config.json")], 1, capsys)
    assert "no such file" in refuses(["inspect", str(tmp_path)], 1, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[1]", "a config is a JSON object, this is a list"),
        (b"{}", "neither hybrid_override_pattern nor layers_block_type"),
        (b'{"model_type": "llama"}', "model_type='llama': must be 'nemotron_h'"),
        (b'{"hybrid_override_pattern": "MX", "vocab_size": 8, "hidden_size": 8}', "unknown letter 'X'"),
        (b'{"hybrid_override_pattern": "M", "vocab_size": "8", "hidden_size": 8}', "vocab_size='8'"),
        (
            b'{"hybrid_override_pattern": "M", "vocab_size": 8, "hidden_size": 8, "time_step_limit": 1}',
            "time_step_limit=1: must be two numbers",
        ),
    ],
)
def test_files_that_are_no_config(tmp_path, capsys, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    error = refuses(["inspect", str(path)], 1, capsys)
    assert message in error and str(path) in error


def test_a_file_that_may_not_be_read(tmp_path, capsys, monkeypatch):
    def denied(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    path = tmp_path / "config.json"
    path.write_text("{}")
    monkeypatch.setattr(
        pathlib.Path, "read_text", denied
    )  # root may read everything, so chmod proves nothing
    assert refuses(["inspect", str(path)], 1, capsys) == f"minimoe: error: {path}: Permission denied\n"


@pytest.mark.skipif(os.name == "nt", reason="pipes break differently")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words", [("inspect", "nemotron-3-nano-30b-a3b"), ("inspect", "tiny", "--json"), ("--help",)]
)
def test_a_pipe_that_closes_early(words, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    child = subprocess.run(
        [sys.executable, "-m", "minimoe", *words], stdout=writer, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writer)
    assert child.stderr == ""
    assert child.returncode == (
        0 if words == ("--help",) and unbuffered else 141
    )  # argparse swallows the error


def test_doctor_exit_code_is_whether_the_book_can_run(monkeypatch, capsys):
    fine = [doctor.Finding("ok", "disk", "80 GB"), doctor.Finding("note", "GPU", "none")]
    monkeypatch.setattr(doctor, "examine", lambda: fine)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "ok   disk: 80 GB\nnote GPU: none\n\nThe book can run here.\n"

    monkeypatch.setattr(
        doctor, "examine", lambda: [*fine, doctor.Finding("fix", "torch", "is not installed", "pip")]
    )
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("\nThe book cannot run here yet; to fix: torch.\n")

    assert cli.main(["doctor", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["ready"] is False
    assert data["findings"][2] == {
        "level": "fix",
        "topic": "torch",
        "text": "is not installed",
        "command": "pip",
    }


def test_doctor_without_torch_numpy_and_psutil(tmp_path):
    """-S hides what is installed: only the standard library and this package are there."""
    source = os.path.dirname(os.path.dirname(minimoe.__file__))
    child = subprocess.run(
        [sys.executable, "-S", "-m", "minimoe", "doctor", "--json"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": source, "PATH": str(tmp_path)},
    )  # fmt: skip
    assert child.stderr == ""
    assert child.returncode == 1
    findings = {finding["topic"]: finding for finding in json.loads(child.stdout)["findings"]}
    assert (
        findings["torch"]["text"] == "is not installed"
        and "pip install torch" in findings["torch"]["command"]
    )
    assert findings["GPU"]["level"] == "note"
    assert "no C compiler" in findings["llama-cpp-python"]["text"] or sys.platform == "win32"
