"""`openimp embed`: writes the embeddings of files to a Parquet table."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openimp.common.errors import UserError, by_extension, counted
from openimp.common.modality import BadMedia
from openimp.common.progress import console, track
from openimp.common.safe_files import replacing
from openimp.data.files import is_url, is_utf8
from openimp.encoding.engine import ItemEncoder, to_cpu
from openimp.inference.files import File, file_value, find_files, shown_name
from openimp.inference.model import Model, load


@dataclass(frozen=True)
class Embedded:
    """The result of `embed`."""

    out: Path | str  # the table, or the folder or URL that `openimp embed --ray` writes to
    rows: dict[str, int]  # the number of embedded files by modality
    skipped: list[str]  # "path: reason" of each file that could not be read
    unknown: dict[str, int]  # the number of files in folders that no modality of the model reads, by extension

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.rows.items())
        lines = [f"{self.out}: {counted(sum(self.rows.values()), 'embedding')} ({counts})"]
        if self.skipped:
            lines.append(f"{counted(len(self.skipped), 'file')} could not be read:")
            lines += [f"  {file}" for file in self.skipped]
        if self.unknown:
            lines.append(f"skipped files in folders that no modality of the model reads: {by_extension(self.unknown)}")
        return "\n".join(lines)


def embed(
    run: str | Path,
    files: Iterable[File],
    out: str | Path,
    modality: str | None = None,
    towards: str | None = None,
    batch_size: int = 64,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = track,
) -> Embedded:
    """Embeds files, writes their unit vectors to a Parquet table, and prints a summary.

    The table's columns are `path`, `modality`, `towards` and `embedding`, a list of Z fp32 values. `path` is as given,
    or as found in a folder. `towards` is the modality that the embedding can be compared with. In a model with disjoint
    spaces, only embeddings of the same pair of modalities are comparable. Rows are grouped by modality. Each text file
    is one text in UTF-8. If embedding fails, also because no file can be read, no table is written.

    Args:
        run: a run, a model folder or a model on the Hugging Face Hub, as `openimp.load` takes it.
        files: files, and folders to search, on disk or at URLs that fsspec opens, such as `s3://bucket/photos`.
        out: the table. An existing file is replaced.
        modality: the modality of all files. By default, the extension of each file decides.
        towards: see `Model.encode`.
        batch_size: number of clips or items per forward pass.
        progress: wraps an iterable to show its progress.
    """
    if is_url(str(out)):
        raise UserError(f"{out}: only --ray writes to a URL; name a Parquet file on disk")
    out, model = Path(out), load(run)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a Parquet file")
    chosen = choose_files(model, files, modality, towards, batch_size)
    schema = table_schema(model, run)
    rows = dict.fromkeys(chosen.files, 0)
    skipped: list[str] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as draft:
        with pq.ParquetWriter(draft, schema) as writer:
            for name, paths in chosen.files.items():
                shown = progress(paths, f"embed {name}")
                for table, bad in embed_files(chosen.encoders[name], shown, schema):
                    writer.write_table(table)
                    rows[name] += len(table)
                    skipped += [f"{path}: {why}" for path, why in bad]
        require_rows(rows, skipped)
    done = Embedded(out, rows, skipped, chosen.unknown)
    console.print(str(done), soft_wrap=True)
    return done


class ChosenFiles(NamedTuple):
    """Files to embed."""

    files: dict[str, list[File]]  # by modality
    encoders: dict[str, ItemEncoder]  # by modality
    unknown: dict[str, int]  # the number of files in folders that no modality of the model reads, by extension


def choose_files(
    model: Model, files: Iterable[File], modality: str | None, towards: str | None, batch_size: int
) -> ChosenFiles:
    """Finds the files to embed, and checks that the model can compare them with `towards`."""
    found, unknown = find_files(files, model.modalities, modality, "; if it is one of these, use --modality")
    encoders = {name: model.item_encoder(name, towards, batch_size, f"embed {name}") for name in found}
    return ChosenFiles(found, encoders, unknown)


def table_schema(model: Model, run: str | Path) -> pa.Schema:
    """The columns of a table of embeddings, and which model made it."""
    vector = pa.list_(pa.float32(), model.imp.config.embed_dim)
    columns = dict.fromkeys(("path", "modality", "towards"), pa.string()) | {"embedding": vector}
    return pa.schema(columns, metadata={"openimp": json.dumps({"model": str(run), "recipe": model.config.name})})


def embed_files(
    encoder: ItemEncoder, files: Iterable[File], schema: pa.Schema, folder: str = ""
) -> Iterator[tuple[pa.Table, list[tuple[str, str]]]]:
    """Yields rows of the table, and paths of unreadable files with reasons, for chunks of files.

    Relative paths are relative to `folder`.
    """
    items = ((file, partial(_read, encoder, folder, file)) for file in files)
    for chunk in to_cpu(encoder.encode(items)):
        vectors = {str(file): vector for file, vector in chunk if not isinstance(vector, BadMedia)}
        bad = [(shown_name(file), str(reason)) for file, reason in chunk if isinstance(reason, BadMedia)]
        rows = [
            {"path": path, "modality": encoder.modality.name, "towards": encoder.towards, "embedding": vector}
            for path, vector in vectors.items()
        ]
        yield pa.Table.from_pylist(rows, schema), bad


def require_rows(rows: dict[str, int], skipped: list[str]) -> None:
    """Raises UserError if nothing could be embedded."""
    if not sum(rows.values()):
        raise UserError(f"no file can be read; the first: {skipped[0]}")


def _read(encoder: ItemEncoder, folder: str, file: File) -> np.ndarray:
    if not is_utf8(str(file)):
        raise BadMedia("its name is not UTF-8, so the table cannot hold it")
    path = Path(folder, file) if isinstance(file, Path) else file
    return encoder.read(file_value(path, encoder.modality.reads_text))
