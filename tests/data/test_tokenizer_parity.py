"""The same ids, bytes and prompts in minimoe, transformers and llama.cpp."""

import contextlib
import ctypes
import random
import sysconfig
import unicodedata
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from minimoe.data import Tokenizer
from minimoe.data.bpe import PRE, SPECIAL, byte_letters, parts
from minimoe.data.tokenizer import chat_template
from minimoe.ggml import library

transformers = pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")
llama_cpp = library()  # quiet, and its log stays that of the package for the tests that share this process
chat_format = pytest.importorskip("llama_cpp.llama_chat_format")

HARD = [
    "", " ", "\n", "héllo wörld — “quotes” … naïve café", "日本語のテキスト、漢字かな交じり文。", "한국어 텍스트",
    "Привет, мир! Ёлка", "العربية ١٢٣٤", "हिन्दी पाठ नमस्ते", "ไทยภาษา ทดสอบ", "emoji 👩‍👩‍👧‍👦 🇩🇪 👍🏽 text",
    "e\u0301 combining a\u0300\u0301", "zero\u200bwidth\u200djoin\ufeffbom", "x\u00a0y\u2003z\u3000w\u2028line\u2029para",
    "½ ² Ⅷ ①②③ ٣٤٥ 123456789 1,234.56", "\x00\x01\x1c\x1f\x7f\x85 control", "I'm you're HE'LL we'Ve 'S 's ’s 'ſ",
    "\U0001f600\U00020000\U0010ffff", "ﬁ ﬂ ǅ ß ſ K Å İ", "a\r\nb\r\n\r\nc\r\rd\n\r\ne", "def f():\r\n\treturn 1\r\n",
    "a\n\n\n\n\nb", "   \n   \n\t\n  x", "x" + " " * 100 + "y", "\n" * 50, "\t\t\tx\t\ty   ", "x \n y", "end   \n\n",
    " " * 5000, "1" * 5000, "=" * 5000, "ab" * 5000, "漢" * 5000, "a , b . c ! d ? e 's n't",
]  # fmt: skip
MARKED = ["a<|im_start|>user\nhi<|im_end|>b", "x </s> y", "<|im_start", "< |im_end|>", "<think>\n</think>", "<s><s><pad>",
          "<|im_end|><|im_end|>", "  <think>  x  </think>\n\n", "<<think>>", "</s", "<THINK>"]  # fmt: skip


def library_texts():
    """At least a megabyte of the standard library, line ends as they are."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts.append(path.read_bytes().decode("utf-8"))
        size += len(texts[-1])
        if size > 1_050_000:
            return texts
    raise AssertionError(f"only {size} characters of standard library")


def fuzz(count, seed=0):
    chance = random.Random(seed)
    rare = "éß漢字ñЖ👍½²'’\u00a0\u200d\u0301\u3000"
    for _ in range(count):
        letters = (
            (chr(chance.randrange(32, 127)), chance.choice(" \t\n\r"), chance.choice(rare), chance.choice("0123456789"),
             chance.choice("abcXYZ"), chr(chance.randrange(0xA1, 0x3000)))
            for _ in range(chance.randrange(1, 60))
        )  # fmt: skip
        yield "".join(map(chance.choice, letters))


# ---------------------------------------------------------------------- llama.cpp
class Vocabulary:
    """llama.cpp's view of a GGUF file that holds a vocabulary and no weights."""

    def __init__(self, path):
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, "llama.cpp refuses the vocabulary"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def close(self):
        llama_cpp.llama_model_free(self.model)

    def encode(self, text, parse_special=False):
        data = text.encode()
        ids = (llama_cpp.llama_token * (len(data) + 8))()
        # add_special=True, so that a bos would show if the file asked for one
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, len(ids), True, parse_special)
        assert count >= 0
        return list(ids[:count])

    def token_bytes(self, i):
        piece = ctypes.create_string_buffer(32)
        count = llama_cpp.llama_token_to_piece(self.vocab, i, piece, len(piece), 0, True)
        assert count >= 0, "longer than 32 bytes"
        return piece.raw[:count]

    def detokenize(self, ids):
        text = ctypes.create_string_buffer(32 * len(ids) + 1)
        array = (llama_cpp.llama_token * max(1, len(ids)))(*ids)
        count = llama_cpp.llama_detokenize(self.vocab, array, len(ids), text, len(text), False, True)
        assert count >= 0
        return text.raw[:count]

    def chat_template(self):
        return llama_cpp.llama_model_chat_template(self.model, None).decode()


