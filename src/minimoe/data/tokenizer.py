"""Text to token ids and back, and conversations to text: one vocabulary for minimoe, transformers and llama.cpp."""
from __future__ import annotations

import hashlib
import json
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, trainers

from ..files import write_text
from . import bpe
from .bpe import IGNORE_MERGES, LEAST, LONGEST, SPECIAL, TokenizerError, sound

FILES = TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
ROLES = ("system", "user", "assistant")
THOUGHT_TAGS = ("<think>", "</think>")


class Tokenizer:
    """A byte-level BPE vocabulary: made by ``train``, ``load`` or ``from_parts`` and never changed afterwards.

    tokens       one string an id: bytes as GPT-2's letters, special tokens as they are
    merges       "left right", the most urgent first
    special      text -> id of the tokens that plain text never becomes
    pre          llama.cpp's name of the pre-tokenizer, a key of ``bpe.PRE``
    fingerprint  32 hexadecimal digits of SHA-256 over these four. The chat template is left out: it changes no id.

    Nothing is put before a text (add_bos is false).
    """

    def __init__(self, tokens: Sequence[str], merges: Sequence[str], special_ids: Iterable[int], pre: str) -> None:
        self.tokens, self.merges, self.pre = list(tokens), list(merges), pre
        ids = sorted({operator.index(i) for i in special_ids})
        bpe.check(self.tokens, self.merges, ids, pre)
        self.special = {self.tokens[i]: i for i in ids}
        self.pad_id, self.bos_id, self.eos_id = (self.special[name] for name in SPECIAL[:3])
        canonical = json.dumps([pre, self.tokens, self.merges, ids], separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()[:32]
        letters = bpe.byte_letters()
        self._bytes = [
            token.encode() if token in self.special else bytes(letters[letter] for letter in token)
            for token in self.tokens
        ]
        self._engine = bpe.engine(self.tokens, self.merges, ids, pre)
        self._engine.encode_special_tokens = True  # takes special tokens in a text for text; _encode_special cuts them out
        longest_first = sorted(self.special, key=len, reverse=True)
        self._specials = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pre: str = "qwen2") -> Tokenizer:
        """Learn merges from ``texts``; the same texts in any order give the same tokenizer.

        The vocabulary stays smaller than ``vocab_size`` if the texts have too few pairs to join: the result's own
        ``vocab_size`` counts. No token is longer than 32 bytes.
        """
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < LEAST:
            raise TokenizerError(f"vocab_size={vocab_size!r}: must be a whole number of at least {LEAST}: "
                                 f"256 bytes and {len(SPECIAL)} special tokens")
        if isinstance(texts, str):
            raise TokenizerError("texts is a single str; give a list or a generator of them")
        learner = tokenizers.Tokenizer(models.BPE(ignore_merges=pre in IGNORE_MERGES))
        learner.pre_tokenizer = bpe.pre_tokenizer(pre)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=sorted(bpe.byte_letters()),
            max_token_length=LONGEST + 1, show_progress=False,  # an exclusive limit
        )
        learner.train_from_iterator(map(sound, texts), trainer)
        return cls(*bpe.parts(learner), pre)

    @classmethod
    def from_parts(cls, tokens: Sequence[str], merges: Sequence[str], special_ids: Iterable[int], pre: str) -> Tokenizer:
        """From what a GGUF file holds; ``special_ids`` are the ids whose token type is CONTROL."""
        return cls(tokens, merges, special_ids, pre)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Read what ``save`` wrote; a vocabulary that was changed since is refused."""
        path, config = Path(directory) / TOKENIZER, Path(directory) / CONFIG
        fields = _read_json(config)
        pre, stored = fields.get("minimoe_pre"), fields.get("minimoe_fingerprint")
        if not isinstance(pre, str) or pre not in bpe.PRE or not isinstance(stored, str):
            raise TokenizerError(f"{config}: minimoe_pre={pre!r}, minimoe_fingerprint={stored!r}; "
                                 "was it written by Tokenizer.save?")
        text = _read(path)
        try:
            found = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing finer
            raise TokenizerError(f"{path}: not a tokenizer file ({_one_line(error)})") from None
        try:
            tokenizer = cls(*bpe.parts(found), pre)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from None
        if tokenizer.fingerprint != stored:
            raise TokenizerError(f"{path}: fingerprint {tokenizer.fingerprint}, but {CONFIG} says {stored}; "
                                 "the vocabulary was changed after it was saved")
        # transformers obeys the whole file: a normalizer or another regular expression in it would split the two
        if not bpe.encode_alike(found, tokenizer._engine):
            raise TokenizerError(f"{path}: does not cut text as {pre!r} does; it was changed after it was saved")
        return tokenizer

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``FILES`` into a directory, for ``load`` and for ``transformers.AutoTokenizer.from_pretrained``."""
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise TokenizerError(f"{directory} is a file; choose a directory")
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": SPECIAL[0],
            "bos_token": SPECIAL[1],
            "eos_token": SPECIAL[2],
            "clean_up_tokenization_spaces": False,
            "minimoe_pre": self.pre,
            "minimoe_fingerprint": self.fingerprint,
        }
        write_text(directory / TOKENIZER, self._fresh_engine().to_str(pretty=True) + "\n")
        write_text(directory / TEMPLATE, chat_template())
        write_text(directory / CONFIG, json.dumps(config, indent=1) + "\n")

    def _fresh_engine(self) -> tokenizers.Tokenizer:
        return bpe.engine(self.tokens, self.merges, self.special.values(), self.pre)

    # ------------------------------------------------------------------ text and ids
    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens, pre={self.pre!r}, fingerprint={self.fingerprint})"

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of ``text``. "<|im_end|>" in it is ordinary text, or with ``allow_special`` the one token."""
        sound(text)
        return self._encode_special(text) if allow_special else self._encode_plain(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text that ``ids`` stand for, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """What one token adds to a text; a character may be spread over several tokens."""
        try:
            number = operator.index(id)
        except TypeError:
            raise TokenizerError(f"token id {id!r} is not a whole number") from None
        if not 0 <= number < self.vocab_size:
            raise TokenizerError(f"token id {number} is outside of 0 to {self.vocab_size - 1}")
        return self._bytes[number]

    def _encode_plain(self, text: str) -> list[int]:
        return self._engine.encode(text, add_special_tokens=False).ids

    def _encode_special(self, text: str, unshield: Mapping[int, str] | None = None) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(self._specials.split(text)):
            ids += [self.special[piece]] if number % 2 else self._encode_plain(piece.translate(unshield or {}))
        return ids

    # ------------------------------------------------------------------ conversations
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], thinking: bool | int = True, add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text, to be read by ``encode(…, allow_special=True)``; ``encode_chat`` is the safe way.

        messages  dicts of "role" (system, user or assistant) and "content". Thoughts are part of an assistant's
                  content, "<think>\\n…\\n</think>\\n…"; those before the last user turn are cut.
        thinking  False or 0 closes the thought before it begins. True or a budget in tokens leaves it open; the
                  budget is kept while generating, because these models know no tag for it.
        """
        return _template().render(
            messages=_checked(messages), enable_thinking=_thinks(thinking), add_generation_prompt=add_generation_prompt
        )

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], thinking: bool | int = True, add_generation_prompt: bool = True
    ) -> list[int]:
        """As ``encode(apply_chat_template(…), allow_special=True)``, except that what people write stays text.

        In the rendered text nobody can tell the template's "<|im_end|>" from one that a user typed in order to end
        the turn and go on as the system (prompt injection). So the special tokens in contents are shielded while
        the template is filled in. An assistant's thought tags pass: the template itself works on them.
        """
        # A lone surrogate is no character, and _checked refuses texts that hold one: free to stand for a token.
        stand_ins = {name: chr(0xD800 + n) for n, name in enumerate(self.special)}
        shielded = []
        for message in _checked(messages):
            passing = THOUGHT_TAGS if message["role"] == "assistant" else ()
            pieces = self._specials.split(message["content"])
            pieces[1::2] = [name if name in passing else stand_ins[name] for name in pieces[1::2]]
            shielded.append({"role": message["role"], "content": "".join(pieces)})
        text = _template().render(
            messages=shielded, enable_thinking=_thinks(thinking), add_generation_prompt=add_generation_prompt
        )
        return self._encode_special(text, {ord(letter): name for name, letter in stand_ins.items()})


