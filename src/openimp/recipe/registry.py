"""Finds modalities and objectives by entry point, so that other packages can add some."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationInfo

from openimp.common.errors import UserError, nearest
from openimp.common.modality import Modality
from openimp.common.objective import Objective

MODALITIES = "openimp.modalities"
OBJECTIVES = "openimp.objectives"
TOWERS = "openimp.towers"


@cache
def modality_class(name: str) -> type[Modality]:
    """The class that an installed package registers as `name` in the entry point group `openimp.modalities`."""
    return _registered(MODALITIES, "modality", name)


def tower_class(name: str) -> type[Modality]:
    """The class that reads the modality `name` with a frozen encoder. It is in a folder above this one."""
    make: Callable[[str], type[Modality]] = _registered(TOWERS, "kind of tower", "frozen")
    return make(name)


@cache
def objective_class(name: str) -> type[Objective]:
    """The class that an installed package registers as `name` in the entry point group `openimp.objectives`."""
    return _registered(OBJECTIVES, "objective", name)


def _registered(group: str, kind: str, name: str) -> Any:
    points = {point.name: point for point in entry_points(group=group)}
    if name not in points:
        raise UserError(f"no {kind} is called {name!r}{nearest(name, points)}")
    return points[name].load()


def validated_objective(data: Any, info: ValidationInfo) -> Any:
    """Validates the options of an objective with the class of its `type`."""
    if not isinstance(data, Mapping):
        return data
    if "type" not in data:
        raise ValueError("type: required value is missing")
    try:
        schema = objective_class(str(data["type"]))
    except UserError as error:
        raise ValueError(str(error)) from None
    return schema.model_validate(data, context=info.context)