def write_vocabulary(tok, path):
    control = set(tok.special.values())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tok.pre)
    writer.add_token_list(tok.tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i in control else gguf.TokenType.NORMAL for i in range(len(tok))])
    writer.add_token_merges(tok.merges)
    writer.add_bos_token_id(tok.bos_id)
    writer.add_eos_token_id(tok.eos_id)
    writer.add_pad_token_id(tok.pad_id)
    writer.add_add_bos_token(False)  # llama.cpp's default for llama-bpe is true
    writer.add_chat_template(chat_template())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def llama(tok, directory):
    path = Path(directory, "vocabulary.gguf")
    write_vocabulary(tok, path)
    vocabulary = Vocabulary(path)
    yield vocabulary
    vocabulary.close()


def disagreements(tok, cpp, hf, texts):
    """Texts, shortened, whose ids differ somewhere, as plain text or with special tokens parsed."""
    found = []
    for text in texts:
        plain, marked = tok.encode(text), tok.encode(text, allow_special=True)
        same = plain == cpp.encode(text) and marked == cpp.encode(text, parse_special=True)
        if hf is not None:
            same &= plain == hf.encode(text, split_special_tokens=True) and marked == hf.encode(text)
        same &= b"".join(map(cpp.token_bytes, plain)) == text.encode() and tok.decode(marked) == text
        if not same:
            found.append(text[:60])
    return found


# ---------------------------------------------------------------------- ids
@pytest.fixture(scope="module")
def library():
    return library_texts()


