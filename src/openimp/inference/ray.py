"""Embeds the rows of a Ray dataset. It needs `pip install 'openimp[ray]'`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from openimp.common.modality import BadMedia
from openimp.common.names import absolute_name, is_url
from openimp.encoding.engine import COPIED_TOGETHER, chunks_on_cpu
from openimp.inference.files import file_value
from openimp.inference.model import load

if TYPE_CHECKING:
    from ray.data import Dataset


def embed_dataset(
    dataset: "Dataset",
    run: str | Path,
    column: str,
    modality: str,
    towards: str | None = None,
    batch_size: int = 64,
    **options: Any,
) -> "Dataset":
    """Adds the embeddings of a column to a Ray dataset.

    Args:
        dataset: the rows. All of their columns stay, such as the id by which Ray's checkpoints know a row.
        run: a run, a model folder or a model on the Hugging Face Hub, as `openimp.load` takes it. All nodes must see
            it.
        column: the column with the inputs, as `Model.encode` takes them: bytes, arrays, or strings. For a modality that
            reads text, a string is the text itself; otherwise it is a path, or a URL that fsspec opens.
        modality: the modality of the inputs.
        towards: see `Model.encode`.
        batch_size: number of clips or items per forward pass.
        options: arguments of `Dataset.map_batches` that replace ours, such as `compute` and `num_gpus`. By default,
            there is up to one worker per GPU of the cluster, or per CPU if it has no GPU.

    Returns:
        The dataset with two more columns: `embedding`, a unit vector of Z fp32 values, and `error`. If an input cannot
        be read, `error` says why, and `embedding` is null; otherwise `error` is null.

    Raises:
        UserError: there is no model, it has no such modality, or it cannot compare the two modalities.
    """
    import ray

    model = load(run, "cpu")
    model.item_encoder(modality, towards, batch_size, f"embed {modality}")  # Reports mistakes before workers start.
    resources = ray.cluster_resources()
    device = "GPU" if resources.get("GPU") else "CPU"
    workers = max(1, int(resources.get(device, 1)))
    options = {
        "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        "batch_size": COPIED_TOGETHER,
        "batch_format": "pyarrow",
        f"num_{device.lower()}s": 1,
        **options,
    }
    absolute_run = absolute_name(str(run), ".")  # Workers have other working folders.
    arguments = (absolute_run, column, modality, towards, batch_size)
    return dataset.map_batches(_RowEncoder, fn_constructor_args=arguments, **options)


class _RowEncoder:
    """A worker of `embed_dataset`."""

    def __init__(self, run: str, column: str, modality: str, towards: str | None, batch_size: int) -> None:
        self.column = column
        self.encoder = load(run).item_encoder(modality, towards, batch_size, f"embed {modality}")

    def __call__(self, rows: pa.Table) -> pa.Table:
        items = ((None, partial(self._read, value)) for value in rows[self.column].to_pylist())
        results = [result for chunk in chunks_on_cpu(self.encoder.encode(items)) for _, result in chunk]
        vectors = [None if isinstance(result, BadMedia) else result for result in results]
        errors = [str(result) if isinstance(result, BadMedia) else None for result in results]
        embedding = pa.array(vectors, pa.list_(pa.float32(), self.encoder.model.config.embed_dim))
        return rows.append_column("embedding", embedding).append_column("error", pa.array(errors, pa.string()))

    def _read(self, value: Any) -> np.ndarray:
        if isinstance(value, str) and not self.encoder.modality.reads_text:
            value = file_value(value if is_url(value) else Path(value), reads_text=False)
        return self.encoder.read(value)
