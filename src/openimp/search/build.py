"""`openimp index`: brings an index up to date with folders, or with the media of a run's recipe."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

from openimp.checkpoint.find import model_name
from openimp.common.errors import UserError, counted, escaped
from openimp.common.modality import Modalities
from openimp.common.names import PUBLIC, Name, absolute_name, has_scheme, is_bundled, is_url
from openimp.common.progress import Progress, console, notice, track
from openimp.common.safe_files import write_text
from openimp.data.trust import check_uses
from openimp.encoding.find import find_model
from openimp.inference.files import find_files, left_out
from openimp.inference.model import Model, load
from openimp.search.folder import (
    FORMAT,
    METADATA,
    Metadata,
    built_with,
    fingerprint,
    locked,
    own_index,
    read_metadata,
)
from openimp.search.index import Index
from openimp.search.media import Media, media_of_files, media_of_recipe
from openimp.search.media_folders import record_folders, recorded_folders
from openimp.search.table import ITEMS, Items, Stored, import_lancedb
from openimp.search.update import Update

BATCH_SIZE = 64
"""Default of the maximum number of clips per forward pass."""
FILE_COUNTS = ("new", "changed", "moved", "unchanged", "removed")
"""The fields of `IndexResult` that count files."""


@dataclass(frozen=True)
class IndexResult:
    """The result of `build_index`. Except for `items`, numbers count files, or rows of a source."""

    folder: Path  # the index
    new: int
    changed: int  # also files with nothing changed but the caption
    moved: int  # found by their hash, and not embedded again
    unchanged: int
    removed: int  # with those that cannot be read any more
    skipped: dict[str, str]  # by path, the reason why a file, or a part of it, could not be read in this call
    unknown: dict[str, int]  # by extension, the number of files that no modality of the model reads
    items: int  # all items that the index now holds: pictures, segments, lines, ...
    approximate: bool  # whether a query is compared with a part of the vectors only
    model: Model = field(repr=False)  # that embedded the items
    metadata: Metadata = field(repr=False)

    def __str__(self) -> str:
        files = ", ".join(f"{getattr(self, kind):,} {kind}" for kind in FILE_COUNTS if getattr(self, kind))
        kind_of_search = "approximate" if self.approximate else "exact"
        items = counted(self.items, "item")
        summary = f"{escaped(self.folder)}: {items}, {kind_of_search} search; files: {files or 'none'}"
        skipped = [f"{path}: {reason}" for path, reason in self.skipped.items()]
        return "\n".join([summary, *left_out(skipped, self.unknown)])


def build_index(
    model: str | Path,
    paths: str | Path | Iterable[str | Path] | None = None,
    out: str | Path | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress = track,
    allow_sources: bool = False,
    forget: str | Path | Iterable[str | Path] = (),
) -> IndexResult:
    """Embeds media into an index, or updates an index, and prints a summary. Also named `openimp.index`.

    Only new and changed files are embedded. Files that were moved are recognized by their hash. Each call tries again
    to read files that could not be read. Items are removed if their file is gone from `paths`; items of other folders
    stay, and so do all items of a folder that has no files any more, because its disk may not be mounted. If a call is
    interrupted, the next call continues.

    Args:
        model: a run, a model folder, `openimp:base` or a model on the Hugging Face Hub, as `openimp.load` takes it.
        paths: a file or folder, or several. None: the media of all sources of the model's recipe; an index that was
            built with other weights is then replaced.
        out: the index, a folder. Default: `search.index` in the run `model`; for `openimp:base` without `paths`, a
            folder in openimp's cache.
        batch_size: maximum number of clips per forward pass; a picture or a text is one clip.
        progress: `progress(iterable, description)` wraps an iterable to show its progress.
        allow_sources: whether the recipe of a model that was not trained here may read any source.
        forget: files and folders whose items are removed from the index.

    Raises:
        UserError: there are no media, the index was built with other weights, options or views, or another process
            writes it.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    forget = [forget] if isinstance(forget, str | Path) else list(forget)
    if forget and paths is None:
        paths = ()
    import_lancedb()  # Fails before the model is loaded and a folder is made.
    name = model_name(model)
    if paths is None and Name.parse(name).scheme in PUBLIC:
        raise UserError(f"{name}: comes without media; name files or folders, and the index with --out")
    roots = None if paths is None else [_on_disk(path) for path in paths]
    forgotten = [Path(os.path.expanduser(path)) for path in forget]
    _refuse_forgetting_what_is_indexed(forgotten, roots or [])
    folder = Path(os.path.expanduser(out)) if out else _default_folder(name, has_paths=paths is not None)
    is_index = read_metadata(folder) is not None
    if forgotten and not is_index:
        raise UserError(f"--forget: {folder} is not an index")

    opened = load(name)
    modalities = _searchable_modalities(name, opened)
    unknown: dict[str, int] = {}
    if roots is None:
        media = _recipe_media(name, opened, modalities, allow_sources)
    else:
        media, unknown = _media_on_disk(roots, modalities, is_index)
    metadata = Metadata(
        format=FORMAT,
        model=absolute_name(name, "."),
        fingerprint=fingerprint(opened),
        towards={modality: opened.partner(modality) for modality in modalities},
    )
    with locked(folder):
        metadata = _write_metadata(folder, metadata, opened, replace=roots is None)
        media_folders = {medium.root for medium in media if medium.root} if roots is None else roots
        record_folders(metadata.id, media_folders, forgotten)
        items = Items(folder, opened.imp.config.embed_dim)
        update = Update(opened, items, media, roots, forgotten)
        _check_items_of_roots(update, forgotten)
        _run(update, metadata.towards, folder, batch_size, progress)
        if not items.table.count_rows() and not forgotten:
            path, reason = next(iter(update.skipped.items()), ("nothing", "there are no media"))
            raise UserError(f"no file can be read; the first: {escaped(path)}: {reason}")
        items.compact()
        result = IndexResult(
            folder,
            **{kind: update.counts[kind] for kind in FILE_COUNTS},
            skipped=update.skipped,
            unknown=unknown,
            items=items.table.count_rows(),
            approximate=items.approximate,
            model=opened,
            metadata=metadata,
        )
    console.print(str(result), soft_wrap=True)
    return result


