"""Opens tokenizer files of the `tokenizers` library that may come from untrusted people.

Such a file can use unlimited memory or time: a series of replacements can double a text again and again, padding can
have any length, and a regular expression can backtrack for years. So only parts on an allow-list are accepted.
"""

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

ONCE = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "Strip", "StripAccents", "BertNormalizer"),
    *("Precompiled", "Prepend"),
    *("BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits"),
    *("CharDelimiterSplit", "UnicodeScripts"),
}
"""Normalizers and pre-tokenizers that are accepted once each. Some lengthen a text by a bounded factor, so repeating
them could lengthen it without bound."""
REGEXES = {
    *(r"\w+", r"\s+", " {2,}"),
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    *(
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        for digits in ("", "{1,3}")
    ),
}
"""Accepted regular expressions: openimp's own and those of T5, CLIP, GPT-4, Llama 3 and Qwen. None backtracks."""
MOST_PIECES = 64
"""Most normalizers, and most pre-tokenizers, that a file may have."""
LONGEST_PIECE = 64
"""Most bytes that a normalizer may turn one character into; most characters of a prefix, suffix or unknown token."""
LONGEST_WORD = 1000
"""Largest `max_input_chars_per_word`. WordPiece's time grows with its square. BERT uses 100."""
MOST_ADDED, LONGEST_TOKEN = 2**14, 256
"""Most added tokens, and most characters of an added token or a Unigram token. Unigram's time grows with its longest
token."""
MOST_IDS = 2**20
"""Most ids, for each of which the model's table has a row. The largest known vocabulary, of XLM-V, has 0.9 million."""


def open_tokenizer(text: str) -> Tokenizer:
    """The tokenizer in a file's text, without its padding, truncation and special tokens, which openimp does not use.

    Raises:
        ValueError: the text is not a tokenizer file, or has a part that could take too much time or memory.
    """
    data = json.loads(text)
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise ValueError("the file has no model")
    _check_pieces("normalizer", [*_pieces(data.get("normalizer"), "normalizers")])
    _check_pieces("pre_tokenizer", [*_pieces(data.get("pre_tokenizer"), "pretokenizers")])
    model = data["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if len(model.get(key) or "") > LONGEST_PIECE:
            raise ValueError(f"model.{key} has more than {LONGEST_PIECE} characters")
    if (model.get("max_input_chars_per_word") or 0) > LONGEST_WORD:
        raise ValueError(f"model.max_input_chars_per_word is more than {LONGEST_WORD}")
    added = data.get("added_tokens") or []
    if len(added) > MOST_ADDED or any(not 0 < len(token["content"]) <= LONGEST_TOKEN for token in added):
        raise ValueError(
            f"added_tokens has more than {MOST_ADDED} tokens, or one that is empty or longer than {LONGEST_TOKEN}"
        )
    vocab = model.get("vocab")  # A list in Unigram models only. Not all files have the type.
    if isinstance(vocab, list) and any(len(token) > LONGEST_TOKEN for token, _ in vocab):
        raise ValueError(f"model.vocab has a token of more than {LONGEST_TOKEN} characters")
    for unused in ("padding", "truncation", "post_processor"):
        data[unused] = None
    if (data.get("decoder") or {}).get("type") != "ByteLevel":  # The one that openimp's own tokenizers have.
        data["decoder"] = None
    # Not from `text`: in it a key might occur twice, and only one of its values was checked.
    tokenizer = Tokenizer.from_str(json.dumps(data))
    if not 0 <= max(tokenizer.get_vocab().values(), default=-1) < MOST_IDS:
        raise ValueError(f"the vocabulary is empty, or has an id above {MOST_IDS - 1}")
    return tokenizer


def _pieces(part: Any, inner: str) -> Iterator[dict[str, Any]]:
    """All normalizers or pre-tokenizers in order, with nested sequences flattened."""
    if isinstance(part, dict) and part.get("type") == "Sequence":
        for piece in part[inner]:
            yield from _pieces(piece, inner)
    elif part is not None:
        yield part


def _check_pieces(where: str, pieces: list[dict[str, Any]]) -> None:
    kinds = [piece["type"] for piece in pieces]
    if len(pieces) > MOST_PIECES:
        raise ValueError(f"{where} has more than {MOST_PIECES} parts")
    for piece, kind in zip(pieces, kinds):
        if kind in ("Replace", "Split"):
            (form, pattern), *others = piece["pattern"].items()
            if others or not pattern or (form == "Regex" and pattern not in REGEXES):
                raise ValueError(f"{where}: {kind} has a pattern that is not on the allow-list: {pattern!r:.100}")
            longest = len(pattern) if form == "String" else 1
            if kind == "Replace" and len(piece["content"]) > longest:
                raise ValueError(f"{where}: Replace makes the text longer")
        elif kind not in ONCE or kinds.count(kind) > 1:
            raise ValueError(f"{where}: {kind!r:.100} is not on the allow-list, or occurs twice")
        elif kind == "Prepend" and len(piece["prepend"]) > LONGEST_PIECE:
            raise ValueError(f"{where}: Prepend has more than {LONGEST_PIECE} characters")
        elif kind == "Precompiled" and _longest_replacement(piece["precompiled_charsmap"]) > LONGEST_PIECE:
            raise ValueError(f"{where}: Precompiled turns a character into more than {LONGEST_PIECE} bytes")


def _longest_replacement(charsmap: str) -> int:
    """Length in bytes of the longest replacement in a SentencePiece map, whose every reference is checked.

    A map holds the size of its index (4 bytes), the index, and the replacements, each of which ends with a zero byte.
    The index is a double array (of Darts-clone): bits 10 to 30 of a unit are the offset of its children, in units of
    256 if bit 9 is set. Bit 8 tells that the first child is a value, which is the position of a replacement.
    """
    data = base64.b64decode(charsmap, validate=True)
    size = int.from_bytes(data[:4], "little")
    texts = data[4 + size - size % 4 :]
    if len(data) < 4 + size or not texts.decode().endswith("\0"):  # The library would panic; that is no Exception.
        raise ValueError("normalizer: Precompiled is truncated")
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    child = np.arange(len(units)) ^ (units >> 10 << (units >> 6 & 8))
    inner = units < 2**31  # Others are values. They are never searched, except the first unit.
    inner[:1] = True
    if not len(units) or (child[inner] | 255).max() >= len(units):
        raise ValueError("normalizer: Precompiled has an index that leads out of itself")
    value = units[child[inner & (units >> 8 & 1 == 1)]] & (2**31 - 1)
    starts = np.append(np.frombuffer(texts, np.uint8) & 0xC0 != 0x80, False)  # Where a character begins.
    if not starts[np.minimum(value, len(texts))].all():
        raise ValueError("normalizer: Precompiled has a replacement that begins outside of its texts or in a character")
    return max(map(len, texts.split(b"\0")))
