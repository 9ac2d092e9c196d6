"""A child that answers, fails, stalls or dies: one line, and this process lives."""

import os
import sys
import threading

import pytest

from minimoe.ggml import LlamaError, child
from minimoe.ggml.child import LlamaDied, last_words, run

PATIENT = """
import ctypes, os, sys, time
from minimoe.ggml.library import LlamaError, library, native

def double(numbers): return [2 * n for n in numbers]
def refuse(): raise LlamaError("no, because é")
def stumble(): return {}["key"]
def chatter():
    os.write(1, b"a library that greets"); print("and more"); return "answer"
def fall(): ctypes.string_at(1, 1)
def ggml_assert():  # inside the binding's silence
    from llama_cpp._utils import suppress_stdout_stderr
    library()
    with suppress_stdout_stderr(disable=False):
        native("ggml_abort", None, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p)(b"/src/x.cpp", 7, b"GGML_ASSERT(%s) failed")
def leave(): os._exit(7)
def stall(): time.sleep(60)
"""


@pytest.fixture
def patient(tmp_path, monkeypatch):
    (tmp_path / "patient.py").write_text(PATIENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return lambda name, timeout=60, **arguments: run(f"patient:{name}", "the patient", timeout, **arguments)


def test_an_answer(patient):
    assert patient("double", numbers=[1, 2.5]) == [2, 5.0]


def test_what_is_printed_does_not_get_between(patient):
    assert patient("chatter") == "answer"


def test_a_refusal_arrives_as_it_was_said(patient):
    with pytest.raises(LlamaError, match="^no, because é$") as caught:
        patient("refuse")
    assert not isinstance(caught.value, LlamaDied)


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("stumble", "exit code 1", "KeyError: 'key'"),
        ("leave", "exit code 7", ""),
        ("fall", "SIGSEGV", ""),
        ("ggml_assert", "SIGABRT", "x.cpp: GGML_ASSERT"),
    ],
)
def test_a_death_is_one_line(patient, name, how, said):
    with pytest.raises(LlamaDied) as caught:
        patient(name)
    error = caught.value
    assert error.how == how and said in error.said and bool(said) == bool(error.said)
    assert "\n" not in str(error) and str(error).startswith(f"the patient: llama.cpp ended with {how}")


def test_a_child_that_stalls_is_ended(patient):
    with pytest.raises(LlamaError, match="the patient: no answer from llama.cpp within 1 s"):
        patient("stall", timeout=1)


def test_files_beside_the_notebook_are_not_imported(patient, tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in ("json", "ctypes", "numpy", "minimoe"):
        (folder / f"{name}.py").write_text("raise SystemExit('taken for a library')")
    monkeypatch.chdir(folder)
    assert patient("double", numbers=[4]) == [8]


def test_from_a_thread_while_stdout_is_not_a_file(patient, monkeypatch):
    """As in a notebook, whose sys.stdout has no file behind it."""
    import io

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    answers = []
    thread = threading.Thread(target=lambda: answers.append(patient("double", numbers=[1])))
    thread.start()
    thread.join()
    assert answers == [[2]]


@pytest.mark.parametrize(
    ("platform", "code", "how"),
    [("linux", -4, "SIGILL"), ("linux", -9, "SIGKILL, killed from outside, most likely for want of memory"),
     ("linux", -99, "signal 99"), ("linux", 3, "exit code 3"), ("win32", 0xC000001D, "SIGILL"),
     ("win32", 0xC0000005, "SIGSEGV"), ("win32", 3, "SIGABRT"), ("win32", 2, "exit code 2")],
)  # fmt: skip
def test_how_a_process_ended(platform, code, how, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    assert child._how(code) == how


def test_last_words():
    assert last_words("loading\n/a/b/llama-vocab.cpp:42: GGML_ASSERT(n == 1) failed\nerror: later") == (
        "llama-vocab.cpp: GGML_ASSERT(n == 1) failed")  # fmt: skip
    assert last_words("terminate called\n  what():  std::bad_alloc\n") == "std::bad_alloc"
    assert last_words("error: one\nwarn: two\nerror: three\nend") == "three"
    assert last_words("only a warning") == "" and last_words("a\nb", any_line=True) == "b"
