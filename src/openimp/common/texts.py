"""When two texts are equal, and which texts UTF-8 can encode."""

from collections.abc import Callable, Hashable, Iterable
from unicodedata import normalize


def text_key(text: str) -> str:
    """The key that equal texts share. `part`, `positives_by`, evaluation and `openimp init` compare texts by it.

    Case and white space do not count, nor does how a letter is encoded: "Straße", "STRASSE" and " strasse" have one
    key. So texts that a trained tokenizer cannot tell apart, because it applies NFC and lower case, have equal keys.
    """
    if not text.isascii():
        # NFC again, because case folding may take a letter apart: that of "ΐ" is three characters.
        text = normalize("NFC", normalize("NFC", valid_text(text)).casefold())
    return " ".join(text.casefold().split())


def valid_text(text: str) -> str:
    """Removes lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "ignore").decode("utf-8")


def equal_pair(texts: Iterable[str], key: Callable[[str], Hashable]) -> tuple[str, str] | None:
    """The first two different texts with equal keys; None if there are none."""
    text_of_key: dict[Hashable, str] = {}
    for text in texts:
        other = text_of_key.setdefault(key(text), text)
        if other != text:
            return other, text
    return None
