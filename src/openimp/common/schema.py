"""Building blocks of every schema: the strict base model, number types, paths, and validation with clear errors."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from openimp.common.errors import UserError, counted, nearest
from openimp.common.names import absolute_name
from openimp.common.safe_files import read_text


class Strict(BaseModel):
    """Base of each part of the recipe. Types must match exactly, except that numbers of NumPy become those of Python.

    The error for an unknown key names the nearest key.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    removed: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Keys that saved models may have, with the values for which a model is the same without the key."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or cls.model_config.get("extra") != "forbid":
            return data
        known = {}
        for key, value in data.items():
            if key in cls.model_fields:
                known[key] = value.item() if isinstance(value, np.generic) else value
            elif key not in cls.removed:
                raise ValueError(unknown_key(str(key), cls.model_fields))
            elif value not in cls.removed[key]:
                raise ValueError(f"{key} is {value!r}, which this version of openimp no longer has")
        return known

    def refuse(self, keys: Iterable[str], reason: str) -> None:
        """Raises ValueError if one of the keys has another value than its default.

        Defaults pass, because a resolved recipe contains them.
        """
        for key in keys:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} {reason}")


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The error message for a key that a mapping does not have."""
    known = list(known)
    if not known:
        return f"unknown key {key!r}; expected {{}}"
    name, colon, value = key.partition(":")
    if colon and name in known:
        return f"unknown key {key!r}: YAML needs a space after the colon, as in {name}: {value or 'VALUE'}"
    return f"unknown key {key!r}{nearest(key, known)}"


class TextFrom(str):
    """A string that replaces one of the recipe's. If it is a path, it is relative to `folder`, not to the recipe."""

    folder: Path


def _absolute(name: Any, info: ValidationInfo) -> Any:
    """Makes a relative path absolute, also that of `timm:local-dir:FOLDER`."""
    if isinstance(name, PurePath):
        name = str(name)
    folder = base_folder(name, info)
    return absolute_name(name, folder) if isinstance(name, str) and folder is not None else name


def base_folder(text: Any, info: ValidationInfo) -> str | Path | None:
    """The folder at which a relative path in the data starts: that given to `checked`, by default the current one."""
    if isinstance(text, TextFrom):
        return text.folder
    return info.context["folder"] if info.context else "."


def _one_component(name: str) -> str:
    if name in ("", ".", "..") or {"/", "\\"} & set(name) or not name.isprintable():
        raise ValueError(f"{name!r} cannot name a folder: use letters, and no slash or control character")
    return name


FolderName = Annotated[str, AfterValidator(_one_component)]
"""A name that is used as one component of a path."""
RecipePath = Annotated[str, BeforeValidator(_absolute)]
"""A path, relative to the recipe's folder or, in a `TextFrom`, to another one; `~` is the home directory. The `Config`
of a modality may use this type too."""


def text_lines(value: Any, info: ValidationInfo) -> Any:
    """If `value` is a string, reads the text file of that name and returns its lines; else returns `value`.

    The file must lie inside the recipe's folder, or that of a `TextFrom`. Empty lines and lines that begin with # are
    skipped.
    """
    if not isinstance(value, str):
        return value
    folder = Path(base_folder(value, info) or ".").resolve()
    file = (folder / value).resolve()
    if not file.is_relative_to(folder):
        raise ValueError(f"{value} is outside of the folder {folder}")
    if not file.is_file():
        raise ValueError(f"expected a list, or a text file in {folder}; there is no file {file.name}")
    try:
        lines = read_text(file).removeprefix("\ufeff").split("\n")  # Without a byte order mark.
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def as_text(value: Any) -> str:
    """A value as it would be written in YAML, so that `where: {valid: true}` finds "true" in a CSV file."""
    return str(value).lower() if isinstance(value, bool) else str(value)


