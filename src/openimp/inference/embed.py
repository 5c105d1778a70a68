"""`openimp embed`: writes the embeddings of files to a Parquet table."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openimp.common.errors import UserError, counted
from openimp.common.modality import BadMedia
from openimp.common.progress import console, track
from openimp.common.safe_files import replacing
from openimp.data.files import is_utf8
from openimp.encoding.items import require_pair
from openimp.inference.files import encode_chunks, file_text, find_files, shown_name
from openimp.inference.model import Model, load


@dataclass(frozen=True)
class Embedded:
    """The result of `embed`."""

    out: Path  # the table
    rows: dict[str, int]  # the number of embedded files by modality
    skipped: list[str]  # "path: reason" of each file that could not be read
    unknown: int  # the number of files in folders whose extension belongs to none of the model's modalities

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.rows.items())
        lines = [f"{self.out}: {counted(sum(self.rows.values()), 'embedding')} ({counts})"]
        if self.skipped:
            lines.append(f"{counted(len(self.skipped), 'file')} could not be read:")
            lines += [f"  {file}" for file in self.skipped]
        if self.unknown:
            lines.append(f"skipped {counted(self.unknown, 'file')} in folders: no modality reads such an extension")
        return "\n".join(lines)


def embed(
    run: str | Path,
    files: Iterable[str | Path],
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
        files: files, and folders to search.
        out: the table. An existing file is replaced.
        modality: the modality of all files. By default, the extension of each file decides.
        towards: see `Model.encode`.
        batch_size: number of clips or items per forward pass.
        progress: wraps an iterable to show its progress.
    """
    out, model = Path(out), load(run)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a Parquet file")
    found, unknown = find_files(files, model.modalities, modality, "; use --modality")
    targets = {name: towards or model.partner(name) for name in found}
    for name, other in targets.items():
        require_pair(model.imp, name, other, f"embed {name}")
    size = model.recipe.model.embed_dim
    columns = dict.fromkeys(("path", "modality", "towards"), pa.string()) | {"embedding": pa.list_(pa.float32(), size)}
    about = json.dumps({"model": str(run), "recipe": model.recipe.name})
    schema = pa.schema(columns, metadata={"openimp": about})
    rows = dict.fromkeys(found, 0)
    skipped: list[str] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as draft:
        with pq.ParquetWriter(draft, schema) as writer:
            for name, paths in found.items():
                read = partial(_read, model, name)
                shown = progress(paths, f"embed {name}")
                for chunk in encode_chunks(model, name, shown, read, targets[name], batch_size):
                    kept = {str(path): vector for path, vector in chunk if not isinstance(vector, BadMedia)}
                    skipped += [f"{shown_name(path)}: {why}" for path, why in chunk if isinstance(why, BadMedia)]
                    if kept:
                        column = pa.FixedSizeListArray.from_arrays(np.concatenate([*kept.values()]), size)
                        same = [[text] * len(kept) for text in (name, targets[name])]
                        writer.write_table(pa.table([pa.array(kept), *map(pa.array, same), column], schema=schema))
                        rows[name] += len(kept)
        if not sum(rows.values()):
            raise UserError(f"no file can be read; the first: {skipped[0]}")
    done = Embedded(out, rows, skipped, unknown)
    console.print(str(done), soft_wrap=True)
    return done


def _read(model: Model, name: str, path: Path) -> np.ndarray:
    if not is_utf8(str(path)):
        raise BadMedia("its name is not UTF-8, so the table cannot hold it")
    item = model.modalities[name]
    return item.encode_input(file_text(path).strip() if item.reads_text else path, model.views[name])
