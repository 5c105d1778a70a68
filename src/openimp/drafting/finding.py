"""Finds sources below paths: data files, shards that belong together, and folders of media."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from openimp.common.errors import UserError, by_extension, printable
from openimp.common.folders import files_below, subfolders, visible
from openimp.data.folders import CAPTION
from openimp.data.sources import FORMATS
from openimp.recipe.registry import modality_class

ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
"""The role of a split, by its name."""
ROLE = re.compile(rf"(?<![a-z0-9])({'|'.join(ROLES)})(?![a-z0-9])", re.IGNORECASE)
MAX_DEPTH = 4
"""Levels of folders that are searched for data files."""
SAMPLED_FILES = 1000
"""Files of a folder whose extensions decide which kinds of media it holds."""
KIND_OF = {extension: kind for kind in ("audio", "video", "image") for extension in modality_class(kind).extensions}
"""The kind of media that a file's extension stands for."""


@dataclass(frozen=True)
class Candidate:
    """A source that may be trained on."""

    source: dict[str, Any]  # as in the recipe; its paths are relative to the current folder
    held_out: dict[str, Any] | None = None  # the source of its test split, if that has a path of its own
    beside_data_files: bool = False  # a folder beside data files, which may list its files
    below: str = ""  # the folder named by the user that contains it; "" if the user named the source itself

    @property
    def place(self) -> str:
        """The path or the name on the hub, for messages."""
        return self.source.get("path") or f"hub:{self.source['hub']}"


def find(paths: list[str]) -> list[Candidate]:
    """The sources below files, folders, patterns, `openimp:NAME` and `hub:OWNER/NAME`."""
    return _with_test_splits([candidate for path in paths for candidate in _below(path)])


def _below(path: str) -> list[Candidate]:
    if path.startswith("hub:"):
        return [Candidate({"hub": path.removeprefix("hub:")})]
    if os.path.isdir(path):
        found = _in_folder(Path(path), MAX_DEPTH)
        if not found:
            has = by_extension(unknown_files(Path(path)))
            raise UserError(
                f"{path}: no media in this folder{has and f', only {has}'}; looked for pictures, clips and sounds "
                f"({', '.join(sorted(KIND_OF))}) and for data files ({', '.join(FORMATS)})"
            )
        return [replace(candidate, below=path) for candidate in found]
    if os.path.isfile(path) and Path(path).suffix.lower() not in FORMATS:
        raise UserError(f"{path}: expected a folder or a data file ({', '.join(FORMATS)})")
    return [Candidate({"path": path})]  # Whoever opens it checks it.


def _in_folder(folder: Path, depth: int) -> list[Candidate]:
    data_files = [folder / name for name in _data_files(folder)]
    inner_folders = [folder / name for name in subfolders(folder)]
    nested = [inner for inner in inner_folders if depth and _has_data_files(inner, depth)]
    if not data_files and not nested:
        return _media_folders(folder)
    found = [Candidate({"path": path}) for path in _shards(data_files)]
    found += [candidate for inner in nested for candidate in _in_folder(inner, depth - 1)]
    plain = [inner for inner in inner_folders if inner not in nested]
    # Beside a table, subfolders without subfolders are the classes of one source, as they are without a table.
    are_classes = not nested and len(plain) > 1 and not any(map(subfolders, plain))
    folders = [folder] if are_classes or not inner_folders else plain  # Without subfolders, its files may be media.
    media = [candidate for inner in folders for candidate in _media_folders(inner)]
    return found + [replace(candidate, beside_data_files=True) for candidate in media]


def _data_files(folder: Path) -> list[str]:
    return [entry.name for entry in visible(folder) if _extension(entry) in FORMATS and entry.is_file()]


def _has_data_files(folder: Path, depth: int) -> bool:
    inner = subfolders(folder) if depth else []
    return bool(_data_files(folder)) or any(_has_data_files(folder / name, depth - 1) for name in inner)