Share = Annotated[float, Field(ge=0, le=1)]
PartialShare = Annotated[float, Field(ge=0, lt=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]


# YAML has no tuples, so a list is accepted; its items are still checked strictly.
Pair = Annotated[tuple[Count, Count], Field(strict=False)]
Triple = Annotated[tuple[Count, Count, Count], Field(strict=False)]


def checked(schema: type[Any], data: Any, error_prefix: str, folder: str | Path | None = None) -> Any:
    """Validates plain data, or a model again, with a pydantic model. The first mistake is a UserError.

    `error_prefix` is usually the file. Relative paths in the data start at `folder`.
    """
    if isinstance(data, BaseModel):
        data = data.model_dump(warnings=False)
    try:
        return schema.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        raise UserError(f"{error_prefix}: {_first_mistake(data, error)}") from None
    except UserError as error:  # Of a validator.
        raise UserError(f"{error_prefix}: {error}") from None


EXPECTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "string_type": "text",
    "list_type": "a list", "tuple_type": "a list",
    "dict_type": "a mapping", "model_type": "a mapping", "model_attributes_type": "a mapping",
    "literal_error": "{expected}", "union_tag_invalid": "{expected_tags}",
}  # fmt: skip
"""What a value should have been, by pydantic's type of error."""
LIMITS = {
    "greater_than": "must be above", "greater_than_equal": "must be at least",
    "less_than": "must be below", "less_than_equal": "must be at most",
}  # fmt: skip


def _first_mistake(data: Any, error: ValidationError) -> str:
    """`key: message` for the first mistake.

    If a value may have one of several types, pydantic reports an error per type. The errors with the longest path are
    those of the type that the value has.
    """
    details = [(_path(data, detail), detail) for detail in error.errors()]
    first_path = details[0][0]
    path = max((path for path, _ in details if path[: len(first_path)] == first_path), key=len)
    at_path = [detail for other_path, detail in details if other_path == path]
    specific = [detail for detail in at_path if detail["type"] not in EXPECTED]
    if specific or len(at_path) == 1:
        message = _message((specific or at_path)[0])
    else:
        *others, last = dict.fromkeys(EXPECTED[detail["type"]].format_map(detail.get("ctx", {})) for detail in at_path)
        expected = f"{', '.join(others)} or {last}" if others else last
        message = f"expected {expected}, found {_shown(at_path[0]['input'])}"
    return ": ".join(filter(None, [".".join(path), message]))


def _message(error: Any) -> str:
    """The mistake in a value. For a type of error that is not known here, it is pydantic's message."""
    kind = error["type"]
    value = error["input"]
    context = error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind in ("missing", "union_tag_not_found"):
        return "required value is missing"
    if kind == "too_short":
        return f"needs at least {counted(context['min_length'], 'item')}, found {len(value)}"
    if kind == "too_long":
        return f"takes at most {counted(context['max_length'], 'item')}, found {len(value)}"
    if kind == "union_tag_invalid":
        value = value[context["discriminator"].strip("'")]
        context = {"expected_tags": " or ".join(context["expected_tags"].rsplit(", ", 1))}
    if kind in EXPECTED:
        return f"expected {EXPECTED[kind].format_map(context)}, found {_shown(value)}"
    if kind in LIMITS:
        (limit,) = context.values()
        return f"{LIMITS[kind]} {int(limit) if limit == int(limit) else limit}, found {_shown(value)}"
    return f"{error['msg']}, found {_shown(value)}"


def _shown(value: Any) -> str:
    """A value as in YAML, at most 60 characters of it."""
    return f"{'null' if value is None else as_text(value) if isinstance(value, bool) else repr(value):.60}"


def _path(data: Any, error: Any) -> list[str]:
    """The keys of an error's location.

    Pydantic's location also names members of unions, which the data does not have. It lacks the key that decides
    between the members.
    """
    path = []
    location = error["loc"]
    for i, part in enumerate(location):
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            if error["type"] != "missing" or i < len(location) - 1:
                continue
        path.append(str(part))
    if error["type"].startswith("union_tag"):
        path.append(error["ctx"]["discriminator"].strip("'"))
    return path
