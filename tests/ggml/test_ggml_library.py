"""The import, the log and functions that the binding leaves out."""

import ctypes
import os
import subprocess
import sys

import pytest

from minimoe.ggml import LlamaError, library
from minimoe.ggml.library import Log, log, native, reason, system_info, type_name


def python(code, cwd=None, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, cwd=cwd)


def test_a_native_error_reaches_us_and_nobody_else(tmp_path, capfd):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    api = library()
    with log.listen() as lines:
        model = api.llama_model_load_from_file(str(tmp_path / "bad.gguf").encode(), api.llama_model_default_params())
    assert not model
    assert any(level == "error" and "version" in text for level, text in lines), lines
    assert "version" in reason(lines) and "gguf_init" not in reason(lines)
    assert capfd.readouterr() == ("", "")


def test_levels_are_ggmls():
    lines = Log()
    for number, level in enumerate(["none", "debug", "info", "warn", "error"]):
        lines.write(number, f"line {number}\n")
        assert lines.recent[-1] == (level, f"line {number}")


def test_lines_are_put_together():
    lines = Log()
    lines.write(2, "a tensor ")
    lines.write(5, "goes ")
    lines.write(2, "on\nnext")
    lines.write(4, "an error\n")  # begins a line of its own, whatever was pending
    lines.write(5, "of two\n\n")
    assert lines.recent == [("info", "a tensor goes on"), ("info", "next"), ("error", "an error"), ("error", "of two")]


def test_the_log_is_bounded_but_a_listener_hears_all():
    lines = Log(keep=10)
    with lines.listen() as heard:
        for n in range(50):
            lines.write(2, f"{n}\n")
    lines.write(2, "later\n")
    assert len(lines.recent) == 10 and [text for _, text in heard] == [str(n) for n in range(50)]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([("error", "llama_model_load: error loading model: llama_model_loader: tensor 'x' not found"),
          ("error", "llama_model_load_from_file_impl: failed to load model")], "tensor 'x' not found"),
        ([("warn", "f: unused tensor"), ("error", "f: g: no memory")], "no memory"),
        ([("error", "f: tensor 'x' data is not within the file bounds, model is corrupted or incomplete")],
         "tensor 'x' data is not within the file bounds; the file is truncated or damaged, fetch or export it again"),
        ([("error", "llama_model_load_from_file_impl: failed to load model")], "failed to load model"),
        ([("info", "all is well"), ("warn", "nearly")], ""),
    ],
)  # fmt: skip
def test_the_reason_is_the_first_error_that_tells(lines, why):
    assert reason(lines) == why


def test_functions_come_from_the_library_that_is_in_use():
    assert type_name(12) == "q4_K"
    kind = native("ggml_backend_cpu_buffer_type", ctypes.c_void_p)()
    name = native("ggml_backend_buft_name", ctypes.c_char_p, ctypes.c_void_p)
    assert kind and name(kind) == b"CPU"
    if sys.platform == "linux":
        with open("/proc/self/maps") as maps:
            bases = {line.split()[-1] for line in maps if "libggml-base" in line}
        assert len(bases) == 1, "a second copy has buffer types of its own"
    with pytest.raises(LlamaError, match="no function ggml_no_such_thing"):
        native("ggml_no_such_thing", None)


def test_system_info():
    info = system_info()
    assert info and all(isinstance(value, bool) for value in info.values())


# ---------------------------------------------------------------------- without a build that works
EVERY_DOOR = """
import sys
{before}
from minimoe.ggml import LlamaError, library
from minimoe.ggml import amx, batch, child, header, quantizer
from minimoe.runtime import llamacpp, mtp
doors = [
    library, amx.amx_compiled, amx.amx_is_broken, lambda: llamacpp.load({file!r}), lambda: llamacpp.check_file({file!r}),
    lambda: quantizer.quantize_file({file!r}, {file!r} + ".q", "Q8_0"), lambda: quantizer.predict({file!r}, "Q4_K_M"),
    lambda: batch.decode(None, [1]),
]
for door in doors:
    try:
        door()
    except LlamaError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (None, "llama-cpp-python is not installed: pip install"),
        ("__version__ = '0.3.2'", "llama-cpp-python 0.3.2 is older than 0.3.36"),
        ("raise RuntimeError('Failed to load shared library:\\n libgomp.so.1')", "cannot be loaded (Failed to load"),
        ("import no_such_dependency", "llama-cpp-python lacks no_such_dependency"),
    ],
    ids=["missing", "old", "broken", "half"],
)
def test_every_door_says_in_one_line_what_is_missing(module, words, tiny_file, tmp_path):
    before = "sys.modules['llama_cpp'] = None"
    if module is not None:
        (tmp_path / "llama_cpp.py").write_text(module)
        before = f"sys.path.insert(0, {str(tmp_path)!r})"
    child = python(EVERY_DOOR.format(before=before, file=str(tiny_file)))
    lines = child.stdout.splitlines()
    assert child.returncode == 0, child.stderr
    assert len(lines) == 8 and all(words in line and "minimoe doctor" in line for line in lines), lines


def test_these_rooms_need_no_torch():
    child = python("import sys\nfrom minimoe.ggml import quantizer, amx\nfrom minimoe.runtime import mtp\n"
                   "from minimoe.ggml import library; library()\nprint('torch' in sys.modules)")  # fmt: skip
    assert child.stdout.split() == ["False"], child.stderr


def test_an_interpreter_that_ends_with_a_model_open_ends_quietly(tiny_file):
    child = python(f"from minimoe.runtime.llamacpp import load\nllama = load({str(tiny_file)!r}, check=False)")
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")
