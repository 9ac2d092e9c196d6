"""What a byte-level BPE vocabulary is made of, and when transformers and llama.cpp read it alike.

BPE starts from the 256 bytes and joins the commonest neighbours, one merge after the other. Before that, a
pre-tokenizer cuts the text into words that no merge may cross. GGUF files do not hold its regular expression, only
its name, so both sides must mean the same by it: ``PRE`` pairs llama.cpp's names with the Hugging Face form.
"""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from ..errors import MinimoeError

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")  # ids 0 to 6 after training
LEAST = 256 + len(SPECIAL)
LONGEST = 32  # bytes: llama-cpp-python's Llama.detokenize drops longer tokens (rules of dashes, deep indents) silently

# Letter pairs instead of (?i:…), which would take the long s of 'ſ for an s; llama.cpp does not.
_WORDS = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenizerError(MinimoeError):
    """Text, messages or files that a tokenizer cannot take; the message names the culprit and the rule."""


def _by_regex(digits: str) -> Any:
    split = pre_tokenizers.Split(Regex(_WORDS.replace("DIGITS", digits)), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# Value of tokenizer.ggml.pre -> the same cut in Hugging Face's terms. qwen2 is the default: every digit is a token
# of its own, so that numbers of one length look alike, and llama_detokenize leaves its text alone (with gpt-2 and
# llama-bpe it turns " ," into ",", and no key in the file switches that off).
PRE = {
    "qwen2": lambda: _by_regex(""),
    "llama-bpe": lambda: _by_regex("{1,3}"),
    "gpt-2": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
}
IGNORE_MERGES = ("llama-bpe",)  # a word that is itself a token is taken whole, whatever the merges say


@cache
def byte_letters() -> dict[str, int]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the other 68 become U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def pre_tokenizer(pre: str) -> Any:
    """The Hugging Face pre-tokenizer that cuts as llama.cpp does under the name ``pre``."""
    if pre not in PRE:
        raise TokenizerError(f"pre={pre!r}: unknown pre-tokenizer; known are {', '.join(PRE)}")
    return PRE[pre]()


def sound(text: str) -> str:
    """``text`` itself, or a TokenizerError if it is none or has a lone surrogate."""
    if not isinstance(text, str):
        raise TokenizerError(f"a text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which UTF-8 "
                             "cannot hold; text.encode(errors='replace').decode() puts '?' in its place") from None
    return text


def check(tokens: list[str], merges: list[str], special_ids: list[int], pre: str) -> None:
    """Refuse what one of the two readers would abort on, drop silently, or read in another way."""
    pre_tokenizer(pre)
    if not all(isinstance(text, str) for text in (*tokens, *merges)):
        raise TokenizerError("tokens and merges must be lists of str")
    if len(set(tokens)) < len(tokens):  # llama.cpp aborts the process
        raise TokenizerError(f"token {Counter(tokens).most_common(1)[0][0]!r} occurs twice")
    if special_ids and not 0 <= special_ids[0] <= special_ids[-1] < len(tokens):
        raise TokenizerError(f"special ids {special_ids}: outside of the {len(tokens)} tokens")
    special = {tokens[i] for i in special_ids}
    if missing := [name for name in SPECIAL if name not in special]:
        raise TokenizerError(f"special token {missing[0]!r} is missing; not a vocabulary of minimoe")
    letters = byte_letters()
    for token in tokens:
        if token not in special and not (token and set(token) <= letters.keys()):
            raise TokenizerError(f"token {token!r} is neither special nor made of bytes")
    ordinary = set(tokens) - special
    if lost := sorted(letters.keys() - ordinary):  # transformers would leave the byte out of the text
        raise TokenizerError(f"byte {letters[lost[0]]:#04x} has no token")
    for merge in merges:
        pair = merge.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ordinary:
            raise TokenizerError(f"merge {merge!r}: must be two tokens that together are a third")


def engine(tokens: list[str], merges: list[str], special_ids: Iterable[int], pre: str) -> tokenizers.Tokenizer:
    """The Hugging Face tokenizer of these parts, without anything else."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in IGNORE_MERGES))
    made.pre_tokenizer = pre_tokenizer(pre)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in special_ids])
    return made


def parts(made: tokenizers.Tokenizer) -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and special ids of a Hugging Face tokenizer."""
    stored = json.loads(made.to_str())
    model, special_ids = stored["model"], [added["id"] for added in stored["added_tokens"] if added["special"]]
    if model["type"] != "BPE" or sorted(model["vocab"].values()) != list(range(len(model["vocab"]))):
        raise TokenizerError("must be BPE with ids from 0 on without a gap")
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(pair) for pair in model["merges"]], special_ids


def encode_alike(one: tokenizers.Tokenizer, other: tokenizers.Tokenizer) -> bool:
    """Whether two files mean the same. transformers' save_pretrained adds a post-processor that does nothing, and
    how to cut and fill batches; these may differ."""
    stored = [json.loads(made.to_str()) for made in (one, other)]
    for side in stored:
        for key in ("post_processor", "truncation", "padding"):
            side.pop(key)
    return stored[0] == stored[1] and one.num_special_tokens_to_add(False) == other.num_special_tokens_to_add(False)
