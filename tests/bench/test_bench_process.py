"""Real child processes: what they tell, how they die, and that none is left behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from minimoe.bench.process import ChildError, stream

CHILD = """
import os, signal, sys, time

def count(upto):
    print("noise on stdout")
    for n in range(upto):
        yield {"n": n}

def threads():
    yield {name: os.environ[name] for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}

def raises():
    yield {"n": 0}
    raise RuntimeError("no kernel\\nfor this")

def dies(how):
    yield {"n": 0}
    sys.stderr.write("GGML_ASSERT(x) failed\\n")
    sys.stderr.flush()
    os.kill(os.getpid(), getattr(signal, how))
    time.sleep(10)

def waits():
    yield {"pid": os.getpid()}
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _importable(tmp_path, monkeypatch):
    (tmp_path / "bench_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def run(function, timeout=30.0, **arguments):
    return stream(f"bench_child:{function}", arguments, 3, timeout)


def test_items_come_one_by_one_and_noise_does_not():
    assert list(run("count", upto=3)) == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_threads_are_set_before_anything_is_imported():
    assert list(run("threads")) == [{"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"}]


def told(items):
    """What came, and the line at the end."""
    found = []
    with pytest.raises(ChildError) as error:
        for item in items:
            found.append(item)
    assert "\n" not in str(error.value)
    return found, str(error.value)


def test_an_exception_is_one_line_and_what_came_before_counts():
    assert told(run("raises")) == ([{"n": 0}], "RuntimeError: no kernel for this")


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
@pytest.mark.parametrize(("how", "words"), [("SIGILL", "SIGILL (GGML_ASSERT(x) failed)"), ("SIGKILL", "for want of memory")])
def test_a_death_is_one_line(how, words):
    found, line = told(run("dies", how=how))
    assert found == [{"n": 0}] and line.startswith("its process ended with SIG") and words in line


def test_a_function_that_is_not_there():
    found, line = told(stream("minimoe.bench.worker:no_such", {}, 1, 30))
    assert found == [] and "no_such" in line


def gone(pid, seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_too_long_is_one_line():
    items = run("waits", timeout=2.0)
    pid = next(items)["pid"]
    assert told(items) == ([], "no end within 2 s") and gone(pid)


def test_who_stops_listening_ends_it():
    items = run("waits")
    pid = next(items)["pid"]
    items.close()
    assert gone(pid)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_its_parent(how):
    code = ("from minimoe.bench.process import stream\n"
            "for item in stream('bench_child:waits', {}, 1, 60): print(item['pid'], flush=True)")  # fmt: skip
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pid = int(parent.stdout.readline())
    os.kill(parent.pid, how)
    parent.wait(10)
    parent.stdout.close()
    assert gone(pid)
