"""Tensors in safetensors files: whole in one, or in parts, of which each process that saved them wrote a file.

One process writes `NAME.safetensors`; of several, each writes its own `NAME-00001-of-00002.safetensors`. A file with
parts says in its header where in the tensor each begins, as torch's HuggingFaceStorageWriter does.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openimp.common.errors import UserError

PLACES, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Keys of the header, by torch's names."""


@dataclass(frozen=True)
class Part:
    """A box of a tensor.

    Attributes:
        file: where it is.
        offsets: where in the tensor it begins, for each dimension.
        sizes: its shape.
        dtype: of its numbers, as the file calls it.
    """

    file: Path
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str = ""

    @property
    def slices(self) -> tuple[slice, ...]:
        """What it is of its tensor."""
        return tuple(slice(offset, offset + size) for offset, size in zip(self.offsets, self.sizes))


def file_name(name: str, number: int = 0, processes: int = 1) -> str:
    """The file that a process writes of some tensors."""
    return f"{name}.safetensors" if processes == 1 else f"{name}-{number + 1:05d}-of-{processes:05d}.safetensors"


def write(file: Path, tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]] | None = None) -> None:
    """Writes tensors; `offsets` says of each where in the whole one it begins, if any of them is a part."""
    places = {name: {OFFSETS: [*begin]} for name, begin in (offsets or {}).items()}
    partly = any(map(any, (offsets or {}).values()))
    file.touch()
    mode = file.stat().st_mode  # save_file replaces the file by one that only its owner can read.
    save_file(dict(tensors), file, metadata={"format": "pt"} | ({PLACES: json.dumps(places)} if partly else {}))
    file.chmod(mode)


def there(folder: Path, name: str) -> bool:
    """Whether a folder holds tensors of this name, damaged or not."""
    return any(folder.glob(f"{name}*.safetensors"))


def parts(folder: Path, name: str) -> dict[str, list[Part]]:
    """The parts of each tensor, which make up all of it.

    Raises:
        UserError: a file is missing or damaged, or a part is missing.
    """
    found: dict[str, list[Part]] = {}
    for file in _files(folder, name):
        with readable(file), safe_open(file, "pt") as opened:
            places = json.loads((opened.metadata() or {}).get(PLACES, "{}"))
            for key in opened.keys():  # noqa: SIM118, it is no mapping
                box = opened.get_slice(key)
                sizes = tuple(box.get_shape())
                offsets = tuple(places[key][OFFSETS]) if key in places else (0,) * len(sizes)
                if [type(offset) for offset in offsets] != [int] * len(sizes) or min(offsets, default=0) < 0:
                    raise ValueError(f"{key} begins at {offsets}")
                found.setdefault(key, []).append(Part(file, offsets, sizes, box.get_dtype()))
    for key, some in found.items():
        # Without this the place of a lost part would be read as whatever was in memory.
        if len({(len(part.sizes), part.dtype) for part in some}) > 1 or not _fill_a_grid(some):
            raise UserError(f"{some[0].file}: damaged: {key} is not whole")
    return found


def _fill_a_grid(parts: list[Part]) -> bool:
    """Whether parts, but for empty ones, are the cells of a grid, each once, as those of a mesh of processes are."""
    filled = [part for part in parts if math.prod(part.sizes)]
    axes = [sorted({(side.start, side.stop) for side in sides}) for sides in zip(*(part.slices for part in filled))]
    joined = all(start == stop for axis in axes for (start, _), stop in zip(axis, [0, *(stop for _, stop in axis)]))
    cells = len({part.offsets for part in filled})
    return not filled or (joined and cells == len(filled) == math.prod(map(len, axes)))


def shape(parts: list[Part]) -> tuple[int, ...]:
    """Of the tensor that has these parts."""
    return tuple(max(ends) for ends in zip(*(map(sum, zip(part.offsets, part.sizes)) for part in parts)))


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """Whole tensors, by name.

    Raises:
        UserError: a file is missing or damaged.
    """
    found: dict[str, Tensor] = {}
    boxes = parts(folder, name)
    for file in dict.fromkeys(part.file for some in boxes.values() for part in some):
        with readable(file), safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                tensor, some = opened.get_tensor(key), boxes[key]
                if len(some) == 1:
                    found[key] = tensor
                    continue
                (own,) = (part for part in some if part.file == file)
                found.setdefault(key, torch.empty(shape(some), dtype=tensor.dtype))[own.slices] = tensor
    return found


def _files(folder: Path, name: str) -> Iterator[Path]:
    whole = folder / file_name(name)
    if whole.exists():
        yield whole
        return
    ends = (re.fullmatch(r"-\d{5}-of-(\d{5})", file.stem.removeprefix(name)) for file in folder.glob(f"{name}-*"))
    processes = max((int(end[1]) for end in ends if end), default=1)
    for number in range(processes):
        yield folder / file_name(name, number, processes)


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Tells what is wrong with a file as a `UserError`."""
    try:
        if file.exists() and not file.is_file():  # Opening a pipe would wait for whoever writes to it.
            raise UserError(f"{file}: is not a regular file")
        yield
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{file}: damaged: {error}") from None
