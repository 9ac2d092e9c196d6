"""Documents to train on that need no download: Python's own standard library, installed packages, or a folder of text.

``stdlib_files.txt`` names the files of the standard library that every CPython 3.11 to 3.13 installs, without tests,
tables and what distributions package apart. Their text differs a little between versions, so a corpus has a hash.
"""
from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ..errors import MinimoeError

LARGEST_FILE = 50_000_000  # bytes; what is larger is data, not a document


class CorpusError(MinimoeError):
    """A corpus that cannot be read; the message says what to give instead."""


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    names    file names, relative to the corpus' folder
    texts    their text, line ends as "\\n"
    missing  files of the list that this installation lacks
    """

    name: str
    names: tuple[str, ...]
    texts: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of all names and texts, hexadecimal: two corpora with the same hash are the same."""
        digest = hashlib.sha256()
        for name, text in zip(self.names, self.texts, strict=True):
            digest.update(f"{name}\0{text}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Size of the texts in UTF-8."""
        return sum(len(text.encode()) for text in self.texts)

    def split(self, every: int = 20) -> tuple["Corpus", "Corpus"]:
        """(for training, for validation): about one document in ``every`` is held out.

        A document's name decides by its hash, so adding documents moves none from one side to the other. Raises
        CorpusError if one side would be empty.
        """
        # surrogateescape: a file name on Linux may be no UTF-8
        hashes = {name: hashlib.sha256(name.encode(errors="surrogateescape")).digest()[0] for name in self.names}
        held_out = {name for name in self.names if hashes[name] % every == 0}
        sides = self.only(set(self.names) - held_out), self.only(held_out)
        if not all(side.names for side in sides):
            raise CorpusError(f"{self.name}: {len(self.names)} documents are too few to hold some out; add files")
        return sides

    def only(self, names: Iterable[str]) -> "Corpus":
        """The documents of these names, in the same order."""
        wanted = set(names)
        kept = [(name, text) for name, text in zip(self.names, self.texts, strict=True) if name in wanted]
        return Corpus(self.name, tuple(name for name, _ in kept), tuple(text for _, text in kept), self.missing)


def load_corpus(source: str | os.PathLike[str] = "stdlib") -> Corpus:
    """``"stdlib"``, ``"packages"`` (packages.py), or a folder: every file below it that is UTF-8 text, hidden ones and links
    apart.

    Raises CorpusError for a folder that is not there or holds no text.
    """
    if source == "stdlib":
        return _stdlib()
    if source == "packages":
        from .packages import packages

        return packages()
    folder = Path(source)
    if not folder.is_dir():
        raise CorpusError(f"{folder}: no such folder; give a folder of text files, 'stdlib' or 'packages'")
    found: list[tuple[str, str]] = []
    for directory, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for file in sorted(files):
            path = Path(directory, file)
            text = None if file.startswith(".") or path.is_symlink() else read_text(path)
            if text:
                found.append((path.relative_to(folder).as_posix(), text))
    if not found:
        raise CorpusError(f"{folder}: no text in it; files must be UTF-8")
    names, texts = zip(*sorted(found), strict=True)
    return Corpus(folder.name, names, texts)


def _stdlib() -> Corpus:
    listed = resources.files(__package__).joinpath("stdlib_files.txt").read_text(encoding="utf-8").split()
    root = Path(sysconfig.get_path("stdlib"))
    texts = {name: read_text(root / name) for name in listed}
    names = tuple(name for name in listed if texts[name])
    if not names:
        raise CorpusError(f"{root} has none of Python's own source files; train on a folder of text instead")
    missing = tuple(name for name in listed if not texts[name])
    return Corpus("stdlib", names, tuple(texts[name] or "" for name in names), missing)


def read_text(path: Path, largest: int = LARGEST_FILE) -> str | None:
    """The file's text, or None if it is not there, not text, or larger than ``largest`` bytes."""
    try:
        if not path.is_file() or path.stat().st_size > largest:  # a named pipe would be waited for
            return None
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    # a NUL byte is valid UTF-8, and a sure sign of data
    return None if "\0" in text else text.replace("\r\n", "\n")
