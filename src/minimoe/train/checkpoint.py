"""Checkpoints of a run: everything that the next step depends on, in one file that is whole or not there."""
from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .options import TrainError
from .trouble import out_of_memory

FORMAT = 1
DIGITS = 16  # hexadecimal digits of the file's SHA-256 in its name


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, ``step-00000100-<hash>.pt``: the newest ``keep`` of them stay.

    A file's name ends in the hash of its bytes, so damage is seen before anything is believed.
    """

    folder: Path
    keep: int = 2

    def save(self, step: int, content: dict[str, Any]) -> Path:
        """Write ``content`` as the checkpoint before step number ``step``; older ones go only after it is safe.

        Raises TrainError if the disk is full or the folder cannot be written; older checkpoints are then untouched.
        """
        temporary = self.folder / f".step-{step:08d}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save({"format": FORMAT, "step": step} | content, file)
                file.flush()
                os.fsync(file.fileno())
            path = self.folder / f"step-{step:08d}-{_digest(temporary)}.pt"
            os.replace(temporary, path)
            _sync(self.folder)
        except (OSError, RuntimeError) as error:  # torch reports a short write as a RuntimeError
            with suppress(OSError):
                temporary.unlink()
            before = f"{self.paths()[0].name} is as it was" if self.paths() else "there is none yet"
            raise TrainError(f"{self.folder}: the checkpoint before step {step} could not be written ({_one_line(error)}); "
                             f"{before}; make room and go on with --resume") from None
        for old in [*self.paths()[self.keep :], *self.folder.glob(".step-*.tmp")]:  # the latter are of a killed process
            old.unlink(missing_ok=True)
        return path

    def drop_newer(self, than: Path) -> None:
        """Remove the files that :meth:`load` skipped before it came to ``than``, lest they count among those to keep."""
        for path in self.paths():
            if path.name > than.name:
                path.unlink(missing_ok=True)

    def last_before(self, step: int) -> Path | None:
        """The newest checkpoint of an earlier step."""
        return next((path for path in self.paths() if _step(path) < step), None)

    def paths(self) -> list[Path]:
        """The files there are, the newest first."""
        found = [path for path in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d{8}-[0-9a-f]{16}\.pt", path.name)]
        return sorted(found, reverse=True)

    def load(
        self, map_location: str | torch.device = "cpu", say: Callable[[str], object] = warnings.warn
    ) -> tuple[dict[str, Any], Path] | None:
        """The newest checkpoint that is whole, and its path; None if there is none at all.

        A damaged file is skipped, and ``say`` is told its name. Raises TrainError if all of them are damaged, or if
        another version of this package wrote it.
        """
        paths = self.paths()
        for path in paths:
            try:
                content = self._read(path, map_location)
            except _Damaged as error:
                say(f"{path}: {error}; going back to the checkpoint before it")
                continue
            if content.get("format") != FORMAT:
                raise TrainError(f"{path}: its format is {content.get('format')}, and this version of minimoe reads {FORMAT}; "
                                 "use the version that wrote it, or choose a new directory")
            return content, path
        if paths:
            raise TrainError(f"{self.folder}: none of its {len(paths)} checkpoints can be read; start anew in a new directory")
        return None

    @staticmethod
    def _read(path: Path, map_location: str | torch.device) -> dict[str, Any]:
        try:
            whole = _digest(path) == path.stem.rsplit("-", 1)[1]
        except OSError as error:
            raise _Damaged(f"it cannot be read ({error.strerror})") from None
        if not whole:
            raise _Damaged("its bytes have changed since it was written")
        try:
            content = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # what an unpickler makes of bytes that are no pickle is not written down anywhere
            if out_of_memory(error):
                raise
            raise _Damaged(f"it is no checkpoint ({_one_line(error)})") from None
        if not isinstance(content, dict):
            raise _Damaged("it is no checkpoint")
        return content


class _Damaged(Exception):
    """Why a file cannot be used."""


def _step(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def _sync(folder: Path) -> None:
    """Make the renaming last through a power cut, where the system offers that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
