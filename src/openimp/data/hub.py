"""Sources that are read with Hugging Face `datasets`: Parquet files and data sets of the Hugging Face Hub.

`datasets` does not decode media here. It is imported only if a source needs it, because that takes almost a second.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from openimp.common.errors import UserError
from openimp.data.files import fingerprint
from openimp.data.tables import Table, class_name
from openimp.recipe.tasks import Source


def load(name: str, source: Source) -> Any:
    """Loads a data set of the hub as a `datasets.Dataset`, or as an `IterableDataset` if it is streamed.

    `datasets` keeps it in its own cache.
    """
    from datasets import load_dataset

    options = {"split": source.split, "revision": source.revision, "streaming": source.stream}
    with quiet(name, str(source.hub), bars=True):
        return load_dataset(str(source.hub), source.config, **options)


def load_parquet(name: str, path: str, files: list[str], streaming: bool) -> Any:
    """Loads Parquet files as a `datasets.Dataset`, unpacked once into the cache folder, or as an `IterableDataset`."""
    # load_dataset would report each call to a server and wait for it, even for local files.
    from openimp.data.parquet import open_files

    with quiet(name, path):
        return open_files(files, streaming)


@contextmanager
def quiet(name: str, path: str, bars: bool = False) -> Iterator[None]:
    """Runs code of `datasets` without its log output, and converts its errors to a UserError of one line.

    With `bars`, `datasets` shows its progress bars, because a download takes long.
    """
    import datasets

    loggers = [logging.getLogger(library) for library in ("datasets", "huggingface_hub")]
    levels, hide = [logger.level for logger in loggers], not bars and not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    except Exception as error:  # datasets and its hub client raise about twenty unrelated types.
        raise unreadable(name, path, error) from None
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if hide:
            datasets.enable_progress_bars()


def unreadable(name: str, path: str, error: Exception) -> UserError:
    return UserError(f"source {name}: {path} cannot be read: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The error message in one line. `datasets` wraps the cause that a user can fix, so the cause is preferred."""
    error = error.__cause__ or error
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def as_table(name: str, path: str, data: Any, label: str, root: Path) -> Table:
    """Converts a `datasets.Dataset`, of which `label` and a number name the rows, to a table."""
    files = [file["filename"] for file in data.cache_files]
    content = partial(fingerprint, Path(files[0]).parent if files else Path(), files)
    return Table(name, path, data.data, content, root, [(label, len(data))], class_names(data.features))


def hub_root(source: Source) -> Path:
    """The folder that paths in a hub data set cannot leave.

    It is the source's `root` if that is set, the data set itself if it is a local folder, else the data set's own
    folder in the hub's cache. The rest of the cache holds other data sets and the user's token.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    hub = str(source.hub)
    if source.root or os.path.isdir(hub):
        return Path(source.root or hub)
    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=hub, repo_type="dataset")


def class_names(features: Any) -> dict[str, list[str]]:
    """The class names of each column that holds class numbers."""
    from datasets import ClassLabel

    return {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}


class HubShards:
    """The shards of a `datasets.IterableDataset` as `streams.Shards`. `labels` name them; without, they have numbers.

    A state is that of `datasets` and the number of the next row.
    """

    def __init__(self, name: str, path: str, dataset: Any, labels: list[str] | None = None) -> None:
        self._name = name
        self._path = path
        with quiet(name, path):
            self._dataset = dataset._resolve_features().decode(False)
        self._labels = labels or [f"{path}#{shard}" for shard in range(self._dataset.num_shards)]
        self._names = class_names(self._dataset.features)
        self.columns = list(self._dataset.features)

    def __len__(self) -> int:
        return len(self._labels)

    def rows(self, shard: int, state: dict[str, Any] | None) -> Iterator[tuple[tuple[str, dict[str, Any]], Any]]:
        number = state["row"] if state else 0
        data = self._dataset.shard(len(self), shard)
        if state:
            data.load_state_dict(state["reader"])
        for batch in self._batches(data):
            row = {column: values[0] for column, values in batch.items()}
            for column, names in self._names.items():
                row[column] = class_name(row[column], names)
            number += 1
            yield (f"{self._labels[shard]}[{number - 1}]", row), {"row": number, "reader": data.state_dict()}

    def _batches(self, data: Any) -> Iterator[dict[str, list[Any]]]:
        try:
            # Iterating the data set itself would divide its shards among the workers of a torch DataLoader.
            yield from data.iter(batch_size=1)
        except Exception as error:
            raise unreadable(self._name, self._path, error) from None
