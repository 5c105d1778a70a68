"""Embedding with Ray: `openimp embed --ray`, and the rows of a Ray dataset.

It needs `pip install openimp[ray]`.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia
from openimp.common.progress import console, track
from openimp.data.files import is_url
from openimp.encoding.engine import COPIED_TOGETHER, to_cpu
from openimp.evaluation.provenance import checkpoint_fields
from openimp.inference.embed import Embedded, choose_files, embed_files, require_rows, table_schema
from openimp.inference.files import File, file_value
from openimp.inference.model import Model, load
from openimp.inference.parts import ERRORS_SCHEMA, Parts

if TYPE_CHECKING:
    from ray.data import Dataset

RETRIES = 3
"""How often Ray embeds a part or a batch again after its worker died, before it gives up."""


def embed_with_ray(
    run: str | Path,
    files: Iterable[File],
    out: str | Path,
    modality: str | None = None,
    towards: str | None = None,
    batch_size: int = 64,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = track,
) -> Embedded:
    """Embeds files like `openimp.inference.embed.embed`, in the workers of a Ray cluster, and prints a summary.

    The workers write to a folder: `vectors/` has the table that `embed` writes, `errors/` a table of the files that
    cannot be read, and `files.parquet` lists all files. Vectors are those of `embed`, bit for bit, if all workers
    compute on the same kind of device with the same number of threads. If the call is interrupted, the next one with
    the same arguments embeds only what is missing. Without the environment variable `RAY_ADDRESS`, the cluster is this
    machine; see `cluster`.

    Args:
        run: as for `embed`. All nodes must see it.
        files: as for `embed`. All nodes must see them.
        out: a new folder, or one of an earlier call, which all nodes must see, or a URL that fsspec opens.
        modality: as for `embed`.
        towards: as for `embed`.
        batch_size: as for `embed`.
        progress: wraps an iterable of parts to show its progress.
    """
    _import_ray()  # Fails before the model is loaded.
    model = load(run, "cpu")
    chosen = choose_files(model, files, modality, towards, batch_size)
    targets = {name: str(encoder.towards) for name, encoder in chosen.encoders.items()}
    folder = str(out) if is_url(str(out)) else os.path.abspath(out)
    parts = Parts(folder)
    with cluster() as ray:
        workers, needs = _workers(ray)
        parts.prepare(chosen.files, targets, _options(model, batch_size), batch_size, workers)
        if missing := parts.missing():
            numbers = ray.data.from_items(missing, override_num_blocks=len(missing))
            numbers.context.enable_progress_bars = False
            numbers.context.raise_original_map_exception = True
            arguments = (folder, _everywhere(run), os.getcwd(), batch_size)
            pool = ray.data.ActorPoolStrategy(size=min(workers, len(missing)))
            done = numbers.map_batches(_PartEncoder, fn_constructor_args=arguments, batch_size=1, compute=pool, **needs)
            with _clear_errors(ray):
                for _ in zip(progress(missing, "embed parts"), done.iter_rows(), strict=True):
                    pass
    rows, skipped = parts.count()
    require_rows(rows, skipped)
    result = Embedded(str(out), rows, skipped, chosen.unknown)
    console.print(str(result), soft_wrap=True)
    return result


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
    arguments = (_everywhere(run), column, modality, towards, batch_size)
    workers, needs = _workers(ray)
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=workers)
    options = {"compute": pool, "batch_size": COPIED_TOGETHER, "batch_format": "pyarrow", **needs, **options}
    return dataset.map_batches(_RowEncoder, fn_constructor_args=arguments, **options)


@contextmanager
def cluster(cpus: int | None = None) -> Iterator[Any]:
    """Connects to a Ray cluster for the block, and yields the module `ray`.

    It is the cluster that this process is connected to, or the one that the environment variable `RAY_ADDRESS` names.
    Otherwise, a cluster on this machine is started, and stopped after the block. It listens on the loopback address
    only (if this is the first import of Ray), accepts only those who know a random token, has no dashboard, and reports
    no usage statistics unless RAY_USAGE_STATS_ENABLED is set. It has `cpus` CPUs (None: those that this process may
    use) and all GPUs.
    """
    ray = _import_ray()
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_AUTH_TOKEN", token_hex(32))  # Otherwise Ray would write one into the home folder.
        if cpus is None and hasattr(os, "sched_getaffinity"):
            cpus = len(os.sched_getaffinity(0))
        options |= {"num_cpus": cpus, "include_dashboard": False}
    try:
        try:
            ray.init(address or "local", **options)
        except (Exception, SystemExit) as error:  # Ray has no class for these errors, and exits if nobody answers.
            reason = "no Ray cluster answers there" if isinstance(error, SystemExit) else error
            raise UserError(f"{f'RAY_ADDRESS={address}' if address else 'Ray did not start'}: {reason}") from None
        yield ray
    finally:
        ray.shutdown()


class _PartEncoder:
    """A worker of `embed_with_ray`. Ray makes it on a node of the cluster."""

    def __init__(self, out: str, run: str, folder: str, batch_size: int) -> None:
        self.parts, self.run, self.folder, self.batch_size = Parts(out), run, folder, batch_size

    @cached_property
    def model(self) -> Model:
        """The model. It is not loaded in `__init__`, because Ray reports errors there only as a text."""
        model = load(self.run)
        if _options(model, self.batch_size) != self.parts.options:
            raise UserError(f"{self.run}: its weights are not those with which the embedding was begun")
        return model

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        schema = table_schema(self.model, self.run)
        for number in batch["item"].tolist():
            name, towards, files = self.parts.files(number)
            vectors: list[pa.Table] = []
            errors: list[dict[str, str]] = []
            encoder = self.model.item_encoder(name, towards, self.batch_size, f"embed {name}")
            for table, bad in embed_files(encoder, files, schema, self.folder):
                vectors.append(table)
                errors += [{"path": path, "modality": name, "error": why} for path, why in bad]
            self.parts.write(number, pa.concat_tables(vectors), pa.Table.from_pylist(errors, ERRORS_SCHEMA))
        return batch


class _RowEncoder:
    """A worker of `embed_dataset`."""

    def __init__(self, run: str, column: str, modality: str, towards: str | None, batch_size: int) -> None:
        self.column = column
        self.encoder = load(run).item_encoder(modality, towards, batch_size, f"embed {modality}")

    def __call__(self, rows: pa.Table) -> pa.Table:
        items = ((None, partial(self._read, value)) for value in rows[self.column].to_pylist())
        results = [result for chunk in to_cpu(self.encoder.encode(items)) for _, result in chunk]
        vectors = [None if isinstance(result, BadMedia) else result for result in results]
        errors = [str(result) if isinstance(result, BadMedia) else None for result in results]
        embedding = pa.array(vectors, pa.list_(pa.float32(), self.encoder.model.config.embed_dim))
        return rows.append_column("embedding", embedding).append_column("error", pa.array(errors, pa.string()))

    def _read(self, value: Any) -> np.ndarray:
        if isinstance(value, str) and not self.encoder.modality.reads_text:
            value = file_value(value if is_url(value) else Path(value), reads_text=False)
        return self.encoder.read(value)


def _workers(ray: Any) -> tuple[int, dict[str, Any]]:
    """The number of workers that a cluster has room for, and what `map_batches` must ask for each.

    It is one worker per GPU, or per CPU if the cluster has no GPU.
    """
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    # A file that kills each worker must not be tried forever.
    needs = {"max_task_retries": RETRIES, **({"num_gpus": 1} if gpus else {"num_cpus": 1})}
    return gpus or max(1, int(resources.get("CPU", 0))), needs


def _options(model: Model, batch_size: int) -> str:
    """What the vectors depend on besides the files and the modalities they are compared with."""
    checkpoint = checkpoint_fields(model.imp, model.modalities)["checkpoint"]
    return json.dumps({"checkpoint": checkpoint, "batch_size": batch_size})


def _everywhere(run: str | Path) -> str:
    """The name of a model that does not depend on the working directory."""
    return os.path.abspath(run) if os.path.exists(run) else str(run)


@contextmanager
def _clear_errors(ray: Any) -> Iterator[None]:
    """Turns a UserError in a worker, and the repeated death of workers, into a UserError of this process."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(error, ray.exceptions.RayActorError) and not error.actor_init_failed:
            raise UserError(
                f"workers died {RETRIES + 1} times at the same part, because of one of its files or for lack of memory"
            ) from None
        raise


def _import_ray() -> Any:
    if (os.environ.get("RAY_ADDRESS") or "127.").startswith(("127.", "localhost:")):
        # Otherwise, under Linux, Ray replaces a loopback address by one that others can reach.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray.data
    except ImportError:
        raise UserError("this needs Ray: pip install 'openimp[ray]'") from None
    return ray
