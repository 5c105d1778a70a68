"""`openimp embed`: writes the embeddings of files to a Parquet table."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from openimp.common.errors import UserError, counted, escaped
from openimp.common.progress import console, track
from openimp.common.safe_files import replacing
from openimp.data.files import is_utf8
from openimp.inference.files import File, encoded, find_files, left_out, parquet_file, shown_name
from openimp.inference.model import load


@dataclass(frozen=True)
class Embedded:
    """The result of `embed`."""

    out: Path  # the table
    rows: dict[str, int]  # the number of embedded files by modality
    skipped: list[str]  # "path: reason" of each file that could not be read
    unknown: dict[str, int]  # the number of files in folders that no modality of the model reads, by extension

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.rows.items())
        summary = f"{escaped(self.out)}: {counted(sum(self.rows.values()), 'embedding')} ({counts})"
        return "\n".join([summary, *left_out(self.skipped, self.unknown)])


def embed(
    run: str | Path,
    files: File | Iterable[File],
    out: str | Path,
    modality: str | None = None,
    towards: str | None = None,
    batch_size: int = 64,
) -> Embedded:
    """Embeds files, writes their unit vectors to a Parquet table, and prints a summary.

    The table's columns are `path`, `modality`, `towards` and `embedding`, a list of Z fp32 values. `path` is as given,
    or as found in a folder. `towards` is the modality that the embedding can be compared with. In a model with disjoint
    spaces, only embeddings of the same pair of modalities are comparable. Rows are grouped by modality. Each text file
    is one text in UTF-8. If embedding fails, also because no file can be read, no table is written.

    Args:
        run: a run, a model folder or a model on the Hugging Face Hub, as `openimp.load` takes it.
        files: a file or folder to search, or several, on disk or at URLs that fsspec opens, such as `s3://bucket/photos`.
        out: the table, a file that ends with .parquet. An existing file is replaced.
        modality: the modality of all files. By default, the extension of each file decides.
        towards: see `Model.encode`.
        batch_size: number of clips or items per forward pass.
    """
    out = parquet_file(out)
    model = load(run)
    hint = "; if it is one of these, use --modality; to embed the rows of a table, use --join"
    files = [files] if isinstance(files, str | Path) else files
    files_by_modality, unknown = find_files(files, model.modalities, modality, hint)
    encoders = {name: model.item_encoder(name, towards, batch_size, f"embed {name}") for name in files_by_modality}
    texts = ["path", "modality", "towards"]
    columns = dict.fromkeys(texts, pa.string()) | {"embedding": pa.list_(pa.float32(), model.imp.config.embed_dim)}
    schema = pa.schema(columns, {"openimp": json.dumps({"model": str(run), "recipe": model.config.name})})
    rows = dict.fromkeys(files_by_modality, 0)
    skipped: list[str] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    # A dictionary of numbers that do not repeat would take a third more space, and five times as long to write.
    with replacing(out) as draft, pq.ParquetWriter(draft, schema, use_dictionary=texts) as writer:
        for name, modality_files in files_by_modality.items():
            encoder = encoders[name]
            storable = [file for file in modality_files if is_utf8(str(file))]
            others = [shown_name(file) for file in modality_files if not is_utf8(str(file))]
            skipped += [f"{file}: its name is not UTF-8, so the table cannot hold it" for file in others]
            for vectors in encoded(encoder, track(storable, f"embed {name}"), skipped):
                row = {"modality": name, "towards": encoder.towards}
                new_rows = [row | {"path": str(file), "embedding": vector} for file, vector in vectors.items()]
                rows[name] += len(new_rows)
                writer.write_table(pa.Table.from_pylist(new_rows, schema))
        if not sum(rows.values()):
            raise UserError(f"no file can be read; the first: {escaped(skipped[0])}")
    embedded = Embedded(out, rows, skipped, unknown)
    console.print(str(embedded), soft_wrap=True)
    return embedded
