"""JSON in tars costs time and memory in proportion to its size, whoever wrote it."""

import json
import time
from pathlib import Path

import pytest

from openimp.common.modality import BadMedia
from openimp.data.sources import open_source
from openimp.data.streams import Stream
from openimp.data.tables import Unreadable
from openimp.recipe.tasks import Source
from tests.little import write_tar
from tests.messages import refuses

SMILE = r"\ud83d\ude00"


def opened(folder: Path, members: dict[str, bytes]) -> Stream:
    file = write_tar(folder / "x.tar", members)
    stream = open_source("s", Source(path=str(file), stream=True, lanes=1, window=1))
    assert isinstance(stream, Stream)
    return stream


def test_many_columns_are_found_in_linear_time(tmp_path):
    """With a list of columns, these would take minutes."""
    samples = {f"{i}.json": json.dumps(dict.fromkeys(f"{i}-{key}" for key in range(2000))).encode() for i in range(99)}
    broken = {f"broken.{i}.json": b"{" for i in range(20_000)}
    before = time.process_time()
    columns = opened(tmp_path, samples | broken).columns
    assert len(columns) == 1 + 99 * 2000 + 20_000
    assert time.process_time() - before < 10


@pytest.mark.parametrize("escape", ["", r"\u00e9", r"\u20ac", SMILE], ids=["none", "latin", "euro", "smile"])
def test_texts_in_json_have_at_most_64_mib_once_they_are_decoded(tmp_path, monkeypatch, escape):
    """One escape makes each character of its text take two or four bytes."""
    monkeypatch.setattr("openimp.data.tars.LARGEST_TEXT", 40_000)
    for count in (9000, 19_000, 39_000, 41_000):
        data = b'{"a": "' + b"x" * count + escape.encode() + b'"}'
        ((_, row),) = opened(tmp_path, {"1.json": data, "1.cls": b"1"}).read(0, [0])
        size = count * {"": 1, SMILE: 4}.get(escape, 2)
        if size < 40_000:
            assert row["json.a"] == json.loads(data)["a"]
        else:
            assert isinstance(row["json"], Unreadable)
            assert "may be read" in row["json"].reason


def test_other_members_may_be_larger_than_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr("openimp.data.tars.LARGEST_TEXT", 10)
    stream = opened(tmp_path, {"1.png": bytes(11), "1.txt": b"x" * 11, "1.cls": b"1" * 11, "1.json": b" " * 9 + b"11"})
    ((_, row),) = stream.read(0, [0])
    assert row["png"] == bytes(11)
    for column in ("txt", "cls", "json"):
        with refuses(BadMedia):
            stream.media(row[column])
