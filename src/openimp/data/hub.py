"""Sources that are read with Hugging Face `datasets`: Parquet files and data sets of the Hugging Face Hub.

`datasets` does not decode media here. It is imported only if a source needs it, because that takes almost a second.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from openimp.common.cache import stable_hash
from openimp.common.errors import UserError, one_line
from openimp.common.progress import no_log_output
from openimp.data.files import fingerprint
from openimp.data.streams import NamedRow
from openimp.data.tables import Table
from openimp.recipe.tasks import Source


def load(name: str, source: Source) -> Any:
    """Loads a data set of the hub as a `datasets.Dataset`, or as an `IterableDataset` if it is streamed.

    `datasets` keeps it in its own cache.
    """
    from datasets import load_dataset

    options = {"split": source.split, "revision": source.revision, "streaming": source.stream}
    with quiet(name, str(source.hub), bars=True):
        return load_dataset(str(source.hub), source.config, **options)


@contextmanager
def quiet(name: str, path: str, bars: bool = False) -> Iterator[None]:
    """Runs code of `datasets` without its log output, and converts its errors to a UserError of one line.

    With `bars`, `datasets` shows its progress bars, because a download takes long.
    """
    import datasets

    hide_bars = not bars and not datasets.are_progress_bars_disabled()
    if hide_bars:
        datasets.disable_progress_bars()
    try:
        with no_log_output(logging.ERROR):
            yield
    except UserError:  # of openimp's cache
        raise
    except Exception as error:  # datasets and its hub client raise about twenty unrelated types.
        raise _unreadable(name, path, error) from None
    finally:
        if hide_bars:
            datasets.enable_progress_bars()


def _unreadable(name: str, path: str, error: Exception) -> UserError:
    cause = error.__cause__ or error  # datasets wraps what a user can fix.
    return UserError(f"source {name}: {path} cannot be read: {one_line(cause)}")


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


def as_table(name: str, path: str, data: Any, row_prefix: str, root: Path | None) -> Table:
    """Converts a `datasets.Dataset` to a table. Rows are named by `row_prefix` and their number."""
    files = [file["filename"] for file in data.cache_files]
    content = partial(_content, files, row_prefix, len(data))
    texts = class_texts(data.features)
    return Table(name, path, data.data, content, root, files=[(row_prefix, len(data))], text_functions=texts)


def _content(files: list[str], row_prefix: str, rows: int, whole: bool) -> str:
    """Hash of a data set: of its files, and of the slice of them that a split such as `train[:90%]` names."""
    content = fingerprint(Path(files[0]).parent if files else Path(), files, whole)
    return stable_hash([content, row_prefix, rows]) if "[" in row_prefix else content


def class_texts(features: Any) -> dict[str, Callable[[Any], Any]]:
    """For each column of class numbers, or of lists of them, the function from a value to names of classes."""
    from datasets import ClassLabel

    item_features = {column: getattr(feature, "feature", feature) for column, feature in features.items()}  # of lists
    return {
        column: partial(_class_text, feature.names)
        for column, feature in item_features.items()
        if isinstance(feature, ClassLabel)
    }


def _class_text(names: list[str], value: Any) -> Any:
    """The name of a class, or of each class of a list."""
    if isinstance(value, list):
        return [_class_text(names, number) for number in value]
    if value is None or value < 0:  # -1: the class is unknown.
        return None
    return names[value]


class HubShards:
    """The shards of a `datasets.IterableDataset` as `streams.Shards`. They are named by `labels`, or else by number.

    A state has the state of `datasets` and the number of the next row.
    """

    def __init__(self, name: str, path: str, dataset: Any, labels: list[str] | None = None) -> None:
        self._name = name
        self._path = path
        with quiet(name, path):
            self._dataset = dataset._resolve_features().decode(False)
        self._labels = labels or [f"{path}#{shard}" for shard in range(self._dataset.num_shards)]
        self._texts = class_texts(self._dataset.features)
        self.columns = list(self._dataset.features)

    def __len__(self) -> int:
        return len(self._labels)

    def rows(self, shard: int, state: dict[str, Any] | None) -> Iterator[tuple[NamedRow, Any]]:
        number = state["row"] if state else 0
        data = self._dataset.shard(len(self), shard)
        if state:
            data.load_state_dict(state["reader"])
        try:
            # Iterating the data set itself would divide its shards among the workers of a torch DataLoader.
            for batch in data.iter(batch_size=1):
                row = {column: values[0] for column, values in batch.items()}
                for column, text_of in self._texts.items():
                    row[column] = text_of(row[column])
                row_name = f"{self._labels[shard]}[{number}]"
                number += 1
                yield (row_name, row), {"row": number, "reader": data.state_dict()}
        except Exception as error:  # As in `quiet`, which would run for every row.
            raise _unreadable(self._name, self._path, error) from None
