"""Finds sources below paths: tables, shards of tables, and folders of media. Splits of one source are joined."""

import glob
import os
import re
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from openimp.common.errors import UserError, by_extension, printable
from openimp.common.folders import files_below, is_folder, subfolders, visible
from openimp.common.names import HUB, HubName, Name
from openimp.data.folders import CAPTION
from openimp.data.hub import quiet
from openimp.data.sources import FORMATS
from openimp.recipe.registry import modality_class

ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
"""The role of a split, by its name."""
ROLE = re.compile(rf"(?<![a-z])({'|'.join(ROLES)})(?![a-z])", re.IGNORECASE)
"""Matches the name of a split in the name of a file or folder, as in train2017 and images_val."""
KIND_OF = {extension: kind for kind in ("audio", "video", "image") for extension in modality_class(kind).extensions}
"""The kind of media that a file's extension stands for."""
TABLES = FORMATS.keys() - {".json"}
"""Extensions of tables that are looked for in folders, where most JSON files are something else."""


class Candidate(NamedTuple):
    """A source that may be trained on. Paths are relative to the current folder."""

    source: dict[str, Any]  # as in the recipe
    held_out: dict[str, Any] | None = None  # its validation or test split, if that is a source of its own
    kind: str = ""  # of the media in a folder
    left_out: str = ""  # other files of the folder: their numbers by extension
    problem: str = ""  # why it is not trained on, although others are
    folder: str = ""  # the folder that the user named, if it was found there

    @property
    def place(self) -> str:
        """The path, or the name on the hub, for messages."""
        return self.source.get("path") or f"hub:{self.source['hub']}"


def find(paths: list[str], tables: bool = True) -> list[Candidate]:
    """The sources below files, folders, patterns, `openimp:NAME` and `hub:OWNER/NAME`.

    Without `tables`, tables in folders are ignored.

    Raises:
        UserError: a folder has no media, or the hub cannot be read.
    """
    candidates = [candidate for path in paths for candidate in _below(path, tables)]
    joined = _join_splits([candidate for candidate in candidates if not candidate.problem])
    unusable = [candidate for candidate in candidates if candidate.problem]
    return sorted([*joined, *unusable], key=lambda candidate: bool(candidate.problem))


def _below(path: str, tables: bool) -> list[Candidate]:
    if not path:
        raise UserError("the path of the data is empty")
    scheme, rest = Name.parse(path)
    if scheme == HUB:
        return _hub_splits(rest)
    if os.path.isdir(path):
        return [candidate._replace(folder=path) for candidate in _in_folder(Path(path), tables)]
    if not (scheme or glob.has_magic(path) or os.path.exists(path)):
        raise UserError(f"{path}: no such file or folder")
    return [Candidate({"path": path})]


def _hub_splits(rest: str) -> list[Candidate]:
    from datasets import get_dataset_split_names

    parsed = HubName.parse(rest) or HubName(rest, None)  # Some data sets have no owner.
    revision = {"revision": parsed.revision} if parsed.revision else {}
    with quiet("data", rest):
        splits = get_dataset_split_names(parsed.repository, **revision)
    known = [split for split in splits if split.lower() in ROLES] or splits[:1]
    return [Candidate({"hub": parsed.repository, **revision, "split": split}) for split in known]


def _in_folder(folder: Path, tables: bool) -> list[Candidate]:
    """The tables in a folder and its subfolders. Without any, the media.

    A folder without tables is searched further if its subfolders are splits, or have only subfolders themselves.
    Subfolders beside splits are left out.
    """
    inner_folders = [folder / name for name in subfolders(folder)]
    entries = {inner: visible(inner) for inner in (folder, *inner_folders)}
    named_like_tables = (entry for inner in entries.values() for entry in inner if _extension(entry) in TABLES)
    files = [Path(entry.path) for entry in named_like_tables if not is_folder(entry)]
    if files and tables:
        return [Candidate({"path": path}) for path in _shards(files)]
    if splits := _splits(inner_folders):
        beside = "is beside folders of splits"
        unused = [Candidate({"path": str(other)}, problem=beside) for other in inner_folders if other not in splits]
        return [*_in_subfolders(splits, tables), *unused]
    have_files = any(not is_folder(entry) for inner in inner_folders for entry in entries[inner])
    are_splits = all(inner.name.lower() in ROLES for inner in inner_folders)
    if inner_folders and (not have_files or are_splits):
        return _in_subfolders(inner_folders, tables)
    return _media(folder, inner_folders)


def _splits(folders: list[Path]) -> list[Path]:
    """Folders with equal names except for the split, such as train2017 and val2017. A single folder may be a class."""
    names = Counter(ROLE.sub("*", folder.name.lower()) for folder in folders if ROLE.search(folder.name))
    return [folder for folder in folders if names[ROLE.sub("*", folder.name.lower())] > 1]


def _in_subfolders(folders: list[Path], tables: bool) -> list[Candidate]:
    """The candidates in all folders. A folder without media gives a candidate with a `problem`; if no folder has media,
    that is a UserError."""
    candidates = []
    errors = []
    for folder in folders:
        try:
            candidates += _in_folder(folder, tables)
        except UserError as error:
            errors.append(error)
            candidates.append(Candidate({"path": str(folder)}, problem=str(error).removeprefix(f"{folder}: ")))
    if len(errors) == len(folders):
        raise errors[0]
    return candidates


