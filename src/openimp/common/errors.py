"""Errors that the user can fix, which the command line prints with exit code 2, and the wording of messages."""

import difflib
from collections.abc import Iterable, Mapping

FEW = 50
"""Maximum number of known words that an error message lists."""


class UserError(Exception):
    """Bad input. The message is one sentence: which file, key or column is wrong, and what was expected."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Removes control characters except line breaks and tabs.

    Names can come from untrusted data or models, and an escape sequence in a name could control the terminal.
    """
    return text if text.isprintable() else "".join(c for c in text if c.isprintable() or c in "\n\t\xa0")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known word, else a list of the known words if there are at most `FEW`."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= FEW else ""


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 batches`, `1,000 classes`: a number with its noun."""
    plural = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def by_extension(files: Mapping[str, int], most: int = 5) -> str:
    """`.heic 20, .txt 1`: numbers of files by extension, the largest first; after `most` of them, how many are left."""
    ranked = sorted(files.items(), key=lambda each: (-each[1], each[0]))
    named = [f"{extension or 'without extension'} {count:,}" for extension, count in ranked[:most]]
    left = sum(count for _, count in ranked[most:])
    return ", ".join([*named, *([f"others {left:,}"] if left else [])])
