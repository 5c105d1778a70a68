"""The folder of an index, its lock and its metadata.

index.json     the model, and a fingerprint of its weights, options and views
items.lance/   a LanceDB table with one row per item
.lock          held by the process that writes the index
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from openimp.checkpoint.folder import CHECKPOINTS
from openimp.common.cache import cache_folder, stable_hash
from openimp.common.errors import UserError
from openimp.common.names import BUNDLED, Name
from openimp.common.protocols import file_copies
from openimp.common.safe_files import read_object, refuse_links
from openimp.common.schema import Count, Strict, checked
from openimp.encoding.find import find_model
from openimp.evaluation.provenance import checkpoint_fields
from openimp.inference.model import Model

FORMAT = 3
"""Version of this layout."""
METADATA = "index.json"
LOCK = ".lock"
OWN_INDEX = "search.index"
"""The index in a run's folder."""
INDEX_FILES = ("**/*",)
"""Patterns of the files of an index, for `refuse_links`."""
NEWER_OPTIONS = {"aspect", "noise", "equalize", "mask_frames", "mask_bins"}
"""Options of views that did not exist when fingerprints contained all options. Add each new option."""


class Metadata(Strict):
    """The content of index.json."""

    format: Count
    """`FORMAT`."""
    model: str
    """The model that built the index, as `openimp.load` takes it."""
    fingerprint: str
    """Hash of the model's weights, options and views."""
    towards: dict[str, str]
    """By modality, the other modality that the vectors of its items can be compared with (in a disjoint space)."""
    id: str = ""
    """A random text that identifies the index on this machine; see `media_folders`. Older versions stored none."""


def own_index(model: str) -> Path | None:
    """Where the index of a model's own data is: in its run or, for a bundled model, in openimp's cache. Else None.

    UserError if openimp has no such model.
    """
    scheme, name = Name.parse(model)
    if scheme == BUNDLED:  # A cache may be emptied, but the model and its data can index it again.
        find_model(model)  # It may not exist.
        return cache_folder("search") / name
    run = Path(model).expanduser()
    return run / OWN_INDEX if (run / CHECKPOINTS).is_dir() else None


def is_index(folder: Path) -> bool:
    """Whether a folder holds an index. One that was interrupted at its start has only the lock."""
    is_begun = (folder / LOCK).exists() and all(path.name.startswith(".") for path in folder.iterdir())
    return (folder / METADATA).exists() or is_begun


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates the folder of an index and keeps other writers out."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not is_index(folder))):
        raise UserError(f"{folder}: is not an index; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    refuse_links(folder, INDEX_FILES)
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout:
        raise UserError(f"{folder}: is being written by another process") from None


def read_metadata(folder: Path) -> Metadata | None:
    """The content of index.json; None if the folder has none."""
    file = folder / METADATA
    if not file.exists():
        return None
    data = read_object(file)
    if (version := data.get("format")) != FORMAT:
        raise UserError(
            f"{file}: format {version}, and this version of openimp reads format {FORMAT}; make a new index"
        )
    return checked(Metadata, data, str(file))


def fingerprint(model: Model) -> str:
    """Hash of a model's weights, options and views. Vectors with different fingerprints must not be compared.

    Options with their default value do not count, so that a new option changes no fingerprint.
    """
    return _fingerprint(model, _weights_hash(model), exclude_defaults=True)


def built_with(metadata: Metadata, model: Model) -> bool:
    """Whether an index was built with a model's weights, options and views."""
    weights_hash = _weights_hash(model)
    with_changed_options = _fingerprint(model, weights_hash, exclude_defaults=True)
    with_all_options = _fingerprint(model, weights_hash, exclude=NEWER_OPTIONS)  # as older versions wrote it
    return metadata.fingerprint in (with_changed_options, with_all_options)


def _weights_hash(model: Model) -> Any:
    return checkpoint_fields(model.imp, model.modalities)["checkpoint"]


def _fingerprint(model: Model, weights_hash: Any, **dump_options: Any) -> str:
    views = [(name, view.model_dump_json(**dump_options)) for name, view in model.views.items()]
    options = [(name, _options(modality)) for name, modality in model.modalities.items()]
    changed = [(name, text) for name, text in options if text != "{}"]  # Without any, as older versions wrote it.
    return stable_hash([weights_hash, views, *changed])


def _options(modality: Any) -> str:
    """The options of a modality that are not the default, in JSON. Those that name files or a tower do not count: the
    hash of the weights covers what these are."""
    dumped: str = modality.config.model_dump_json(exclude_defaults=True, exclude={"tower", *file_copies(modality)})
    return dumped
