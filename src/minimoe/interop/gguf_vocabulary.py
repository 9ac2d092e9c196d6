"""A tokenizer as GGUF keys, and back. llama.cpp aborts on many a wrong vocabulary, so it is checked before."""
from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, TokenType

from ..config import HybridConfig
from .gguf_keys import GGUFError, Keys

if TYPE_CHECKING:
    from ..data import Tokenizer

OWN_FINGERPRINT = "minimoe.tokenizer.fingerprint"


def check_tokenizer(tokenizer: Any, config: HybridConfig) -> None:
    """Raise GGUFError for a tokenizer that is not the model's, or that llama.cpp would abort on."""
    wrong = [name for name in ("tokens", "merges", "special", "pre", "fingerprint") if not hasattr(tokenizer, name)]
    if wrong:
        raise GGUFError(f"tokenizer: a {type(tokenizer).__name__} has no {wrong[0]}; "
                        "give a minimoe.data.Tokenizer, or None")
    tokens, wanted = tokenizer.tokens, config.tokenizer_fingerprint
    if wanted is not None and tokenizer.fingerprint != wanted:
        raise GGUFError(f"the tokenizer has fingerprint {tokenizer.fingerprint}, the model was trained with {wanted} "
                        "(tokenizer_fingerprint in its config); give the tokenizer that was saved with the model")
    if len(tokens) > config.vocab_size:
        raise GGUFError(f"vocab_size={config.vocab_size}: smaller than the tokenizer's {len(tokens)} tokens; "
                        "give the tokenizer that the model was trained with")
    if len(set(tokens)) < len(tokens):
        raise GGUFError(f"token {Counter(tokens).most_common(1)[0][0]!r} occurs twice in the tokenizer; "
                        "llama.cpp aborts on such a vocabulary")


def write_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer | None, config: HybridConfig) -> None:
    """The vocabulary, filled up to the model's with unused tokens. None: llama.cpp's "no_vocab", ids without text."""
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    from ..data.tokenizer import chat_template

    tokens, special = list(tokenizer.tokens), set(tokenizer.special.values())
    kinds = [TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(len(tokens))]
    known = set(tokens)
    for i in range(len(tokens), config.vocab_size):
        padding = f"[PAD{i}]"
        while padding in known:
            padding = f"[{padding}]"
        tokens.append(padding)
        kinds.append(TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # llama.cpp insists on merges and gguf-py on a filled list; a merge of nothing with nothing never applies
    writer.add_token_merges(list(tokenizer.merges) or [""])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    if "<|im_end|>" in tokenizer.special:
        writer.add_eot_token_id(tokenizer.special["<|im_end|>"])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat_template())
    writer.add_string(OWN_FINGERPRINT, tokenizer.fingerprint)


def stored_fingerprint(keys: Keys) -> str | None:
    """Of the tokenizer that the file was written with; None in files of others."""
    return keys.read(OWN_FINGERPRINT, str, None)


def read_tokenizer(keys: Keys) -> Tokenizer | None:
    """The file's tokenizer; None, with a warning, for a vocabulary that is not of this package's kind."""
    if keys.read("tokenizer.ggml.model", str) in ("no_vocab", "none"):
        return None
    from ..data import Tokenizer, TokenizerError

    tokens, merges = keys.read("tokenizer.ggml.tokens", list), keys.read("tokenizer.ggml.merges", list, [])
    kinds = keys.read("tokenizer.ggml.token_type", list, [TokenType.NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise GGUFError(f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens")
    while tokens and kinds[len(tokens) - 1] == TokenType.UNUSED:
        tokens.pop()
    special = [i for i, kind in enumerate(kinds) if kind == TokenType.CONTROL]
    pre, fingerprint = keys.read("tokenizer.ggml.pre", str, "default"), stored_fingerprint(keys)
    try:
        tokenizer = Tokenizer.from_parts(tokens, [merge for merge in merges if merge], special, pre)
    except TokenizerError as error:
        if fingerprint is not None:
            raise GGUFError(f"its vocabulary was changed: {error}") from None
        warnings.warn(f"read without its tokenizer, which this package has no form for: {error}", stacklevel=3)
        return None
    if fingerprint is not None and tokenizer.fingerprint != fingerprint:
        raise GGUFError(f"its vocabulary has fingerprint {tokenizer.fingerprint}, {OWN_FINGERPRINT} says {fingerprint}; "
                        "the vocabulary was changed after the file was written")
    return tokenizer