def chat_template() -> str:
    """The Jinja source that is saved beside the vocabulary and goes into GGUF files."""
    return resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # as transformers and llama-cpp-python set it up
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(chat_template())


def _thinks(thinking: bool | int) -> bool:
    if isinstance(thinking, bool):  # a bool is an int too
        return thinking
    if not isinstance(thinking, int) or thinking < 0:
        raise TokenizerError(f"thinking={thinking!r}: must be True, False or a budget of 0 or more tokens")
    return thinking > 0


def _checked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TokenizerError("messages must be a list of at least one {'role': …, 'content': …}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise TokenizerError(f"messages[{number}] must be a dict of 'role' and 'content' and nothing else")
        if message["role"] not in ROLES:
            raise TokenizerError(f"messages[{number}]: role {message['role']!r} is none of {', '.join(ROLES)}")
        try:
            sound(message["content"])
        except TokenizerError as error:
            raise TokenizerError(f"messages[{number}]: {error}") from None
    return [dict(message) for message in messages]


# ------------------------------------------------------------------ files
def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TokenizerError(f"{path} is missing; Tokenizer.save writes {', '.join(FILES)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read ({_one_line(error)})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON ({_one_line(error)})") from None
    if not isinstance(data, dict):
        raise TokenizerError(f"{path}: must hold a JSON object")
    return data
