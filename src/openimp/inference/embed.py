"""`openimp embed`: writes the embeddings of files to a Parquet table."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openimp.common.errors import UserError, counted, nearest
from openimp.common.modality import BadMedia, Modalities
from openimp.common.progress import console, track
from openimp.common.safe_files import read_text, replacing
from openimp.data.files import is_utf8
from openimp.encoding.items import ahead, require_pair
from openimp.encoding.items import embed as embed_items
from openimp.inference.model import Model, load

CHUNK = 512
"""Number of files whose embeddings are written together."""


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
    found, unknown = _find(files, model.modalities, modality)
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
                shown = progress(paths, f"embed {name}")
                for kept, vectors in _encode(model, name, shown, targets[name], batch_size, skipped):
                    column = pa.FixedSizeListArray.from_arrays(vectors.ravel(), size)
                    same = [[text] * len(kept) for text in (name, targets[name])]
                    writer.write_table(pa.table([pa.array(kept), *map(pa.array, same), column], schema=schema))
                    rows[name] += len(kept)
        if not sum(rows.values()):
            raise UserError(f"no file can be read; the first: {skipped[0]}")
    done = Embedded(out, rows, skipped, unknown)
    console.print(str(done), soft_wrap=True)
    return done


def _encode(
    model: Model, name: str, paths: Iterable[Path], towards: str, batch_size: int, skipped: list[str]
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yields readable files of one modality and their embeddings (N, Z) in chunks; adds other files to `skipped`."""
    item, view = model.modalities[name], model.views[name]
    kept: list[str] = []

    def read(path: Path) -> tuple[Path, np.ndarray | BadMedia]:
        try:
            if not is_utf8(str(path)):
                raise BadMedia("its name is not UTF-8, so the table cannot hold it")
            return path, item.encode_input(_text(path) if item.reads_text else path, view)
        except BadMedia as error:
            return path, error

    def readable() -> Iterator[np.ndarray]:
        for path, found in ahead(read, paths):
            if isinstance(found, BadMedia):
                skipped.append(f"{str(path).encode(errors='backslashreplace').decode()}: {found}")
            else:
                kept.append(str(path))
                yield found

    items = readable()
    while True:
        vectors = embed_items(model.imp, item, view, islice(items, CHUNK), towards, batch_size, model.precision)
        if not len(vectors):
            return
        yield kept.copy(), vectors.cpu().numpy()
        kept.clear()


def _find(files: Iterable[str | Path], modalities: Modalities, only: str | None) -> tuple[dict[str, list[Path]], int]:
    """Returns the files by modality, and the number of files in folders that belong to none.

    If two modalities share an extension, it belongs to the model's first one.
    """
    if only is not None and only not in modalities:
        raise UserError(f"the model has no modality {only!r}{nearest(only, modalities)}")
    wanted = [only] if only else list(modalities)
    modality_of = {extension: name for name in reversed(wanted) for extension in modalities[name].extensions}
    found: dict[str, list[Path]] = {}
    unknown, given = 0, [Path(file) for file in files]
    for path in given:
        if path.is_dir():
            for inner in sorted(p for p in path.rglob("*") if p.is_file()):
                name = modality_of.get(inner.suffix.lower())
                unknown += name is None
                if name:
                    found.setdefault(name, []).append(inner)
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        else:
            name = only or modality_of.get(path.suffix.lower())
            if name is None:
                kinds = " or ".join(modalities)
                raise UserError(f"{path}: its extension does not say whether it is {kinds}; use --modality")
            found.setdefault(name, []).append(path)
    if not found:
        where = ", ".join(map(str, given)) or "an empty list"
        raise UserError(f"no files to embed in {where}; looked for {', '.join(modality_of)}")
    return {name: list(dict.fromkeys(paths)) for name, paths in found.items()}, unknown


def _text(path: Path) -> str:
    try:
        return read_text(path).strip()
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise BadMedia(f"no UTF-8 text: {error}") from None
