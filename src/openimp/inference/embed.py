"""`openimp embed`: files to a Parquet table of vectors."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openimp.common.errors import UserError, nearest
from openimp.common.modality import BadMedia, Modality
from openimp.common.progress import console, track
from openimp.common.safe_files import read_text, replacing
from openimp.data.files import is_utf8
from openimp.encoding.items import ahead, require_pair
from openimp.encoding.items import embed as embed_items
from openimp.inference.model import Model, load

CHUNK = 512
"""Files whose vectors are held before they are written."""


@dataclass(frozen=True)
class Embedded:
    """What `embed` did.

    Attributes:
        out: the table.
        rows: by modality, how many files it holds.
        skipped: "path: reason" of each file that could not be read.
        unknown: files in folders that are none of the model's, by their extension.
    """

    out: Path
    rows: dict[str, int]
    skipped: list[str]
    unknown: int

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.rows.items())
        lines = [f"{self.out}: {sum(self.rows.values())} vectors ({counts})"]
        if self.skipped:
            lines += [f"{len(self.skipped)} files could not be read:", *(f"  {file}" for file in self.skipped)]
        if self.unknown:
            lines += [f"{self.unknown} files in folders are none of the model's, by their extension"]
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
    """Embeds files, writes their unit vectors to a Parquet table, whole or not at all, and prints what was done.

    The columns: `path` as it was given, or as found in a folder; `modality`; `towards`, the other modality of the space
    (of a model with disjoint spaces, only vectors of the same pair can be compared); `embedding`, a list of Z fp32.
    Rows come modality after modality. A text file is one text, in UTF-8.

    Args:
        run: a run, a model folder or a hub name, as `openimp.load` takes it.
        files: files, and folders that are searched.
        out: the table; one that is there already is replaced.
        modality: what all files are; left out: told by each file's extension.
        towards: see `Model.encode`.
        batch_size: clips or items that are encoded at once.
        progress: wraps an iterable to show its progress.

    Raises:
        UserError: there is nothing to embed, or none of it can be read; a file whose modality is not known; a modality
            that the model does not have.
    """
    out, model = Path(out), load(run)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; expected the name of a Parquet file")
    found, unknown = _find(files, model.modalities, modality)
    partner = {name: towards or model.partner(name) for name in found}
    for name, other in partner.items():
        require_pair(model.imp, name, other, f"embed {name}")
    size = model.recipe.model.embed_dim
    schema = pa.schema(
        {
            "path": pa.string(),
            "modality": pa.string(),
            "towards": pa.string(),
            "embedding": pa.list_(pa.float32(), size),
        },
        metadata={"openimp": json.dumps({"model": str(run), "recipe": model.recipe.name})},
    )
    rows = dict.fromkeys(found, 0)
    skipped: list[str] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as draft:
        with pq.ParquetWriter(draft, schema) as writer:
            for name, paths in found.items():
                shown = progress(paths, f"embed {name}")
                for kept, vectors in _encode(model, name, shown, partner[name], batch_size, skipped):
                    column = pa.FixedSizeListArray.from_arrays(vectors.ravel(), size)
                    same = [[text] * len(kept) for text in (name, partner[name])]
                    writer.write_table(pa.table([pa.array(kept), *map(pa.array, same), column], schema=schema))
                    rows[name] += len(kept)
        if not sum(rows.values()):
            raise UserError(f"none of the {len(skipped)} files can be read; the first: {skipped[0]}")
    done = Embedded(out, rows, skipped, unknown)
    console.print(str(done), soft_wrap=True)
    return done


def _encode(
    model: Model, name: str, paths: Iterable[Path], towards: str, batch_size: int, skipped: list[str]
) -> Iterator[tuple[list[str], np.ndarray]]:
    """The readable files of one modality and their vectors (N, Z), part by part; adds the others to `skipped`."""
    item, view = model.modalities[name], model.views[name]
    kept: list[str] = []

    def read(path: Path) -> tuple[Path, np.ndarray | BadMedia]:
        try:
            if not is_utf8(str(path)):
                raise BadMedia("its name is not UTF-8, as the table's paths are")
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


def _find(
    files: Iterable[str | Path], modalities: dict[str, Modality], only: str | None
) -> tuple[dict[str, list[Path]], int]:
    """The files by modality, and how many in folders are of none.

    Where two modalities have an extension in common, the model's first one has it.
    """
    if only is not None and only not in modalities:
        raise UserError(f"the model has no modality {only!r}{nearest(only, modalities)}")
    wanted = [only] if only else list(modalities)
    kind = {ending: name for name in reversed(wanted) for ending in modalities[name].extensions}
    found: dict[str, list[Path]] = {}
    unknown, names = 0, [Path(file) for file in files]
    for path in names:
        if path.is_dir():
            for inner in sorted(p for p in path.rglob("*") if p.is_file()):
                name = kind.get(inner.suffix.lower())
                unknown += name is None
                if name:
                    found.setdefault(name, []).append(inner)
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        else:
            name = only or kind.get(path.suffix.lower())
            if name is None:
                raise UserError(
                    f"{path}: is it {' or '.join(modalities)}? Its extension does not tell; name it with --modality"
                )
            found.setdefault(name, []).append(path)
    if not found:
        raise UserError(f"nothing to embed in {', '.join(map(str, names)) or 'no files'}; looked for {', '.join(kind)}")
    return {name: list(dict.fromkeys(paths)) for name, paths in found.items()}, unknown


def _text(path: Path) -> str:
    try:
        return read_text(path).strip()
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise BadMedia(f"no UTF-8 text: {error}") from None
