"""Whose recipe a model's folder holds, and which sources `eval` and `report` may read because it names them.

A recipe names files, and rows of them end up in results and reports. The recipes of models that this user trained are
known by a digest of their configuration in openimp's cache folder, which nobody else can write to; so these models may
be moved, renamed and copied. Any other model could have been made to have private files read.
"""

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from openimp.data.files import is_url, locate
from openimp.errors import UserError
from openimp.recipe import Probe, Recipe, Source
from openimp.safe_files import cache_folder

KNOWN = "trained"
"""The cache's folder with an empty file for each configuration that this user trained, named by its digest."""


def remember(config: str) -> None:
    """Notes that this user trains a model with this configuration, the text of its config.json."""
    with suppress(OSError, UserError):  # Without it `eval` needs a flag, for which no training should fail.
        (cache_folder(KNOWN) / hashlib.sha256(config.encode()).hexdigest()).touch()


def check_sources(path: Path, folder: Path, recipe: Recipe, sets: Iterable[str]) -> None:
    """Checks that evaluation sets of a model's own recipe may be measured.

    Args:
        path: what the user named: a run, or a model's folder. A source in it may be read.
        folder: with the model's config.json.
        recipe: which that holds.
        sets: names of its evaluation sets; unknown ones are left to others.

    Raises:
        UserError: one reads a source that is neither in `path` nor bundled, and the model is none that this user
            trained on this machine.
    """
    if (cache_folder(KNOWN) / hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()).exists():
        return
    for options in (recipe.evaluation.sets[name] for name in sets if name in recipe.evaluation.sets):
        for name in [options.source, *([options.train] if isinstance(options, Probe) else [])]:
            if not _is_inside(path, name, recipe.sources[name]):
                where = recipe.sources[name].path or recipe.sources[name].hub
                raise UserError(
                    f"{path}: its recipe reads source {name} ({where}), which is outside of it, and was not trained by "
                    "you on this machine; add --allow-sources if you trust it"
                )


def _is_inside(folder: Path, name: str, source: Source) -> bool:
    """Whether a source is bundled, or all its files are in a folder, links resolved."""
    if source.path is None or is_url(source.path):
        return False
    bundled = source.path.startswith("openimp:")
    named = [place for place in (None if bundled else source.path, source.root) if place is not None]
    real = Path(os.path.realpath(folder))
    inside = all(Path(os.path.realpath(place)).is_relative_to(real) for place in named)
    # Only then are they looked for: what is elsewhere is nothing that the answer should depend on.
    files = locate(name, source.path)[1] if inside and not bundled else []
    return inside and all(Path(os.path.realpath(file)).is_relative_to(real) for file in files)
