"""Files of JSON lines, such as metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

from openimp.common.errors import UserError
from openimp.common.safe_files import read_text, write_text

LARGEST_LOG = 2**28
"""Bytes of a file of JSON lines at most, when it is read."""


def append(file: Path, line: dict[str, Any]) -> None:
    """Adds one JSON line."""
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:  # A full disk does not say where it is.
        raise OSError(error.errno, error.strerror, str(file)) from None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """All whole JSON lines of a file; a last one that a crash cut short is left out.

    Raises:
        UserError: a line is not a JSON object with a step, or the file is too large.
    """
    if not file.exists():
        return []
    found = []
    for number, line in enumerate(read_text(file, LARGEST_LOG).split("\n")[:-1], 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise UserError(f"{file}: line {number} is not JSON") from None
        if not isinstance(found[-1], dict) or not isinstance(found[-1].get("step", ""), int | None):
            raise UserError(f"{file}: line {number} is not an object with a step")
    return found


def forget_after(file: Path, step: int) -> None:
    """Forgets lines after `step`, which a run that goes on from there will write again."""
    kept = [line for line in read_lines(file) if (line["step"] or 0) <= step]
    if file.exists():
        write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
