"""Folders of tensors in safetensors files. A file that is missing or damaged is a UserError.

A single process writes one file of whole tensors. If several ranks save, each writes one file with its shards through
torch.distributed.checkpoint (DCP), and the header says where in its tensor each shard begins. Any number of ranks reads
either kind through DCP.

DCP takes half a second to import, so the functions that need it import it.
"""

import errno
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from openimp.common.errors import UserError
from openimp.parallel.distributed import Group, rank
from openimp.parallel.layout import local_shard


def stage(tensors: Mapping[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors, or the local shards of DTensors, to CPU memory.

    `buffers` has the earlier copies by name. They are overwritten, and copies of new names are added. Those of CUDA
    tensors are in pinned memory: into other memory, CUDA copies more slowly, and one tensor after the other.
    """
    for name, tensor in tensors.items():
        if name not in buffers:
            buffers[name] = torch.empty_like(
                tensor.detach(), device="cpu", pin_memory=tensor.is_cuda, memory_format=torch.contiguous_format
            )
        local_shard(buffers[name]).copy_(local_shard(tensor.detach()), non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return {name: buffers[name] for name in tensors}


def save(folder: Path, tensors: Mapping[str, Tensor], group: Group | None = None) -> list[Path]:
    """Writes tensors into a new folder and returns the files that this rank wrote.

    The ranks of `group` write together; None: this process alone. They all see the folder. Of a tensor or shard that
    several ranks have, one rank writes it. If a rank cannot write, all ranks of `group` raise OSError.
    """
    if group is None:
        return [_save_file(folder, tensors)]
    import torch.distributed.checkpoint as torch_dcp

    # Not with `enable_consolidation`, which writes zeros for scalars (torch 2.13).
    writer = torch_dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _first_rank_error():
        torch_dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    return sorted(folder.glob(f"shard-{rank() + 1:05d}-*"))


def _save_file(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Writes whole tensors. DCP would need two more copies of them in memory, and would order headers at random."""
    folder.mkdir()
    file = _whole_file(folder)
    file.touch()  # Only for its mode: `save_file` replaces it by a file that only its owner can read.
    mode = file.stat().st_mode
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # Callers must know whether the disk is full.
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(file)) from None
    file.chmod(mode)
    return file


def load(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors in place from the tensors of the same names in a folder. Of a DTensor, each rank reads its local
    shard only.

    UserError if a tensor is missing in the folder or has another shape there, or if the folder has others.
    """
    saved = shapes(folder)
    for name in sorted(saved.keys() | tensors.keys()):
        saved_shape = saved.get(name, "missing")
        shape = list(tensors[name].shape) if name in tensors else "unknown"
        if saved_shape != shape:
            raise UserError(f"{folder}: does not fit the model: {name} is {saved_shape} there, {shape} here")
    fill(folder, tensors)


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, unsharded, in CPU memory."""
    file = _whole_file(folder)
    if file.exists():
        with _damage_as_user_error(folder):
            return load_file(file)  # It maps the file into memory and copies nothing.
    saved = _metadata(folder)
    tensors = {name: torch.zeros(info.size, dtype=info.properties.dtype) for name, info in saved.items()}
    fill(folder, tensors)
    return tensors


def shapes(folder: Path) -> dict[str, list[int]]:
    """The shape of each tensor of a folder, by name."""
    file = _whole_file(folder)
    if file.exists():
        with _damage_as_user_error(folder), safe_open(file, "pt") as content:
            return {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118 (no mapping)
    return {name: list(info.size) for name, info in _metadata(folder).items()}


def _whole_file(folder: Path) -> Path:
    """The file that a single process writes."""
    return folder / f"{folder.name}.safetensors"


def _metadata(folder: Path) -> dict[str, Any]:
    """The `TensorStorageMetadata` of each tensor of a folder: its size, data type and shards."""
    saved: dict[str, Any]
    with _damage_as_user_error(folder):
        saved = dict(_storage_reader(folder).read_metadata().state_dict_metadata)
        # Where a shard is missing, DCP would leave uninitialized memory, and a false offset would make the tensor huge.
        for name, info in saved.items():
            if not _complete(info.size, info.chunks):
                raise ValueError(f"the shards of {name} do not make up a whole tensor")
    return saved


def _complete(size: Sequence[int], shards: Sequence[Any]) -> bool:
    """Whether the shards have as many axes as the tensor, and together as many values."""
    if not all(len(shard.offsets) == len(shard.sizes) == len(size) for shard in shards):
        return False
    return sum(math.prod(shard.sizes) for shard in shards) == math.prod(size)


def fill(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors in place from the tensors of the same names and shapes in a folder; see `load`."""
    import torch.distributed.checkpoint as torch_dcp

    with _damage_as_user_error(folder), _first_rank_error(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # `no_dist` is intended.
        torch_dcp.load(dict(tensors), storage_reader=_storage_reader(folder), no_dist=True)


def _storage_reader(folder: Path) -> Any:
    """DCP's reader of a folder of safetensors files, without hidden ones.

    macOS adds files with names such as ._model.safetensors to archives and to some disks.
    """
    import torch.distributed.checkpoint as torch_dcp

    reader: Any = torch_dcp.HuggingFaceStorageReader(str(folder))
    list_files = reader.fs.ls
    reader.fs.ls = lambda path: [file for file in list_files(path) if not Path(file).name.startswith(".")]
    return reader


@contextmanager
def _first_rank_error() -> Iterator[None]:
    """Raises the error of the first failing rank, in place of DCP's error, which lists the failures of all ranks."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        cause, _ = error.failures[min(error.failures)]
        raise cause from None


@contextmanager
def _damage_as_user_error(folder: Path) -> Iterator[None]:
    """Raises what missing or damaged files raise as a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{folder}: missing") from None
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{folder}: damaged: {error}") from None
