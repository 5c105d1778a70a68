"""When two texts are equal, and which texts UTF-8 can encode."""

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
