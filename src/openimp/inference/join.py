"""`openimp embed --join`: adds a column of embeddings to the rows of a source, for example to distill the model."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openimp.common.errors import UserError, counted, one_line
from openimp.common.modality import BadMedia
from openimp.common.progress import console, track
from openimp.common.safe_files import replacing
from openimp.common.schema import checked
from openimp.data.sources import open_source
from openimp.data.tables import Table
from openimp.encoding.engine import chunks_on_cpu
from openimp.encoding.items import raw_value, require_columns
from openimp.inference.files import listed, parquet_file
from openimp.inference.model import load
from openimp.recipe.file import parse_mapping
from openimp.recipe.inputs import Input
from openimp.recipe.tasks import Source


def embed_rows(
    run: str | Path,
    source: str,
    out: str | Path,
    modality: str | None,
    column: str | None,
    to: str = "embedding",
    towards: str | None = None,
    batch_size: int = 64,
) -> list[str]:
    """Embeds one modality of the rows of a source, and writes the rows with the unit vectors to a Parquet file.

    A row that cannot be read has null instead of a vector. Class numbers and captions become texts, and all other
    columns stay as they are. If embedding fails, also because no row can be read, no file is written.

    Returns "row: reason" of each row without a vector.

    Args:
        run: a run, a model folder or a model on the Hugging Face Hub, as `openimp.load` takes it.
        source: what the `path` of a recipe's source names, if it is a table and no stream; or a source as in a recipe,
            such as "{path: rows.parquet, root: photos}".
        out: a Parquet file, which openimp reads as a source. An existing one is replaced.
        modality: the modality to embed. It may be None if the model has only one.
        column: the column or text template that the modality reads.
        to: the name of the new column.
        towards: see `Model.encode`.
        batch_size: number of clips or items per forward pass.
    """
    out = parquet_file(out)
    model = load(run)
    if modality is None and len(model.modalities) == 1:
        (modality,) = model.modalities
    if modality is None or modality not in model.modalities:
        raise UserError(f"--modality: expected {' or '.join(model.modalities)}, found {modality or 'none'}")
    if column is None:
        raise UserError(f"--column: name the column or the text template that {modality} reads")
    encoder = model.item_encoder(modality, towards, batch_size, f"embed {modality}")
    options = parse_mapping(source, Path("--join"), "source") if source.startswith("{") else {"path": source}
    table = open_source("rows", checked(Source, options, "--join", Path.cwd()))
    if not isinstance(table, Table):
        raise UserError("--join: a stream has no numbered rows; remove stream")
    if to in table.columns:
        raise UserError(f"--to: {source} has a column {to!r} already; name another one")
    spec = Input(column=column)
    require_columns(table, encoder.modality, spec, f"embed {modality}")

    def read(row: int) -> np.ndarray:
        return encoder.read_known(raw_value(table, encoder.modality, spec, row))

    embedding = pa.field(to, pa.list_(pa.float32()))
    metadata = {"openimp": json.dumps({"model": str(run), "recipe": model.config.name})}
    schema = table.arrow(range(0)).schema.append(embedding).with_metadata(metadata)
    rows = track(range(len(table)), f"embed {modality}")
    results = encoder.encode((row, partial(read, row)) for row in rows)
    bad = []
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(out) as draft, pq.ParquetWriter(draft, schema) as writer:
            for chunk in chunks_on_cpu(results):
                vectors = [None if isinstance(result, BadMedia) else result for _, result in chunk]
                bad += [f"{table.row_name(row)}: {error}" for row, error in chunk if isinstance(error, BadMedia)]
                first_row = chunk[0][0]
                part = table.arrow(range(first_row, first_row + len(chunk)))
                part = part.append_column(embedding, pa.array(vectors, embedding.type))
                writer.write_table(part.replace_schema_metadata(metadata))
            if len(bad) == len(table):
                raise UserError(f"no row can be read; the first: {bad[0]}")
    except pa.ArrowException as error:  # Parquet cannot store objects without any key.
        raise UserError(f"--join: the rows cannot be written to Parquet: {one_line(error)}") from None
    embeddings = counted(len(table) - len(bad), "embedding")
    lines = [f"{out}: {embeddings} of {model.imp.config.embed_dim} numbers in column {to!r}"]
    lines += listed(bad, f"{counted(len(bad), 'row')} could not be read:")
    if table.root is not None and table.root.resolve() != out.resolve().parent:
        lines.append(f"as a source: {{path: {out}, root: {table.root}}}")
    console.print("\n".join(lines), soft_wrap=True)
    return bad