def build_and_open(run: str | Path, allow_sources: bool, media: Iterable[str | Path] = ()) -> Index:
    """Brings the index of a run's media up to date, and opens it.

    Unlike `open_index`, it keeps the model that embedded the items: a run that is still being trained may have saved
    other weights meanwhile.
    """
    result = build_index(run, allow_sources=allow_sources)
    return Index(result.folder, result.model, result.metadata, allow_sources, media)


def _on_disk(path: str | Path) -> Path:
    if is_url(str(path)):
        raise UserError(f"{path}: only files on disk are indexed; copy or mount them")
    if has_scheme(path) and not os.path.exists(path):
        raise UserError(f"{path}: is no file or folder; name the model first, then files and folders")
    return Path(os.path.expanduser(path))


def _default_folder(model: str, has_paths: bool) -> Path:
    folder = own_index(model)
    if folder is None and not has_scheme(model):
        find_model(model)  # There may be none.
    # A cache may be emptied, so it holds nothing of the user's.
    if folder is None or (has_paths and is_bundled(model)):
        raise UserError(f"{model}: is not a run; name the index with --out")
    return folder


def _refuse_forgetting_what_is_indexed(forgotten: list[Path], roots: list[Path]) -> None:
    for root in forgotten:
        if root.exists() and any(root.resolve().is_relative_to(other.resolve()) for other in roots):
            raise UserError(f"--forget {root}: is among the files that are indexed; name it without them")


