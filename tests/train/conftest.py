"""Text and a tokenizer for runs of the tiny preset that take tenths of a second."""

import pytest

from minimoe.data import Tokenizer, load_corpus


@pytest.fixture(scope="session")
def few_files(tmp_path_factory):
    """A folder of 30 short source files."""
    folder = tmp_path_factory.mktemp("few")
    corpus = load_corpus()
    for name, text in zip(corpus.names[:30], corpus.texts[:30]):
        (folder / name.replace("/", "_")).write_text(text[:3000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_run(few_files, tmp_path_factory):
    """``minimoe train`` of the tiny preset on them; more words and ``--out`` are still to be added."""
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(load_corpus(few_files).texts, 320).save(tokenizer)
    return ["train", "--preset", "tiny", "--batch", "2", "--length", "32", "--device", "cpu",
            "--data", str(few_files), "--tokenizer", str(tokenizer)]  # fmt: skip


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of 40 files of functions that are much alike."""
    folder = tmp_path_factory.mktemp("text")
    for n in range(40):
        (folder / f"{n}.py").write_text("".join(f"def f{k}(x):\n    return x + {k * n}\n\n\n" for k in range(30)))
    return folder
