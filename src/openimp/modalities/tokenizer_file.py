"""Opens untrusted tokenizer files of the `tokenizers` library.

Such a file could use unlimited memory or time: replacements can double a text again and again, padding can have any
length, and a regular expression can backtrack for years. So only parts on an allow-list are accepted.
"""

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from openimp.common.errors import library_errors

ONCE = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "Strip", "StripAccents", "BertNormalizer"),
    *("Precompiled", "Prepend"),
    *("BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits"),
    *("CharDelimiterSplit", "UnicodeScripts"),
}
"""Normalizers and pre-tokenizers that are accepted once each. Some lengthen a text by a bounded factor, so repeating
them could lengthen it without bound."""
REGEXES = {
    *(r"\w+", r"[^\W_]+", r"\s+", " {2,}"),
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    *(
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        for digits in ("", "{1,3}")
    ),
}
"""Accepted regular expressions: openimp's own and those of T5, CLIP, GPT-4, Llama 3 and Qwen. None backtracks."""
MAX_STEPS = 64
"""Most normalizers, and most pre-tokenizers, of a file."""
MAX_REPLACEMENT = 64
"""Most bytes by which a normalizer may replace one character; most characters of a prefix, suffix or unknown token."""
MAX_WORD = 1000
"""Largest `max_input_chars_per_word`. WordPiece's time grows with its square. BERT uses 100."""
MAX_ADDED_TOKENS = 2**14
"""Most tokens in `added_tokens`."""
MAX_TOKEN_LENGTH = 256
"""Most characters of an added token or a Unigram token. Unigram's time grows with its longest token."""
MAX_IDS = 2**20
"""Most ids; the model's table has a row per id. The largest known vocabulary, of XLM-V, has 0.9 million."""


def open_tokenizer(name: str, read: Callable[[], str]) -> Tokenizer:
    """Opens the tokenizer in the text that `read` returns.

    Padding, truncation and special tokens are left out, because openimp does not use them.

    Raises:
        UserError: the file is damaged, or a part of it could take too much time or memory. The message begins with
            `name`, unless `read` raises it.
    """
    with library_errors(f"{name}: not a tokenizer that openimp opens"):
        return _open(json.loads(read()))


def _open(data: Any) -> Tokenizer:
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise ValueError("the file has no model")
    _check_steps("normalizer", [*_steps(data.get("normalizer"), "normalizers")])
    _check_steps("pre_tokenizer", [*_steps(data.get("pre_tokenizer"), "pretokenizers")])
    model = data["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if len(model.get(key) or "") > MAX_REPLACEMENT:
            raise ValueError(f"model.{key} has more than {MAX_REPLACEMENT} characters")
    if (model.get("max_input_chars_per_word") or 0) > MAX_WORD:
        raise ValueError(f"model.max_input_chars_per_word is more than {MAX_WORD}")
    added = data.get("added_tokens") or []
    if len(added) > MAX_ADDED_TOKENS or any(not 0 < len(token["content"]) <= MAX_TOKEN_LENGTH for token in added):
        raise ValueError(
            f"added_tokens has more than {MAX_ADDED_TOKENS} tokens, "
            f"or one that is empty or longer than {MAX_TOKEN_LENGTH}"
        )
    vocab = model.get("vocab")  # A list in Unigram models only. Not all files name the type of the model.
    if isinstance(vocab, list) and any(len(token) > MAX_TOKEN_LENGTH for token, _ in vocab):
        raise ValueError(f"model.vocab has a token of more than {MAX_TOKEN_LENGTH} characters")
    for unused in ("padding", "truncation", "post_processor"):
        data[unused] = None
    if (data.get("decoder") or {}).get("type") != "ByteLevel":  # openimp's own tokenizers use this one.
        data["decoder"] = None
    # Not from the file's text: a key could occur twice there, and only one of the values was checked.
    tokenizer = Tokenizer.from_str(json.dumps(data))
    if not 0 <= max(tokenizer.get_vocab().values(), default=-1) < MAX_IDS:
        raise ValueError(f"the vocabulary is empty, or has an id above {MAX_IDS - 1}")
    return tokenizer


def _steps(part: Any, inner: str) -> Iterator[dict[str, Any]]:
    """All normalizers or pre-tokenizers in order, with nested sequences flattened."""
    if isinstance(part, dict) and part.get("type") == "Sequence":
        for step in part[inner]:
            yield from _steps(step, inner)
    elif part is not None:
        yield part


def _check_steps(part_name: str, steps: list[dict[str, Any]]) -> None:
    kinds = [step["type"] for step in steps]
    if len(steps) > MAX_STEPS:
        raise ValueError(f"{part_name} has more than {MAX_STEPS} parts")
    for step, kind in zip(steps, kinds):
        if kind in ("Replace", "Split"):
            (form, pattern), *others = step["pattern"].items()
            if others or not pattern or (form == "Regex" and pattern not in REGEXES):
                raise ValueError(f"{part_name}: {kind} has a pattern that is not on the allow-list: {pattern!r:.100}")
            longest = len(pattern) if form == "String" else 1
            if kind == "Replace" and len(step["content"]) > longest:
                raise ValueError(f"{part_name}: Replace makes the text longer")
        elif kind not in ONCE or kinds.count(kind) > 1:
            raise ValueError(f"{part_name}: {kind!r:.100} is not on the allow-list, or occurs twice")
        elif kind == "Prepend" and len(step["prepend"]) > MAX_REPLACEMENT:
            raise ValueError(f"{part_name}: Prepend has more than {MAX_REPLACEMENT} characters")
        elif kind == "Precompiled" and _longest_replacement(step["precompiled_charsmap"]) > MAX_REPLACEMENT:
            raise ValueError(f"{part_name}: Precompiled turns a character into more than {MAX_REPLACEMENT} bytes")


def _longest_replacement(charsmap: str) -> int:
    """The length in bytes of the longest replacement in a SentencePiece map. All references in the map are checked.

    A map consists of the size of its index (4 bytes), the index, and the replacements, each of which ends with a zero
    byte. The index is a double array (Darts-clone): bits 10 to 30 of a unit are the offset of its children, in units of
    256 if bit 9 is set. If bit 8 is set, the first child is a value, which is the position of a replacement.
    """
    data = base64.b64decode(charsmap, validate=True)
    size = int.from_bytes(data[:4], "little")
    texts = data[4 + size - size % 4 :]
    if len(data) < 4 + size or not texts.decode().endswith("\0"):  # The library would panic, which is not an Exception.
        raise ValueError("normalizer: Precompiled is truncated")
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    child = np.arange(len(units)) ^ (units >> 10 << (units >> 6 & 8))
    inner = units < 2**31  # The other units are values. Only the first unit is searched although it may be one.
    inner[:1] = True
    if not len(units) or (child[inner] | 255).max() >= len(units):
        raise ValueError("normalizer: Precompiled has an index that leads out of itself")
    value = units[child[inner & (units >> 8 & 1 == 1)]] & (2**31 - 1)
    starts = np.append(np.frombuffer(texts, np.uint8) & 0xC0 != 0x80, False)  # True where a character begins.
    if not starts[np.minimum(value, len(texts))].all():
        raise ValueError("normalizer: Precompiled has a replacement that begins outside of its texts or in a character")
    return max(map(len, texts.split(b"\0")))