def _searchable_modalities(name: str, model: Model) -> Modalities:
    """The modalities that share a space with themselves or with another one."""
    modalities = {
        modality_name: modality
        for modality_name, modality in model.modalities.items()
        if any(model.imp.share_a_space(modality_name, other) for other in model.modalities)
    }
    if not modalities:
        raise UserError(
            f"{name}: no task compares two modalities, so there is nothing to search by; see openimp classify"
        )
    return modalities


def _recipe_media(name: str, model: Model, modalities: Modalities, allow_sources: bool) -> list[Media]:
    """The media in the sources of the model's recipe."""
    recipe = model.recipe
    if not allow_sources:
        used = [(f"task {task}", options.source) for task, options in recipe.tasks.items()]
        used += [(f"evaluation set {title}", options.source) for title, options in recipe.evaluation.sets.items()]
        check_uses(Path(name), find_model(name), recipe, used)
    media = list(media_of_recipe(recipe, modalities))
    if not media:
        raise UserError(
            f"{name}: the recipe's sources have no media that can be indexed, and streams are skipped; name files or "
            "folders"
        )
    return media


def _media_on_disk(roots: list[Path], modalities: Modalities, is_index: bool) -> tuple[list[Media], dict[str, int]]:
    """The media in files and folders, and by extension, the number of files that no modality reads."""
    # An index may still have items of files and folders that are gone.
    present = [root for root in roots if root.exists() or not is_index]
    files_by_modality, unknown = find_files(present, modalities, required=not is_index)
    return list(media_of_files(files_by_modality, roots, modalities)), unknown


def _run(update: Update, towards: dict[str, str], folder: Path, batch_size: int, progress: Progress) -> None:
    """Runs an update, and says what the index holds if Ctrl-C stops it."""
    try:
        update.run(towards, batch_size, progress)
    except KeyboardInterrupt:
        item_count = counted(update.items.table.count_rows(), "item")
        console.print(f"stopped: {folder} holds {item_count} so far; the same command does the rest", soft_wrap=True)
        raise


def _check_items_of_roots(update: Update, forgotten: list[Path]) -> None:
    """Refuses paths without files and items, and tells of folders without files."""
    for root in update.unknown:
        if not root.exists():
            raise UserError(f"{root}: no such file or folder")
        if root.is_dir():
            notice(f"{root}: has no files that can be indexed")
    for root in forgotten:
        if not update.has_items_in(root):
            raise UserError(f"--forget {root}: the index has no items of it")
    for root, count in update.absent.items():
        lack = "has no files now" if root.is_dir() else "is gone"
        notice(
            f"{root}: {lack}, and its disk may not be mounted, so what the index has of its "
            f"{counted(count, 'file')} is kept; --forget {root} removes it"
        )


def _write_metadata(folder: Path, metadata: Metadata, model: Model, replace: bool) -> Metadata:
    """Writes index.json, and returns its content: `metadata` with an id.

    Refuses, or with `replace` empties, an index that was built with other weights.
    """
    old_metadata = read_metadata(folder)
    if old_metadata is not None and not built_with(old_metadata, model):
        if not replace:
            raise UserError(
                f"{folder}: was built with other weights, options or views than {metadata.model} has; name a new folder"
            )
        old_files: Iterable[Stored] = ()
        with suppress(UserError):  # A damaged index is replaced, too.
            old_files = Items(folder, model.imp.config.embed_dim).stored().values()
        if count := sum(file.source is None for file in old_files):
            notice(f"{folder}: {counted(count, 'file')} of folders had other weights; index these folders again")
        import_lancedb().connect(folder).drop_table(ITEMS, ignore_missing=True)
    # An id without a record is somebody else's.
    is_own = old_metadata is not None and recorded_folders(old_metadata.id)
    metadata = metadata.model_copy(update={"id": old_metadata.id if old_metadata and is_own else token_hex(16)})
    write_text(folder / METADATA, metadata.model_dump_json(indent=1))
    return metadata
