"""Folders of tensors in safetensors files: shards that several ranks wrote, and files that were damaged or made up."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from openimp.checkpoint.dcp import load, read, save, stage
from tests.messages import refuses
from tests.saved import assert_equal

WHOLE = {"rows": torch.arange(12.0).view(4, 3), "one": torch.ones(1), "scalar": torch.tensor(2.0)}


def write_shards(folder: Path, *shards: dict[str, tuple[Tensor, str]]) -> None:
    """One file per rank, as DCP writes it: tensors by name, each with its offset as JSON."""
    for rank, shard in enumerate(shards, 1):
        offsets = ", ".join(f'"{name}": {{"saved_offsets": {offset}}}' for name, (_, offset) in shard.items())
        tensors = {name: tensor.clone() for name, (tensor, _) in shard.items()}
        file = folder / f"shard-{rank:05d}-model-00001-of-00001.safetensors"
        save_file(tensors, file, metadata={"DCP_SHARDING_INFO": f"{{{offsets}}}"})


def test_a_single_process_writes_a_plain_safetensors_file(tmp_path):
    """Anybody can open it: whole tensors under their own names, also of noncontiguous tensors and of views."""
    rows, _, scalar = WHOLE.values()
    tensors = {"turned": rows.T, "view": rows[1:3], "scalar": scalar, "ints": torch.arange(3)}
    (file,) = save(tmp_path / "some", stage(tensors, {}))
    assert [*(tmp_path / "some").iterdir()] == [file]
    for found in (load_file(file), read(tmp_path / "some")):
        assert_equal(found, tensors)


def test_a_file_that_cannot_be_written_has_the_number_of_the_systems_error(tmp_path):
    """By which callers know that a disk is full. Here the system limits the size of files."""
    resource = pytest.importorskip("resource", reason="Windows does not limit files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*some\.safetensors") as error:
            save(tmp_path / "some", stage(WHOLE, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG


def test_shards_make_up_tensors(tmp_path):
    rows, one, scalar = WHOLE.values()
    first = {"rows": (rows[:2], "[0, 0]"), "one": (one, "[0]"), "scalar": (scalar, "[]")}
    write_shards(tmp_path, first, {"rows": (rows[2:], "[2, 0]"), "one": (torch.ones(0), "[1]")})
    assert_equal(read(tmp_path), WHOLE)
    filled = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    load(tmp_path, filled)
    assert_equal(filled, WHOLE)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, "[0]"), (4, "[1]")),
        ((3, "[0]"), (2, "[4]")),
        ((2, "[0]"), ((2, 1), "[2, 0]")),
        ((2, "[0]"), (0, "[1000000000000000]")),
        ((0, "[0]"), (0, "[1000000000000000]")),
        ((2, "[0]"), (2, "[0]")),
    ],
    ids=["overlap", "hole", "one more dimension", "empty and far away", "nothing but size", "twice"],
)
def test_shards_that_do_not_exactly_cover_a_tensor_are_damage(tmp_path, first, second):
    write_shards(tmp_path, *({"x": (torch.zeros(shape), offset)} for shape, offset in (first, second)))
    with refuses():
        read(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "{",
        '["rows"]',
        '{"rows": {}}',
        "[" * 100_000,
        *(
            f'{{"rows": {{"saved_offsets": {x}}}}}'
            for x in ("[0]", "[-1, 0]", '["", 0]', "[9, 0]", f"[{10**30}, 0]", "[0.0, 0]", "null", "[0, 0, 0]")
        ),
    ],
    ids=str.__len__,
)
def test_a_header_that_makes_no_sense_is_damage(tmp_path, header):
    save_file({"rows": torch.zeros(4, 3)}, tmp_path / "model.safetensors", metadata={"DCP_SHARDING_INFO": header})
    with refuses():
        read(tmp_path)
