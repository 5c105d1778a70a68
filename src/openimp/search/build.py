"""`openimp index`: brings an index up to date with folders, or with the media of a run's recipe."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openimp.common.progress import track


@dataclass(frozen=True)
class Indexed:
    """The result of `build_index`. All numbers are numbers of files, or of rows of a source."""

    folder: Path  # the index
    new: int
    changed: int
    moved: int  # found by their hash, and not embedded again
    unchanged: int
    removed: int
    skipped: dict[str, str]  # the reason why a file could not be read, by path
    unknown: int  # files in folders whose extension belongs to none of the model's modalities


def build_index(
    model: str | Path,
    paths: Iterable[str | Path] | None,
    out: str | Path | None = None,
    batch_size: int = 64,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = track,
    allow_sources: bool = False,
) -> Indexed:
    """Embeds media into an index, or updates an index.

    Args:
        model: a run, a model folder or a model on the Hugging Face Hub, as `openimp.load` takes it.
        paths: files and folders. None: the media of all sources of the model's recipe.
        out: the index, a folder. Default: `search.index` in the folder `model`.
        batch_size: number of clips or items per forward pass.
        progress: wraps an iterable to show its progress.
        allow_sources: whether the recipe of a model that was not trained here may read any source.
    """
    raise NotImplementedError
