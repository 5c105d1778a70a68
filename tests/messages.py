"""Compares messages for users, as whole sentences, with those in tests/messages.json.

    pytest -n 0 --update-messages    # writes the messages of the tests that ran; read the diff before you commit it

A message that ends with "…" in the file, because a library wrote its end, is compared up to there.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from openimp.common.errors import UserError

FILE = Path(__file__).with_name("messages.json")
TESTS = Path(__file__).parent
MESSAGES: dict[str, list[str]] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
"""By test, in the order in which it raises them."""
TEMPORARY = re.compile(r"(/[^\s:'\"/]+)*/pytest-of-[^/]+/pytest-\d+/(popen-gw\d+/)?[^\s:'\"/,;)]+")
OPEN_END = "…"

_seen: dict[str, list[str]] = defaultdict(list)


@contextmanager
def refuses(kind: type[Exception] = UserError) -> Iterator[pytest.ExceptionInfo[Any]]:
    """The block raises an error of `kind` with the running test's next message."""
    with pytest.raises(kind) as info:
        yield info
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    name = test.removeprefix("tests/")
    message = TEMPORARY.sub("TMP", str(info.value)).replace(str(TESTS.parent), "REPOSITORY")
    number = len(_seen[name])
    _seen[name].append(message)
    if os.environ.get("OPENIMP_UPDATE_MESSAGES"):
        return
    assert number < len(MESSAGES.get(name, [])), f"no such message in {FILE.name}: {message}"
    expected = MESSAGES[name][number]
    if expected.endswith(OPEN_END):
        message = message[: len(expected) - len(OPEN_END)] + OPEN_END
    assert message == expected, f"{message!r} is not {expected!r}"


def update() -> None:
    """Writes the messages of the tests that ran, and removes those of tests that no longer exist."""
    for name, messages in _seen.items():
        before = MESSAGES.get(name, [])
        MESSAGES[name] = [
            before[i] if i < len(before) and _fits(before[i], message) else message
            for i, message in enumerate(messages)
        ]
    kept = {name: MESSAGES[name] for name in sorted(MESSAGES) if _exists(name)}
    FILE.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _exists(name: str) -> bool:
    file, _, function = name.partition("[")[0].partition("::")
    path = TESTS / file
    return path.exists() and f"def {function}(" in path.read_text(encoding="utf-8")


def _fits(before: str, message: str) -> bool:
    return before.endswith(OPEN_END) and message.startswith(before.removesuffix(OPEN_END))
