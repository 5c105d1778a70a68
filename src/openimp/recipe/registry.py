"""Modalities are found by entry point, so one from another package is no different from a built-in one.

This module stands at the bottom of the import order: recipes check their views against modalities through it without
importing any of them.
"""

from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from openimp.common.errors import UserError, nearest

if TYPE_CHECKING:
    from openimp.common.modality import Modality

GROUP = "openimp.modalities"


@cache
def modality_class(name: str) -> "type[Modality]":
    """The class registered under `name` in the entry point group `openimp.modalities`.

    Raises:
        UserError: no installed package registers that name.
    """
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        raise UserError(f"no modality is called {name!r}{nearest(name, points)}")
    return points[name].load()
