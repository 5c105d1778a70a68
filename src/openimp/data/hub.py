"""Everything that is read through Hugging Face `datasets`: Parquet files, and data sets of the hub.

Its decoding stays switched off, and its code is imported when a source needs it, for that takes most of a second.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from openimp.common.errors import UserError
from openimp.common.safe_files import cache_folder
from openimp.data.files import fingerprint
from openimp.data.tables import ArrowTable
from openimp.recipe.tasks import Source


def load(name: str, source: Source) -> Any:
    """A data set of the hub, as `datasets` has it.

    Raises:
        UserError: it cannot be had.
    """
    from datasets import load_dataset

    options = {"split": source.split, "revision": source.revision, "streaming": source.stream}
    assert source.hub is not None
    return _loaded(name, source.hub, partial(load_dataset, source.hub, source.config, **options), bars=True)


def load_parquet(name: str, path: str, files: list[str], streaming: bool) -> Any:
    """Parquet files as a `datasets.Dataset`, unpacked once under the cache folder, or as an `IterableDataset`.

    Raises:
        UserError: a file cannot be read or unpacks to too much, or their columns differ.
    """
    # Not load_dataset: it reports each call to a server, also for local files, and waits for it.
    from openimp.data.parquet import open_files

    return _loaded(name, path, partial(open_files, files, str(cache_folder("parquet")), streaming))


def _loaded(name: str, path: str, make: Callable[[], Any], bars: bool = False) -> Any:
    """What `make` gives, without log lines; whatever it raises becomes a UserError in one line.

    `bars` leaves the progress bars of `datasets` as they are: a download takes long.
    """
    try:
        with _quiet(bars):
            return make()
    except Exception as error:  # datasets and its hub client raise some twenty unrelated types
        raise UserError(f"source {name}: {path} cannot be read: {first_line(error)}") from None


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Without log lines, and unless `bars` without progress bars; both are the process' own, and put back after it."""
    import datasets

    loggers = [logging.getLogger(library) for library in ("datasets", "huggingface_hub")]
    levels, hide = [logger.level for logger in loggers], not bars and not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if hide:
            datasets.enable_progress_bars()


def first_line(error: BaseException) -> str:
    """What went wrong, in one line; `datasets` wraps the cause that a person can act on."""
    error = error.__cause__ or error
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def hub_table(name: str, source: Source) -> ArrowTable:
    """A data set of the hub as a table; `datasets` keeps it in its own cache.

    Raises:
        UserError: it cannot be had.
    """
    data = load(name, source)
    files = [file["filename"] for file in data.cache_files]
    content = partial(fingerprint, Path(files[0]).parent if files else Path(), files)
    rows = [(f"{source.hub}/{source.split}", len(data))]
    return ArrowTable(name, str(source.hub), data.data, content, hub_root(source), rows, class_names(data.features))


def hub_root(source: Source) -> Path:
    """The folder that paths in a hub data set must stay in.

    It is the source's `root` if that is set, the data set itself if it is a local folder, else its own folder in the
    hub's cache. The whole cache also holds other data sets and the user's token.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    hub = str(source.hub)
    if source.root or os.path.isdir(hub):
        return Path(source.root or hub)
    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=hub, repo_type="dataset")


def class_names(features: Any) -> dict[str, list[str]]:
    """The names of the classes, by column, of the columns that hold class numbers."""
    from datasets import ClassLabel

    return {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}


class HubReader:
    """The rows of a `datasets.IterableDataset`, in order."""

    def __init__(self, name: str, path: str, dataset: Any) -> None:
        """
        Args:
            name: what the recipe calls the source.
            path: what it was opened from, for messages.
            dataset: a `datasets.IterableDataset` that nobody has iterated.

        Raises:
            UserError: its first rows cannot be read.
        """
        self._name = name
        self._path = path
        try:
            with _quiet(bars=False):
                self._dataset = dataset._resolve_features().decode(False)
        except Exception as error:
            raise self._unreadable(error) from None
        self._names = class_names(self._dataset.features)
        self._beginning = self._dataset.state_dict()
        self._row = 0
        self.columns = list(self._dataset.features)

    def rows(self, state: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """See `streams.Reader`; the state is that of `datasets`, and the number of the next row, to name it by."""
        self._row = state["row"] if state else 0
        self._dataset.load_state_dict(state["reader"] if state else self._beginning)
        # Iterating the data set itself would deal its shards out to the workers of a torch DataLoader; `iter` does not.
        batches = iter(self._dataset.iter(batch_size=1))
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                raise self._unreadable(error) from None
            row = {column: values[0] for column, values in batch.items()}
            for column, names in self._names.items():
                number = row[column]
                row[column] = None if number is None or number < 0 else names[number]
            self._row += 1
            yield f"{self._path}[{self._row - 1}]", row

    def state(self) -> dict[str, Any]:
        """See `streams.Reader`."""
        return {"row": self._row, "reader": self._dataset.state_dict()}

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(f"source {self._name}: {self._path} cannot be read: {first_line(error)}")
