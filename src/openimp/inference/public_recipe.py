"""Removes folders, passwords and the queries of URLs from a recipe or a model's configuration, for `openimp push`.

Folders may tell names of users, customers or machines, and the query of a URL may hold a key.
"""

import copy
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from openimp.common.names import is_url, map_path


def shorten_paths(data: dict[str, Any]) -> dict[str, Any]:
    """A copy of a recipe or of a model's configuration as plain data, with the `public_path` of each path in it."""
    data = copy.deepcopy(data)
    for part in (*data.get("sources", {}).values(), data.get("train", {})):
        _shorten(part, {"path", "hub", "root", "init"})  # A data set of the hub may be a local folder.
    objectives = [objective for task in data.get("tasks", {}).values() for objective in task["objectives"]]
    for options in (*data["modalities"].values(), *objectives):
        _shorten(options, options.keys())  # Modalities and objectives of other packages may have paths of any name.
    return data


def public_path(path: str) -> str:
    """The last part of an absolute path; a URL without user, password and query; anything else as it is.

    In chained URLs, such as `simplecache::s3://...`, this applies to each of them.
    """
    if is_url(path):
        outer, is_chained, inner = path.partition("::")
        if is_chained:
            return f"{public_path(outer)}::{public_path(inner)}"
        parts = urlsplit(path)
        if parts.scheme in ("file", "local"):
            return Path(parts.path).name
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
    return map_path(path, lambda path: Path(path).name if Path(path).is_absolute() else path)


def _shorten(part: dict[str, Any], keys: Any) -> None:
    part.update({key: public_path(part[key]) for key in keys & part.keys() if isinstance(part[key], str)})