def _media(folder: Path, classes: list[Path]) -> list[Candidate]:
    """The media in a folder, or in its subfolders if it has any: a source for each kind."""
    extensions = Counter(_extension(entry) for inner in classes or [folder] for entry in files_below(inner))
    left_out = Counter(_extension(entry) for entry in visible(folder) if classes and not is_folder(entry))
    left_out.update({ending: n for ending, n in extensions.items() if ending not in {*KIND_OF, CAPTION}})
    candidates = []
    for kind in dict.fromkeys(KIND_OF.values()):
        endings = sorted(ending for ending in extensions if KIND_OF.get(ending) == kind)
        # Other files, also captions, make `where` necessary.
        where = {"where": {"extension": [ending[1:] for ending in endings]}} if len(endings) < len(extensions) else {}
        if endings:
            candidates.append(Candidate({"path": str(folder), **where}, kind=kind))
    if not candidates:
        has = by_extension(left_out)
        advice = "; write a data set of `datasets` as Parquet, with to_parquet" if left_out[".arrow"] else ""
        raise UserError(
            f"{folder}: no media in this folder{has and f', only {has}'}; looked for pictures, clips and sounds "
            f"({', '.join(sorted(KIND_OF))}) and for data files ({', '.join(sorted(TABLES))}){advice}"
        )
    advice = "; if a .json file is a table of files and texts, name the file" if left_out[".json"] else ""
    return [candidates[0]._replace(left_out=by_extension(left_out) + advice), *candidates[1:]]


def _extension(entry: os.DirEntry[str]) -> str:
    return os.path.splitext(entry.name)[1].lower()


def _shards(tables: list[Path]) -> list[str]:
    """The tables, where those whose names differ only in numbers are one pattern."""

    def pattern_of(table: Path) -> str:
        return str(table.with_name(re.sub(r"\d+", "*", table.name)))

    paths = []
    for pattern, group in groupby(sorted(tables, key=pattern_of), key=pattern_of):
        shards = sorted(map(str, group))
        is_pattern = len(shards) > 1 and sorted(glob.glob(pattern.replace("[", "[[]"))) == shards
        paths += [pattern] if is_pattern else shards
    return paths


def _join_splits(candidates: list[Candidate]) -> list[Candidate]:
    """Joins the splits of a source. If it has both, the validation split is held out, so that the test stays unseen."""
    groups: dict[str, dict[str, list[Candidate]]] = {}  # by what the splits have in common, and by role
    for candidate in candidates:
        key, role = _without_role(candidate)
        groups.setdefault(key, {}).setdefault(role, []).append(candidate)
    folders_with_training = {split.folder for by_role in groups.values() for split in by_role.get("train", [])}
    joined = []
    for by_role in groups.values():
        training = by_role.get("train", [])
        held_out = [*by_role.get("val", []), *by_role.get("test", [])]
        if len(training) == 1 and held_out and "" not in by_role:
            joined.append(training[0]._replace(held_out=held_out[0].source))
            for candidate in held_out[1:]:
                split = f"split {candidate.source['split']} " if "hub" in candidate.source else ""
                joined.append(candidate._replace(problem=f"{split}is left for a last test"))
            continue
        problem = f"{len(training) or 'no'} training splits have a matching name"
        joined += [*training, *by_role.get("", [])]
        for candidate in held_out:
            is_left_out = candidate.folder in folders_with_training and _is_named_like_a_split(candidate)
            joined.append(candidate._replace(problem=problem) if is_left_out else candidate)
    folders_of_splits = {_folder_of_table(candidate) for candidate in joined if candidate.held_out} - {None}
    return [
        candidate._replace(problem="is beside the tables of a split")  # So it may have the same rows.
        if _folder_of_table(candidate) in folders_of_splits and not (candidate.held_out or candidate.problem)
        else candidate
        for candidate in joined
    ]


def _is_named_like_a_split(candidate: Candidate) -> bool:
    """Whether a source in a folder has the name of a split. That of the folder itself does not count."""
    return bool(candidate.folder and ROLE.search(os.path.relpath(candidate.place, candidate.folder)))


def _folder_of_table(candidate: Candidate) -> str | None:
    """The folder in which openimp found a table. None for media, and for a table that the user named."""
    return os.path.dirname(candidate.place) if candidate.folder and not candidate.kind else None


def _without_role(candidate: Candidate) -> tuple[str, str]:
    """What all splits of a source have in common, and the role of this split.

    The role is in the name of the file or folder, or else in the name of its parent folder.
    """
    if "hub" in candidate.source:
        return candidate.place, ROLES.get(candidate.source["split"].lower(), "")
    around, name = os.path.split(candidate.place)
    above, parent = os.path.split(around)
    matches = [*ROLE.finditer(name)] or [*ROLE.finditer(parent)]
    if not matches:
        return f"{candidate.place} {candidate.kind}", ""
    common = re.sub(r"\d+", "*", f"{ROLE.sub('*', parent)}/{ROLE.sub('*', name)}")
    common = re.sub(r"\*([-_.](of[-_.])?\*)+", "*", common)  # Of shards, as in train_1.csv beside test.csv.
    return f"{above}/{common} {candidate.kind}", ROLES[matches[-1][0].lower()]


def shown(name: object, limit: int = 80) -> str:
    """A name from the data in a message or comment: one line of printable characters, at most `limit` of them."""
    text = printable(" ".join(str(name).split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."
