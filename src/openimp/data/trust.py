"""Decides which sources commands such as `eval` may read because the recipe in a model's folder names them.

A recipe names files, and rows of those files end up in results and reports. A model made by somebody else could use
this to copy private files into a report, so its recipe may only name files in its own folder. A model that this user
trained may read all its sources. Training stores a hash of the model's config.json and recipe.yaml in openimp's cache
folder, which no other user can write to. The hash does not depend on the path, so a model may be moved, renamed and
copied.
"""

import hashlib
import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from openimp.common.cache import cache_folder
from openimp.common.errors import UserError
from openimp.common.names import is_bundled, is_url
from openimp.data.files import locate
from openimp.recipe.evaluation import Probe
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Source

KNOWN = "trained"
"""Folder in the cache. It holds one empty file per model that this user trained, named by its hash."""


def record_training(config: str, recipe: str) -> None:
    """Records that this user trains a model whose config.json and recipe.yaml have these texts."""
    with suppress(OSError, UserError):  # If it cannot be stored, `eval` only needs a flag.
        _record(config.encode(), recipe.encode()).touch()


def trained_here(folder: Path) -> bool:
    """Whether this user trained the model in `folder` on this machine."""
    files = [folder / "config.json", folder / "recipe.yaml"]
    with suppress(OSError, UserError):  # Without a private cache folder, no model is known.
        return _record(*(file.read_bytes() for file in files if file.exists())).exists()
    return False


def _record(*contents: bytes) -> Path:
    """The file for a model with these contents of config.json and recipe.yaml. An older model has only config.json."""
    return cache_folder(KNOWN) / hashlib.sha256(b"\0".join(contents)).hexdigest()


def check_sources(
    path: Path, folder: Path, recipe: Recipe, sets: Iterable[str], user_sources: Collection[str] = ()
) -> None:
    """Checks that `eval` and `report` may read the sources of evaluation sets; unknown sets are ignored.

    `user_sources` are the names of the sources that the user's own recipe defines, which may be anywhere. For the
    other arguments see `check_uses`.
    """
    used = []
    for name in sets:
        if name not in recipe.evaluation.sets:
            continue
        options = recipe.evaluation.sets[name]
        sources = [options.source, options.train] if isinstance(options, Probe) else [options.source]
        used += [(f"evaluation set {name}", source) for source in sources if source not in user_sources]
    check_uses(path, folder, recipe, used)


def check_uses(path: Path, folder: Path, recipe: Recipe, used: Iterable[tuple[str, str]]) -> None:
    """Checks that the sources of a model's recipe may be read.

    They may if this user trained the model on this machine. Otherwise each source must be bundled or inside `path`,
    the run or model folder that the user named. `folder` has the model's files. `recipe` is the model's recipe, or the
    user's recipe completed by it. `used` has (part of the recipe that reads a source, for the message; name of the
    source).
    """
    if trained_here(folder):
        return
    for user, name in used:
        if not _is_inside(path, name, recipe.sources[name]):
            origin = recipe.sources[name].path or recipe.sources[name].hub
            raise UserError(
                f"{path}: you did not train this model on this machine, or openimp's cache was deleted, and {user} of "
                f"its recipe reads source {name} ({origin}), which is outside of this folder; add --allow-sources if "
                "you trust the recipe"
            )


def _is_inside(folder: Path, name: str, source: Source) -> bool:
    """Whether a source is bundled, or all its files are inside `folder` after links are resolved."""
    if source.path is None or is_url(source.path):
        return False
    real_folder = os.path.realpath(folder)

    def is_inside(path: str) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(real_folder)

    if source.root is not None and not is_inside(source.root):
        return False
    if is_bundled(source.path):
        return True
    try:
        # Files are listed only if the path is inside, so that nothing outside of the folder is looked at.
        return is_inside(source.path) and all(map(is_inside, locate(name, source.path)[1]))
    except UserError:  # The files are missing, and only the sets that read them cannot be measured.
        return True