def _shards(files: list[Path]) -> list[str]:
    """The files, where those whose names differ only in numbers are one pattern."""
    found = []
    for pattern, group in groupby(sorted(files, key=_pattern), key=_pattern):
        members = [str(file) for file in group]
        together = len(members) > 1 and sorted(glob.glob(pattern)) == sorted(members)
        found += [pattern] if together else members
    return found


def _pattern(file: Path) -> str:
    return str(file.with_name(re.sub(r"\d+", "*", file.name)))


def _media_folders(folder: Path) -> list[Candidate]:
    """A folder of media as one source, or as several if its subfolders are splits or hold different kinds of media."""
    own = _kinds(entry for entry in visible(folder) if not entry.is_dir())
    inner = {folder / name: _kinds(files_below(folder / name)) for name in subfolders(folder)}
    inner = {sub: kinds for sub, kinds in inner.items() if kinds}
    if not inner:
        return [Candidate({"path": str(folder)})] if own else []
    splits = all(sub.name.lower() in ROLES for sub in inner)
    one_kind_each = (
        len(inner) > 1 and all(len(kinds) == 1 for kinds in inner.values()) and len(set().union(*inner.values())) > 1
    )
    # A folder in the only subfolder is a class, unless it has no subfolders: then that subfolder is one.
    wraps = len(inner) == 1 and not own and bool(subfolders(next(iter(inner))))
    if splits or one_kind_each or wraps:
        return [candidate for sub in inner for candidate in _media_folders(sub)]
    return [Candidate({"path": str(folder)})]


def unknown_files(folder: Path) -> Counter[str]:
    """The number of files below a folder that are neither media nor captions nor data files, by extension."""
    files = [(os.path.splitext(entry.path)[0], _extension(entry)) for entry in files_below(folder)]
    media = {stem for stem, ending in files if ending in KIND_OF}
    unknown = [(stem, ending) for stem, ending in files if ending not in KIND_OF and ending not in FORMATS]
    return Counter(ending for stem, ending in unknown if ending != CAPTION or stem not in media)


def _kinds(files: Iterable[os.DirEntry[str]]) -> set[str]:
    extensions = {_extension(file) for file in islice(files, SAMPLED_FILES)}
    return {KIND_OF[extension] for extension in extensions if extension in KIND_OF}


def _extension(entry: os.DirEntry[str]) -> str:
    return os.path.splitext(entry.name)[1].lower()


def _with_test_splits(found: list[Candidate]) -> list[Candidate]:
    """Joins sources whose paths differ only in the name of a split, such as `train.csv` and `test.csv`.

    If there are both, the validation split is evaluated, so that the test split stays unseen.
    """
    groups: dict[tuple[str, ...], list[tuple[str, Candidate]]] = {}
    for number, candidate in enumerate(found):
        key, role = _without_role(Path(candidate.source.get("path", ""))) or ((str(number),), "")
        groups.setdefault(key, []).append((role, candidate))
    kept = []
    for group in groups.values():
        by_role = dict(group)
        held_out = by_role.get("val") or by_role.get("test")
        if "train" in by_role and held_out and len(by_role) == len(group):
            kept.append(replace(by_role["train"], held_out=held_out.source))
        else:
            kept += [candidate for _, candidate in group]
    return kept


def _without_role(path: Path) -> tuple[tuple[str, ...], str] | None:
    """A path without the split that its last part or its folder names, and that split; None if neither names one."""
    for i in (1, 2):
        name = path.parts[-i] if len(path.parts) >= i else ""
        roles = ROLE.findall(name)
        if len(roles) == 1:
            rest = (*path.parts[:-i], _any(name), *map(_any, path.parts[len(path.parts) - i + 1 :]))
            return rest, ROLES[roles[0].lower()]
    return None


def _any(name: str) -> str:
    """A name without its split and the numbers of its shards."""
    return re.sub(r"\d+", "*", ROLE.sub("*", name))


def shown(name: object, limit: int = 80) -> str:
    """A name from the data in a message or comment: one line of printable characters, at most `limit` of them."""
    text = printable(" ".join(str(name).split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."
