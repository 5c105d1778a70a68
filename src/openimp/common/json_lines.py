"""Files of JSON lines, such as metrics.jsonl."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from openimp.common.errors import UserError
from openimp.common.safe_files import read_text, write_text

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
    """Reads all complete lines. A last line that a crash cut short is skipped; a missing file has no lines."""
    if not file.exists():
        return []
    lines = []
    for number, text in enumerate(read_text(file, MAX_BYTES).split("\n")[:-1], 1):
        try:
            line = json.loads(text)
        except ValueError:
            raise UserError(f"{file}: line {number} is not JSON") from None
        if not isinstance(line, dict) or not isinstance(line.get("step", ""), int | None):
            raise UserError(f"{file}: line {number} is not an object with a step")
        lines.append(line)
    return lines


def forget_after(file: Path, step: int) -> None:
    """Removes the lines after `step`. A run that resumes there will write them again."""
    if file.exists():
        replace_after(file, step, [])


def replace_after(file: Path, step: int, lines: Iterable[dict[str, Any]]) -> None:
    """Replaces the lines after `step`, all at once."""
    kept = [line for line in read_lines(file) if (line["step"] or 0) <= step]
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (*kept, *lines)))
