"""Finds modalities by entry point, so that other packages can add modalities.

Recipes validate their views with it without importing a modality module directly.
"""

from functools import cache
from importlib.metadata import entry_points

from openimp.common.errors import UserError, nearest
from openimp.common.modality import Modality

GROUP = "openimp.modalities"


@cache
def modality_class(name: str) -> type[Modality]:
    """The class that an installed package registers as `name` in the entry point group `openimp.modalities`."""
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        raise UserError(f"no modality is called {name!r}{nearest(name, points)}")
    return points[name].load()
