"""A larger corpus that needs no download: the Python sources of the packages that the book itself installs.

``package_names.txt`` lists the distributions with their licences, all of them MIT, BSD, Apache or PSF. Which files a
distribution has is read from the reader's own installation, so versions matter and the corpus has a hash.
"""
from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from .corpus import Corpus, CorpusError, load_corpus, read_text

NAMES = "package_names.txt"
LARGEST_SOURCE = 200_000  # bytes; a larger source file is a table
LARGEST_SHARE = 3_000_000  # bytes of one package, so that none is most of the corpus
LONG = 30  # characters; shorter lines, as "return False", are everywhere
# folders of tests, and of other projects' code with its own licence
APART = {"test", "tests", "testing", "benchmarks", "distutils", "_distutils",
         "_vendor", "vendor", "_vendored", "vendored", "extern", "third_party"}  # fmt: skip
GENERATED = re.compile(r"(?i)generated (file|from|by|with|using|code)|(auto|automatically|was|is)[- ]?generated|do not edit")
OTHER_LICENCE = re.compile(r"\b[AL]?GPL\b|GNU (?:Lesser |Affero )?General Public")  # a borrowed file in a free package
HEAD = 1_500  # characters in which a file says such things


def packages() -> Corpus:
    """Sources of the listed packages that are installed; ``missing`` names the others.

    Left out are tests, vendored copies, generated files, tables, files under the GPL, files that mostly repeat earlier
    ones (``without_copies``: transformers' models are near copies of each other), files that repeat the standard
    library's held-out side (``without_overlap``), so that the latter stays a fair test, and what ``LARGEST_SHARE`` cuts
    off. Raises CorpusError if none is installed.
    """
    names: list[str] = []
    texts: list[str] = []
    missing = []
    for package in tqdm(listed(), desc="reading packages", unit="package", disable=None, leave=False):
        try:
            found = list(_sources(metadata.distribution(package)))
        except metadata.PackageNotFoundError:
            missing.append(package)
            continue
        names += [name for name, _ in found]
        texts += [text for _, text in found]
    if not names:
        raise CorpusError("none of the packages that this book lists is installed; pip install 'minimoe[book,run]'")
    corpus = without_copies(Corpus("packages", tuple(names), tuple(texts), tuple(missing)))
    corpus = at_most(without_overlap(corpus, load_corpus("stdlib").split()[1]), LARGEST_SHARE)
    pairs = sorted(zip(corpus.names, corpus.texts))  # as in a folder of these files, so that both have one hash
    return Corpus(corpus.name, tuple(name for name, _ in pairs), tuple(text for _, text in pairs), corpus.missing)


def listed() -> dict[str, str]:
    """{distribution: SPDX licence} of ``package_names.txt``."""
    lines = resources.files(__package__).joinpath(NAMES).read_text(encoding="utf-8").splitlines()
    return dict(line.split() for line in lines if not line.startswith("#"))


def without_copies(corpus: Corpus, share: float = 0.5) -> Corpus:
    """Without documents that repeat earlier ones: over ``share`` of their distinct long lines were in those kept before.

    A document without long lines stays, unless it is an exact copy.
    """
    seen: set[int] = set()
    texts: set[str] = set()
    keep = []
    for text in corpus.texts:
        lines = long_lines(text)
        new = text not in texts and sum(line in seen for line in lines) <= share * len(lines)
        keep.append(new)
        if new:
            seen |= lines
            texts.add(text)
    return corpus.only(name for name, new in zip(corpus.names, keep) if new)


def without_overlap(corpus: Corpus, held_out: Corpus, share: float = 0.2) -> Corpus:
    """Without documents that share more than ``share`` of their lines with one document of ``held_out``.

    Counted are distinct lines longer than ``LONG`` characters, against the smaller document's number: so neither a
    large file with a whole held-out one in it nor a fragment of one gets through.
    """
    where: dict[int, list[int]] = defaultdict(list)
    sizes = []
    for number, text in enumerate(held_out.texts):
        lines = long_lines(text)
        sizes.append(len(lines))
        for line in lines:
            where[line].append(number)

    def fair(text: str) -> bool:
        lines = long_lines(text)
        shared = Counter(number for line in lines for number in where.get(line, ()))
        return all(count <= share * min(len(lines), sizes[number]) for number, count in shared.items())

    return corpus.only(name for name, text in zip(corpus.names, corpus.texts) if fair(text))


def at_most(corpus: Corpus, limit: int) -> Corpus:
    """At most ``limit`` bytes of each top-level folder; which files stay, the hashes of their names decide."""
    room: dict[str, int] = defaultdict(lambda: limit)
    keep = set()
    sizes = {name: len(text.encode()) for name, text in zip(corpus.names, corpus.texts)}
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        top = name.split("/")[0]
        if sizes[name] <= room[top]:
            room[top] -= sizes[name]
            keep.add(name)
    return corpus.only(keep)


def long_lines(text: str) -> set[int]:
    """Hashes of the distinct lines longer than ``LONG`` characters, indentation apart."""
    return {hash(line) for line in map(str.strip, text.splitlines()) if len(line) > LONG}


def _sources(distribution: metadata.Distribution) -> Iterator[tuple[str, str]]:
    """(name, text) of a distribution's Python files that people wrote, in the order of their names."""
    for path in sorted(distribution.files or (), key=str):
        if path.suffix == ".py" and not _apart(path):
            text = read_text(Path(path.locate()), LARGEST_SOURCE)
            if text and not GENERATED.search(text[:HEAD]) and not OTHER_LICENCE.search(text[:HEAD]):
                yield path.as_posix(), text


def _apart(path: PurePosixPath) -> bool:
    stem = path.stem
    tests = stem == "conftest" or stem.startswith("test_") or stem.endswith(("_test", "_tests"))
    return tests or ".." in path.parts or not APART.isdisjoint(path.parts[:-1])
