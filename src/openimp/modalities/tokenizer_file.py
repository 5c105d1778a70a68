"""Opening a tokenizer file of the `tokenizers` library that may come from a stranger.

Such a file is a program: replacements that follow each other double a text again and again, padding makes it as long as
it likes, and a regular expression can backtrack for years. Only what is known to be harmless is opened.
"""

import base64
import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

ONCE = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "Strip", "StripAccents", "BertNormalizer"),
    *("Precompiled", "Prepend"),
    *("BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits"),
    *("CharDelimiterSplit", "UnicodeScripts"),
}
"""Normalizers and pre-tokenizers that may be used once each: some make a text longer, by a bounded factor."""
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
"""Regular expressions that do not backtrack: openimp's own, and those of T5, CLIP, GPT-4, Llama 3 and Qwen."""
MOST_PIECES = 64
"""Normalizers or pre-tokenizers in a row."""
LONGEST_PIECE = 64
"""Bytes that one character may become, and characters of a prefix, a suffix or an unknown token."""
LONGEST_WORD = 1000
"""`max_input_chars_per_word` of WordPiece, whose time grows with the square of it; BERT's is 100."""
MOST_ADDED, LONGEST_TOKEN = 2**14, 256
"""Added tokens, and characters of one and of a token of Unigram, whose time grows with its longest token."""


def open_tokenizer(text: str) -> Tokenizer:
    """The tokenizer of a file's text, without what openimp does not use: padding, truncation and special tokens.

    Raises:
        ValueError: it is no tokenizer, or has a part that could take too much time or memory.
    """
    data = json.loads(text)
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise ValueError("it has no model")
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
            f"added_tokens are more than {MOST_ADDED}, or one has no or more than {LONGEST_TOKEN} characters"
        )
    if model.get("type") == "Unigram" and any(len(token) > LONGEST_TOKEN for token, _ in model["vocab"]):
        raise ValueError(f"model.vocab has a token of more than {LONGEST_TOKEN} characters")
    for unused in ("padding", "truncation", "post_processor"):
        data[unused] = None
    if (data.get("decoder") or {}).get("type") != "ByteLevel":  # openimp never decodes; its own tokenizers can.
        data["decoder"] = None
    # What was checked, not the text, in which a key might stand twice.
    return Tokenizer.from_str(json.dumps(data))


def _pieces(part: Any, inner: str) -> Iterator[dict[str, Any]]:
    """The normalizers or pre-tokenizers of sequences of sequences, in order."""
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
                raise ValueError(f"{where}: {kind} has a pattern that is not known to be harmless: {pattern!r:.100}")
            longest = len(pattern) if form == "String" else 1
            if kind == "Replace" and len(piece["content"]) > longest:
                raise ValueError(f"{where}: Replace makes texts longer")
        elif kind not in ONCE or kinds.count(kind) > 1:
            raise ValueError(f"{where}: {kind!r:.100} is not known to be harmless, or is there twice")
        elif kind == "Prepend" and len(piece["prepend"]) > LONGEST_PIECE:
            raise ValueError(f"{where}: Prepend has more than {LONGEST_PIECE} characters")
        elif kind == "Precompiled" and _longest_replacement(piece["precompiled_charsmap"]) > LONGEST_PIECE:
            raise ValueError(f"{where}: Precompiled makes more than {LONGEST_PIECE} bytes of a character")


def _longest_replacement(charsmap: str) -> int:
    """Bytes of the longest text in a SentencePiece map: the size of an index, the index, and texts that end with 0."""
    data = base64.b64decode(charsmap, validate=True)
    size = int.from_bytes(data[:4], "little")
    texts = data[4 + size - size % 4 :]
    if len(data) < 4 + size or not texts.decode().endswith("\0"):  # The library panics, which is no Exception.
        raise ValueError("normalizer: Precompiled is cut short")
    return max(map(len, texts.split(b"\0")))
