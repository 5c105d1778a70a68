"""Files of JSON lines, such as metrics.jsonl."""

import io
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from openimp.common.errors import UserError
from openimp.common.safe_files import read_text, replacing

MAX_BYTES = 2**28
"""Largest file in bytes that is read."""


def append(file: Path, line: dict[str, Any]) -> None:
    """Appends one line."""
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:  # If the disk is full, the error does not name the file.
        raise OSError(error.errno, error.strerror, str(file)) from None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Reads all complete lines of a file that may come from a stranger. A missing file has no lines."""
    if not file.exists():
        return []
    return [*_parsed(file, io.StringIO(read_text(file, MAX_BYTES), newline="\n"))]


def own_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a file of this run, of any size, one at a time. A missing file has no lines."""
    if file.exists():
        with file.open(encoding="utf-8", newline="\n") as stream:
            yield from _parsed(file, stream)


def _parsed(file: Path, texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(texts, 1):
        if not text.endswith("\n"):
            return  # A crash cut it short.
        try:
            line = json.loads(text)
        except ValueError:
            raise UserError(f"{file}: line {number} is not JSON") from None
        if not isinstance(line, dict) or not isinstance(line.get("step", ""), int | None):
            raise UserError(f"{file}: line {number} is not an object with a step")
        yield line


def forget_after(file: Path, step: int) -> None:
    """Removes the lines after `step`. A run that resumes there will write them again."""
    if file.exists():
        replace_after(file, step, [])


def replace_after(file: Path, step: int, lines: Iterable[dict[str, Any]]) -> None:
    """Replaces the lines after `step`, all at once."""
    kept = (line for line in own_lines(file) if (line["step"] or 0) <= step)
    with replacing(file) as draft:
        for line in chain(kept, lines):
            draft.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
