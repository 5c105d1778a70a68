"""Building blocks of every schema: the strict base model, number types, paths, and validation with clear errors."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from openimp.common.errors import UserError, nearest
from openimp.common.safe_files import read_text


class Strict(BaseModel):
    """Base of each part of the recipe. Types must match exactly. The error for an unknown key names the nearest key."""

    model_config = ConfigDict(
        strict=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    renamed: ClassVar[Mapping[str, str]] = {}
    """Keys of earlier versions, with the names that replaced them."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and cls.model_config.get("extra") == "forbid":
            for key in data:
                if key in cls.renamed:
                    raise ValueError(f"key {key!r} is now called {cls.renamed[key]!r}")
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}{nearest(str(key), cls.model_fields)}")
        return data


def _beside_recipe(path: str, info: ValidationInfo) -> str:
    """Makes a relative path relative to the recipe's folder; a URL or `openimp:NAME` is returned unchanged."""
    folder = (info.context or {}).get("folder")
    return path if folder is None or re.match(r"\w\w+:", path) else str(Path(folder).resolve() / path)


def _one_component(name: str) -> str:
    if name in ("", ".", "..") or {"/", "\\"} & set(name) or not name.isprintable():
        raise ValueError(f"{name!r} cannot name a folder: use letters, and no slash or control character")
    return name


FolderName = Annotated[str, AfterValidator(_one_component)]
"""A name that is used as one component of a path."""
RecipePath = Annotated[str, AfterValidator(_beside_recipe)]
"""A path in a recipe; the `Config` of a modality may use this type too."""


def text_lines(value: Any, info: ValidationInfo) -> Any:
    """If `value` is a string, reads the text file of that name and returns its lines; else returns `value`.

    The file must lie inside the recipe's folder. Empty lines and lines that begin with # are skipped.
    """
    if not isinstance(value, str):
        return value
    folder = Path((info.context or {}).get("folder") or ".").resolve()
    file = (folder / value).resolve()
    if not file.is_relative_to(folder):
        raise ValueError(f"{value} is outside of the recipe's folder, {folder}")
    if not file.is_file():
        raise ValueError(f"expected a list, or a text file in the recipe's folder; there is no file {file}")
    try:
        lines = read_text(file).removeprefix("\ufeff").split("\n")  # Without a byte order mark.
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def as_text(value: Any) -> str:
    """A value as it would be written in YAML, so that `where: {valid: true}` finds "true" in a CSV file."""
    return str(value).lower() if isinstance(value, bool) else str(value)


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]


# YAML has no tuples, so a list is accepted; its items are still checked strictly.
Pair = Annotated[tuple[Count, Count], Field(strict=False)]
Triple = Annotated[tuple[Count, Count, Count], Field(strict=False)]


def checked(schema: type[Any], data: Any, where: str, folder: str | Path | None = None) -> Any:
    """Validates plain data (or checks what is checked already anew), and tells the first mistake in one sentence."""
    if isinstance(data, BaseModel):
        data = data.model_dump()
    try:
        return schema.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(_path(data, first["loc"], missing=first["type"] == "missing"))
        message = first["msg"].removeprefix("Value error, ")
        found = "" if first["type"] in ("value_error", "missing") else f", found {first['input']!r:.60}"
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}{found}") from None


def _path(data: Any, location: tuple[int | str, ...], missing: bool) -> Iterator[str]:
    """The keys of pydantic's location that the data has: it also puts the members of unions among them."""
    for i, part in enumerate(location):
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            if not (missing and i == len(location) - 1):
                continue
        yield str(part)
