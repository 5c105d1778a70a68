"""Errors that the user can fix, which the command line prints with exit code 2, and the wording of messages."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

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
    return "".join(character for character in text if character.isprintable() or character in "\n\t\xa0")


def escaped(name: object) -> str:
    """A name, or a line with names, in which control characters are escaped, as in a string of Python."""
    return "".join(
        character if character.isprintable() or character == "\xa0" else character.encode("unicode_escape").decode()
        for character in str(name)
    )


def one_line(error: BaseException) -> str:
    """The message of a library's error in one line of at most 300 characters, or its type if it has no message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Turns an error of a library, or of those that it uses, into a UserError that begins with `message`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Libraries raise many kinds.
        raise UserError(f"{message}: {one_line(error)}") from None


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


def by_extension(files: Mapping[str, int]) -> str:
    """`.heic 20, .txt 1, others 3`: numbers of files of the five most frequent extensions, and of all other files."""
    ranked = sorted(files.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{extension or 'without extension'} {count:,}" for extension, count in ranked[:5]]
    other_files = sum(count for _, count in ranked[5:])
    if other_files:
        texts.append(f"others {other_files:,}")
    return ", ".join(texts)
