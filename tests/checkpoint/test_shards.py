"""Tensors in parts, in files of several processes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from openimp.checkpoint.shards import file_name, read, write
from openimp.common.errors import UserError

WHOLE = {"rows": torch.arange(12.0).view(4, 3), "one": torch.ones(1), "scalar": torch.tensor(2.0)}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two processes' parts, of which the second one's have as many elements as the first one's."""
    rows, one, scalar = WHOLE.values()
    first = {"rows": rows[:2].clone(), "one": one, "scalar": scalar}
    write(tmp_path / file_name("model", 0, 2), first, {"rows": (0, 0), "one": (0,), "scalar": ()})
    second = {"rows": rows[2:].clone(), "one": torch.ones(0)}
    write(tmp_path / file_name("model", 1, 2), second, {"rows": (2, 0), "one": (1,)})
    return tmp_path


def test_parts_make_up_what_they_are_parts_of(folder):
    found = read(folder, "model")
    assert found.keys() == WHOLE.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in WHOLE.items())


def test_torchs_reader_reads_them_too(folder):
    found = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    load(found, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in WHOLE.items())


def test_a_part_that_is_lost_or_there_twice_is_told(folder):
    first, second = sorted(folder.iterdir())
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(UserError, match=f"{first}: missing"):
        read(folder, "model")
    first.write_bytes(content)
    second.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged: \w+ is not whole"):
        read(folder, "model")
    for number in range(2):
        write(folder / file_name("ema", number, 2), {"rows": torch.zeros(2, 3)}, {"rows": (2, 0)})
    with pytest.raises(UserError, match="damaged: rows is not whole"):
        read(folder, "ema")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((torch.zeros(2), (0,)), (torch.zeros(4), (1,))),
        ((torch.zeros(3), (0,)), (torch.zeros(2), (4,))),
        ((torch.zeros(2), (0,)), (torch.zeros(2, 2), (2, 0))),
        ((torch.zeros(2), (0,)), (torch.zeros(2, dtype=torch.int64), (2,))),
    ],
    ids=["overlap", "hole", "rank", "type"],
)
def test_parts_that_do_not_make_up_a_tensor_are_damage(tmp_path, first, second):
    for number, (part, offsets) in enumerate((first, second)):
        write(tmp_path / file_name("model", number, 2), {"x": part}, {"x": offsets})
    with pytest.raises(UserError, match="damaged: x is not whole"):
        read(tmp_path, "model")


@pytest.mark.parametrize(
    "places",
    [
        "{",
        '["rows"]',
        '{"rows": {}}',
        "[" * 100_000,
        *(f'{{"rows": {{"saved_offsets": {x}}}}}' for x in ("[0]", "[-1, 0]", '["", 0]', "[9, 0]")),
    ],
    ids=str.__len__,
)
def test_a_header_that_makes_no_sense_is_damage(tmp_path, places):
    file = tmp_path / file_name("model")
    save_file({"rows": torch.zeros(4, 3)}, file, metadata={"DCP_SHARDING_INFO": places})
    with pytest.raises(UserError, match=f"{file}: damaged: "):
        read(tmp_path, "model")
