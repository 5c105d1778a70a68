"""Writes the reference in docs/recipe.md from the recipe's schema and the options of openimp's own modalities and
objectives.

    python -m tools.write_recipe_reference

The part of the page above the mark is written by hand. tests/recipe/test_reference.py fails if the reference is out of
date.
"""

import inspect
import json
import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from openimp.common.modality import Modality
from openimp.common.objective import Objective
from openimp.encoding.tower import Tower
from openimp.recipe.inputs import View
from openimp.recipe.registry import MODALITIES, OBJECTIVES
from openimp.recipe.schema import Recipe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipe.md"
MARK = "<!-- reference: "


def main() -> None:
    PAGE.write_text(current(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


def current(page: str) -> str:
    """The page with an updated reference."""
    written, _, rest = page.partition(MARK)
    titles = sections()
    contents = "".join(f"- [{title}](#{_anchor(title)})\n" for title in titles.values())
    reference = contents + "".join(_section(schema, titles) for schema in titles)
    return f"{written}{MARK}{rest.splitlines()[0]}\n\n{reference}"


def builtin_modalities() -> dict[str, type[Modality]]:
    """The modalities that openimp itself registers, by name."""
    return _builtin(MODALITIES)


def builtin_objectives() -> dict[str, type[Objective]]:
    """The objectives that openimp itself registers, by name."""
    return _builtin(OBJECTIVES)


def _builtin(group: str) -> dict[str, Any]:
    points = [point for point in entry_points(group=group) if point.dist and point.dist.name == "openimp"]
    return {point.name: point.load() for point in points}


def sections() -> dict[type[BaseModel], str]:
    """The title of each part of the recipe, in the order of the page."""
    titles: dict[type[BaseModel], str] = {}
    modalities = builtin_modalities()

    def visit(schema: type[BaseModel], path: str) -> None:
        kind = schema.model_fields.get("type")
        titles[schema] = f"`{path}`" + (f", type {get_args(kind.annotation)[0]}" if kind else "")
        for name, field in schema.model_fields.items():
            if schema is Recipe and name == "modalities":
                for modality in modalities.values():
                    titles[modality.Config] = f"`modalities.{modality.stem}`"
                titles[Tower.Config] = "`modalities.STEM` with a tower"
            for part, suffix in _schemas(field.annotation):
                if part not in titles:
                    visit(part, f"{path}.{name}{suffix}".removeprefix("recipe."))
        if schema is View:
            for name, modality in modalities.items():
                titles[modality.View] = f"`{path}.{name}`"
            titles[Tower.View] = f"`{path}.MODALITY` with a tower"

    visit(Recipe, "recipe")
    return titles | {Recipe: "Top level"}


def _schemas(annotation: Any, suffix: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """The schemas in a type, each with the suffix of its path."""
    if annotation is Objective:
        for objective in builtin_objectives().values():
            yield objective, suffix
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, suffix
    suffix += {dict: ".NAME", list: "[]"}.get(get_origin(annotation), "")  # type: ignore[arg-type]
    for argument in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from _schemas(argument, suffix)


def _section(schema: type[BaseModel], titles: dict[type[BaseModel], str]) -> str:
    if not schema.model_fields:
        return f"\n## {titles[schema]}\n\n{inspect.cleandoc(schema.__doc__ or '')} It has no options.\n"
    rows = [("key", "type", "default", "meaning"), ("---",) * 4]
    for name, field in schema.model_fields.items():
        meaning = " ".join((field.description or "").split())
        rows.append((f"`{name}`", _words(field.annotation, field.metadata, titles), _default(field), meaning))
    table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
    return f"\n## {titles[schema]}\n\n{inspect.cleandoc(schema.__doc__ or '')}\n\n{table}"


def _words(kind: Any, limits: Any, titles: dict[type[BaseModel], str]) -> str:
    """Describes a type in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        more = [m for extra in arguments[1:] for m in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return _words(arguments[0], [*limits, *more], titles)
    if origin in (Union, UnionType):
        parts = [_words(part, limits, titles) for part in arguments if part is not NoneType]
        return " or ".join(parts) + (", or null" if NoneType in arguments else "")
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is dict:
        return f"mapping of names to {_words(arguments[1], (), titles)}"
    if origin in (list, tuple):
        least = next((str(limit.min_length) for limit in limits if isinstance(limit, MinLen)), "")
        exact = str(len(arguments)) if origin is tuple else least
        fixed = origin is tuple or any(isinstance(limit, MaxLen) for limit in limits)
        items = re.sub("^(whole number|number|text|list)", r"\1s", _words(arguments[0], (), titles))
        return f"list of {exact} {items}" if fixed else f"list of {items}" + (f", at least {least}" if least else "")
    if kind is Objective:
        return " or ".join(_words(objective, (), titles) for objective in builtin_objectives().values())
    if kind in titles:
        return f"[{titles[kind]}](#{_anchor(titles[kind])})"
    said = {Ge: "at least {0.ge}", Gt: "above {0.gt}", Le: "at most {0.le}", Lt: "below {0.lt}"}
    within = " and ".join(said[type(limit)].format(limit) for limit in limits if type(limit) in said)
    plain = {bool: "true or false", str: "text", int: "whole number", float: "number", Any: "options, see below"}
    return plain[kind] + (f", {within}" if within else "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return "one with its defaults"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _anchor(title: str) -> str:
    """The anchor that GitHub gives a title."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


if __name__ == "__main__":
    main()