@pytest.fixture(scope="module", params=[pytest.param(pre, marks=() if pre == "qwen2" else pytest.mark.slow) for pre in PRE])
def trio(request, library, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    tok = Tokenizer.train([*library, *HARD], 4096, request.param)
    tok.save(directory)
    with llama(tok, directory) as cpp:
        yield tok, cpp, transformers.AutoTokenizer.from_pretrained(directory)


def test_a_megabyte_of_source(trio, library):
    tok, cpp, hf = trio
    assert len(tok) == 4096 and sum(map(len, library)) > 1_000_000
    assert disagreements(tok, cpp, hf, library) == []


def test_hard_cases(trio):
    assert disagreements(*trio, HARD) == []


def test_special_tokens_as_text_and_as_tokens(trio):
    tok, cpp, hf = trio
    assert disagreements(tok, cpp, hf, MARKED) == []
    for name, i in tok.special.items():
        assert cpp.encode(name, parse_special=True) == hf.encode(name) == [i]
        assert i not in cpp.encode(name)


def test_fuzz(trio):
    assert disagreements(*trio, fuzz(400)) == []


def test_every_token_stands_for_the_same_bytes(trio):
    tok, cpp, hf = trio
    assert [i for i in range(len(tok)) if tok.token_bytes(i) != cpp.token_bytes(i)] == []
    chance = random.Random(1)
    for _ in range(200):  # most of these are no UTF-8
        ids = [chance.randrange(len(tok)) for _ in range(20)]
        assert tok.decode(ids) == hf.decode(ids, skip_special_tokens=False) == b"".join(map(cpp.token_bytes, ids)).decode(
            errors="replace")


def test_detokenize_leaves_the_default_alone(trio):
    """Why qwen2 is the default: with gpt-2 and llama-bpe, llama_detokenize tidies blanks before punctuation."""
    tok, cpp, _ = trio
    changed = [text for text in HARD if cpp.detokenize(tok.encode(text)) != text.encode()]
    assert bool(changed) == (tok.pre in ("gpt-2", "llama-bpe"))


def test_llama_cpp_pythons_detokenize_loses_nothing(trio, library, tmp_path):
    """It has room for 32 bytes a token and drops longer ones, of which source code makes some (long rules of dashes)."""
    tok = trio[0]
    write_vocabulary(tok, tmp_path / "v.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "v.gguf"), vocab_only=True, verbose=False)
    assert max(map(len, map(tok.token_bytes, range(len(tok))))) == 32
    for text in [*HARD, *library[:10]]:
        assert theirs.detokenize(tok.encode(text)) == text.encode()
    theirs.close()


def test_a_wrong_pairing_would_show(library, tmp_path):
    """The comparison can fail: the same vocabulary under another name is cut otherwise."""
    tok = Tokenizer.train(library[:20], 2048, "qwen2")
    other = Tokenizer.from_parts(tok.tokens, tok.merges, tok.special.values(), "gpt-2")
    with llama(other, tmp_path) as cpp:
        assert len(disagreements(tok, cpp, None, library[:20])) > 15


def test_a_gguf_file_gives_the_tokenizer_back(trio, tmp_path):
    tok = trio[0]
    write_vocabulary(tok, tmp_path / "v.gguf")
    fields = gguf.GGUFReader(tmp_path / "v.gguf").fields
    tokens, merges, types, pre = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type", "pre")
    )
    special = [i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL]
    again = Tokenizer.from_parts(tokens, merges, special, pre)
    assert again.fingerprint == tok.fingerprint
    assert disagreements(again, trio[1], trio[2], MARKED) == []


@pytest.mark.parametrize("pre", PRE)
def test_words_and_special_tokens_that_contain_others(pre, tmp_path):
    """A word that is a token though no merges lead to it (only llama-bpe takes it whole), and "<s>" inside "<s>!"."""
    base = Tokenizer.train([], 263)
    tok = Tokenizer.from_parts([*base.tokens, "bc", "ab", "abc", "<s>!"], ["b c", "a b", "ab c"], [*range(7), 266], pre)
    tok.save(tmp_path)
    whole = [265] if pre == "llama-bpe" else [*base.encode("a"), 263]
    assert tok.encode("abc") == whole and tok.encode("<s>!<s>", allow_special=True) == [266, 1]
    with llama(tok, tmp_path) as cpp:
        hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert disagreements(tok, cpp, hf, ["abc", "xabc abc", "<s>!<s>", "a<s>!!", *HARD]) == []


# ---------------------------------------------------------------------- where words end, letter by letter
AROUND = ("a{}", "{}a", "'{}", "'{}e", " {}", "{} ", "1{}", "{}1", "{}{}", "{}\n", ".{}", "{}.", "  {}", "{}  a")


def eager_parts(texts):
    """A vocabulary that joins whatever the pre-tokenizer leaves together, so that each word boundary shows in the ids."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=60_000, special_tokens=list(SPECIAL), show_progress=False,
                                  initial_alphabet=sorted(byte_letters()))
    learner.train_from_iterator(texts, trainer)
    return parts(learner)


def boundaries_differ(letters, pre, directory):
    found = []
    for start in range(0, len(letters), 256):
        texts = [around.replace("{}", letter) for letter in letters[start : start + 256] for around in AROUND]
        tok = Tokenizer.from_parts(*eager_parts(texts), pre)
        with llama(tok, directory) as cpp:
            found += [text for text in texts if tok.encode(text) != cpp.encode(text)]
    return found


@pytest.mark.parametrize("pre", PRE)
def test_words_end_alike_in_latin(pre, tmp_path):
    letters = [chr(c) for c in (*range(0x250), *range(0x2000, 0x2070), *range(0x2100, 0x2190), 0x3000, 0xFEFF, 0x1F600)]
    assert boundaries_differ(letters, pre, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("pre", PRE)
def test_words_end_alike_in_all_scripts(pre, tmp_path):
    """All characters that this Python knows, of the large scripts (Han, Hangul, …) each fiftieth.

    Letters that Unicode 16.0 added, after the Unicode of Python 3.11 to 3.13 and of llama.cpp's tables, are letters
    to the `tokenizers` library only: nearly 400, of scripts such as Garay and Todhri, are cut differently.
    """
    known = [c for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    letters = [chr(c) for c in known if c < 0x3100 or unicodedata.category(chr(c)) != "Lo" or c % 50 == 0]
    assert len(letters) > 20_000
    assert boundaries_differ(letters, pre, tmp_path) == []


# ---------------------------------------------------------------------- prompts
SYSTEM, ASK, AGAIN = ({"role": r, "content": c} for r, c in [("system", "Be brief.\n"), ("user", " 2 + 2?\n"), ("user", "Why?")])
THOUGHT, BARE = ({"role": "assistant", "content": c} for c in ("<think>\ntwo\n</think>\n\n4 ", " 4\n"))
CUT_OFF, PASTED = ({"role": "assistant", "content": c} for c in ("<think>\nendless", "two</think>4"))
TALKS = [[ASK], [SYSTEM, ASK], [ASK, THOUGHT, AGAIN], [SYSTEM, ASK, BARE, AGAIN, THOUGHT], [ASK, THOUGHT], [ASK, BARE],
         [ASK, CUT_OFF, AGAIN], [ASK, PASTED, AGAIN, PASTED], [SYSTEM], [THOUGHT], [ASK, SYSTEM, ASK]]  # fmt: skip


@pytest.mark.parametrize("talk", TALKS, ids=range(len(TALKS)))
@pytest.mark.parametrize("more", [True, False])
def test_the_same_prompt(talk, more, tmp_path):
    tok = Tokenizer.train([], 263)
    tok.save(tmp_path)
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    formatter = chat_format.Jinja2ChatFormatter(chat_template(), "</s>", "<s>", add_generation_prompt=more)
    for thinking in (True, False):
        ours = tok.apply_chat_template(talk, thinking, more)
        keywords = {"enable_thinking": thinking}
        assert hf.apply_chat_template(talk, tokenize=False, add_generation_prompt=more, **keywords) == ours
        assert formatter(messages=talk, **keywords).prompt == ours
        assert hf.apply_chat_template(talk, add_generation_prompt=more, return_dict=False, **keywords) == tok.encode_chat(
            talk, thinking, more)
    on = tok.apply_chat_template(talk, True, more)  # what nothing said means
    assert hf.apply_chat_template(talk, tokenize=False, add_generation_prompt=more) == formatter(messages=talk).prompt == on


def test_the_gguf_file_holds_the_template(trio):
    assert trio[1].chat_template() == chat_template()
