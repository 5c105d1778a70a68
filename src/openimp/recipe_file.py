"""Finding and reading a recipe's YAML file, and changing single keys of it."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from openimp.errors import UserError, nearest


def read_recipe(name: str, overrides: Iterable[str] = ()) -> tuple[dict[str, Any], Path]:
    """The plain data of a recipe, with `a.b.c=value` overrides applied, and its file.

    Args:
        name: a path, or the name of a recipe that comes with openimp.

    Raises:
        UserError: no such file, no YAML, or no mapping.
    """
    file = find_file(name)
    data = read_mapping(file, "recipe")
    for text in overrides:
        override(data, text)
    return data, file


def read_mapping(file: Path, what: str) -> dict[str, Any]:
    """The plain data of a YAML file that holds a mapping.

    Raises:
        UserError: no YAML, or no mapping.
    """
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: a {what} is a mapping of keys, found {type(data).__name__}")
    return data


def find_file(name: str, folder: str = "recipes", what: str = "recipe file") -> Path:
    """The file that `name` means: a path, or a name such as `demo` or `evaluation/coco` of openimp's own files.

    Raises:
        UserError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    here = Path(__file__).resolve().parent
    # In a wheel the folder lies in the package, in a checkout at its top.
    places = (here / folder, here.parents[1] / folder)
    bundled = {p.relative_to(place).with_suffix("").as_posix(): p for place in places for p in place.rglob("*.yaml")}
    if name in bundled:
        return bundled[name]
    if "/" in name:  # No name of one of ours, so those are no help.
        raise UserError(f"{name}: no such {what}")
    raise UserError(f"{name}: no such {what}{nearest(name, bundled)}")


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists to {"a.b.0": value}."""
    if isinstance(data, dict | list):
        pairs = data.items() if isinstance(data, dict) else enumerate(data)
        return {k: v for key, value in pairs for k, v in flat(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: data}


class RecipeLoader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as people expect, and a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def override(data: dict[str, Any], text: str) -> None:
    """Sets one value of the raw recipe from `a.b.c=value`; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: expected KEY=VALUE, such as tasks.captions.weight=2")
    *path, last = key.strip().split(".")
    node: Any = data
    try:
        for part in path:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = yaml.load(value, RecipeLoader)
    except (ValueError, IndexError, TypeError, AttributeError):
        raise UserError(f"--set {text}: the recipe has no such key") from None
    except yaml.YAMLError:
        raise UserError(f"--set {text}: {value!r} is not valid YAML") from None
