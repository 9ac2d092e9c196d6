"""llama-cpp-python, imported so that llama.cpp's own words reach the user.

The binding reads ggml's log levels by an older table: errors are dropped and warnings printed. Here a callback of
our own keeps every line with its true level; nothing is printed.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import MinimoeError

OLDEST = (0, 3, 36)  # the first binding with load_mtp
LEVELS = ("none", "debug", "info", "warn", "error")  # ggml.h
INSTALL = 'pip install "minimoe[llama]"; "minimoe doctor" names the build for this machine'

Line = tuple[str, str]  # level, text


class LlamaError(MinimoeError):
    """Something that llama.cpp cannot do or did not survive; one line that says what, and what to do."""


class Log:
    """What llama.cpp and ggml write, a line at a time, with its level.

    ``recent`` has the last lines. ``echo``, a file descriptor, gets errors and failed assertions at once: what a
    child process leaves behind when it dies.
    """

    def __init__(self, keep: int = 400) -> None:
        self.recent: list[Line] = []
        self.echo: int | None = None
        self._keep, self._level, self._begun = keep, "none", ""
        self._listeners: list[list[Line]] = []

    def write(self, level: int, text: str) -> None:
        name = LEVELS[level] if 0 <= level < len(LEVELS) else self._level  # the one after them continues a line
        if name != self._level and self._begun:
            self._line(self._begun)
            self._begun = ""
        self._level = name
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            self._line(line)

    def _line(self, text: str) -> None:
        if not text.strip():
            return
        line = (self._level, text.strip())
        self.recent.append(line)
        del self.recent[: -self._keep]
        for listener in self._listeners:
            listener.append(line)
        if line[0] == "error":
            self.cry(line[1])

    def cry(self, text: str) -> None:
        """To ``echo``, past sys.stderr: the binding closes that while it loads a model."""
        if self.echo is not None:
            os.write(self.echo, f"error: {text}\n".encode("utf-8", "replace"))

    @contextlib.contextmanager
    def listen(self) -> Iterator[list[Line]]:
        """A list that fills with every line written inside the ``with``."""
        lines: list[Line] = []
        self._listeners.append(lines)
        try:
            yield lines
        finally:
            self._listeners = [other for other in self._listeners if other is not lines]


log = Log()


@functools.cache
def library() -> ModuleType:
    """The module ``llama_cpp``, with our log callback installed.

    Raises LlamaError if llama-cpp-python is missing, too old or a build that cannot be loaded.
    """
    # before the import: ggml reads it then, and would otherwise start a debugger to print a dying process's stack
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        module = importlib.import_module("llama_cpp")
    except ModuleNotFoundError as error:
        if error.name == "llama_cpp":
            raise LlamaError(f"llama-cpp-python is not installed: {INSTALL}") from None
        raise LlamaError(f"llama-cpp-python lacks {error.name}: {INSTALL}") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise LlamaError(f"llama-cpp-python cannot be loaded ({_one_line(error)}): {INSTALL}") from None
    version = tuple(int(number) for number in re.findall(r"\d+", module.__version__)[:3])
    if version < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise LlamaError(f"llama-cpp-python {module.__version__} is older than {wanted}: {INSTALL}")
    _install_log(module)
    module.llama_backend_init()
    return module


def _install_log(module: ModuleType) -> None:
    @module.llama_log_callback
    def callback(level: int, text: bytes, user_data: Any) -> None:
        log.write(level, text.decode("utf-8", "replace"))

    module.llama_log_set(callback, None)
    _keep(callback)
    if log.echo is not None:
        kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
        last_words = kind(lambda text: log.cry(text.decode("utf-8", "replace")))
        _find(module, "ggml_set_abort_callback", ctypes.c_void_p, kind)(last_words)
        _keep(last_words)


def _keep(callback: Any) -> None:
    """Never freed: llama.cpp may still call it while the interpreter takes its modules down."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(callback))


def native(name: str, result: Any, *arguments: Any) -> Any:
    """A C function of libllama or of a ggml library below it that the binding does not declare, as ctypes calls it.

    Taken from the libraries that are already mapped: the wheel ships each under several file names, and a second
    copy would have buffer types of its own that the first takes for foreign.
    """
    return _find(library(), name, result, *arguments)


def _find(module: ModuleType, name: str, result: Any, *arguments: Any) -> Any:
    handle = module.llama_cpp._lib  # dlsym on a handle also searches what that library was linked with
    for place in (handle, *(_mapped_dlls() if sys.platform == "win32" else ())):
        try:
            function = place[name]  # by item: a function object of our own, its types are not the binding's
        except AttributeError:
            continue
        function.restype, function.argtypes = result, list(arguments)
        return function
    raise LlamaError(f"llama.cpp has no function {name} in llama-cpp-python {module.__version__}: {INSTALL}")


def _mapped_dlls() -> Iterator[ctypes.CDLL]:  # Windows searches one library only
    find = ctypes.WinDLL("kernel32").GetModuleHandleW
    find.restype, find.argtypes = ctypes.c_void_p, [ctypes.c_wchar_p]
    for name in ("ggml-base", "ggml", "ggml-cpu"):
        for spelling in (f"{name}.dll", f"lib{name}.dll"):
            handle = find(spelling)
            if handle:
                yield ctypes.CDLL(spelling, handle=handle)


def library_files() -> list[Path]:
    """The shared libraries of the build in use (LLAMA_CPP_LIB_PATH, or those of the wheel)."""
    folder = Path(library().llama_cpp._lib._name).parent
    return sorted(path for path in folder.iterdir() if re.search(r"ggml|llama", path.name) and path.is_file())


def system_info() -> dict[str, bool]:
    """What the build was compiled with: {"AVX2": True, "AMX_INT8": True, ...}."""
    text = library().llama_print_system_info().decode("utf-8", "replace")
    return {name: value != "0" for name, value in re.findall(r"(\w+) = (\w+)", text)}


def type_name(number: int) -> str:
    """ggml's name of a tensor type: 12 -> "q4_K"."""
    return native("ggml_type_name", ctypes.c_char_p, ctypes.c_int)(number).decode()


_DAMAGE = r"file bounds|failed to read|exceeds (remaining|maximum)|must be in \[0|number of dimensions|has offset"


def reason(lines: Sequence[Line], level: str = "error") -> str:
    """The first line of that level that says why, without the names of C functions before it; "" if none."""
    plain = [_without_functions(text) for found, text in lines if found == level]
    telling = [text for text in plain if not re.match(r"failed to load model|=+$", text)]
    found = (telling or plain or [""])[0].removesuffix(", model is corrupted or incomplete")
    damaged = "; the file is truncated or damaged, fetch or export it again" if re.search(_DAMAGE, found) else ""
    return found + damaged


def _without_functions(text: str) -> str:
    text = re.sub(r"^(?:[\w:~]+: )+", "", text)
    return re.sub(r"^(?:error loading model|failed to quantize): (?:[\w:~]+: )*", "", text)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
