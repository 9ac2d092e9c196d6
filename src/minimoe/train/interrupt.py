"""Being asked to stop: Ctrl-C, or SIGTERM from whoever needs the machine."""
from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SAID = b"\nstopping after this step; once more stops at once, and --resume then goes on from the last checkpoint\n"


@contextmanager
def between_steps() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C and SIGTERM only make the function that this gives answer True.

    Python would otherwise raise KeyboardInterrupt between any two of its instructions, for example when the optimizer
    has moved half of the weights, and nothing could be saved then. The second signal does raise it. In another thread
    than the main one nothing changes, because signals do not come there.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        with suppress(OSError):
            os.write(2, SAID)  # print may not be entered from within print

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
