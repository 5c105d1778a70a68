"""The YAML files of recipes and studies: finding, reading and writing them, changing single keys, comparing them."""

import re
from collections.abc import Iterable
from copy import copy
from pathlib import Path
from typing import Any

import yaml

from openimp.common.errors import UserError, nearest
from openimp.common.names import has_scheme
from openimp.common.safe_files import read_text
from openimp.common.schema import TextFrom

MAX_BYTES = 2**20
"""Largest size of a recipe or a study."""
COLLECTIONS = {("sources",), ("tasks",), ("evaluation", "sets")}
"""Mappings in which the recipe's author chose the names. `--set sources.NAME={path: ...}` adds one."""
MAX_NODES = 1_000_000
"""Maximum number of keys, values, lists and mappings in a YAML file after its aliases are expanded."""


def read_recipe(name: str, overrides: Iterable[str] = (), folder: Path | None = None) -> tuple[dict[str, Any], Path]:
    """Reads a recipe's file as plain data, applies the overrides, and returns the data and the file. If the recipe has
    no name, it gets that of the file.

    `name` is a path, or the name of a recipe that comes with openimp. Relative paths in the overrides start at
    `folder`; None: at the recipe's folder.
    """
    file = find_file(name)
    data = {"name": file.stem, **read_mapping(file, "recipe")}
    for text in [overrides] if isinstance(overrides, str) else overrides:
        override(data, text, folder)
    return data, file


def read_mapping(file: Path, what: str) -> dict[str, Any]:
    """Reads a YAML file that contains a mapping as plain data. `what` names the file's kind in messages."""
    try:
        text = read_text(file, MAX_BYTES)
    except ValueError as error:  # It is not UTF-8.
        raise UserError(f"{file}: not valid YAML: {error}") from None
    return parse_mapping(text, file, what)


def parse_mapping(text: str, file: Path, what: str) -> dict[str, Any]:
    """Parses YAML text to the mapping that `read_mapping` returns. `file` and `what` are for messages."""
    try:
        data = yaml.load(text, RecipeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a number of 5,000 digits.
        reason = " ".join(str(error).split()).replace('in "<unicode string>", line', "at line")
        raise UserError(f"{file}: not valid YAML: {reason}") from None
    if data is None:
        raise UserError(f"{file}: is empty, expected a {what}")
    if not isinstance(data, dict):
        raise UserError(f"{file}: a {what} is a mapping of keys, found {type(data).__name__}")
    return data


def find_file(name: str, collection: str = "recipes", what: str = "recipe") -> Path:
    """Finds a file by its path, or a bundled file by a name such as `demo` or `evaluation/coco`."""
    file = Path(name).expanduser()
    if file.is_file():
        return file
    known = bundled(collection)
    if name in known:
        return known[name]
    if file.is_dir():
        advice = "; openimp init FOLDER drafts one" if what == "recipe" else ""
        raise UserError(f"{name}: is a folder, expected a {what}{advice}")
    if has_scheme(name):
        advice = "; openimp init DATA --tower MODEL drafts one" if what == "recipe" else ""
        raise UserError(f"{name}: names a model or data, expected a {what}{advice}")
    is_path = Path(name).suffix or "/" in name
    hint = "" if is_path else f", and no {what} of openimp{nearest(name, known)}"
    raise UserError(f"{name}: no such file or folder{hint}")


def bundled(collection: str = "recipes") -> dict[str, Path]:
    """The files of a collection that comes with openimp, by name."""
    package = Path(__file__).resolve().parents[1]
    files = {}
    # In a wheel the folder is in the package, in a checkout at the top.
    for root in (package / collection, package.parents[1] / collection):
        for file in root.rglob("*.yaml"):
            files[file.relative_to(root).with_suffix("").as_posix()] = file
    return files


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings and lists to {"a.b.0": value}."""
    if not isinstance(data, dict | list):
        return {prefix[:-1]: data}
    flattened: dict[str, Any] = {}
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        flattened |= flat(value, f"{prefix}{key}.")
    return flattened


def differences(before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """The keys of `flat` whose values differ, in order, with both values."""
    old_values = flat(before)
    new_values = flat(now)
    keys = sorted(old_values | new_values)
    return [
        (key, old_values.get(key), new_values.get(key)) for key in keys if old_values.get(key) != new_values.get(key)
    ]


class RecipeLoader(yaml.SafeLoader):
    """A YAML loader that reads 1e-3 as a number, rejects duplicate keys, and limits the expanded size of aliases.

    Without that limit, a few lines of nested aliases expand to billions of values.
    """

    _nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Counts nodes. `node.size` is the number of nodes in a complete node, with its aliases expanded."""
        is_alias = self.check_event(yaml.AliasEvent)
        nodes_before = self._nodes
        mark = self.peek_event().start_mark
        node: Any = super().compose_node(parent, index)
        if is_alias and not hasattr(node, "size"):
            raise yaml.composer.ComposerError(None, None, "an alias refers to a mapping or list that contains it", mark)
        self._nodes += node.size if is_alias else 1
        if self._nodes > MAX_NODES:
            message = f"more than {MAX_NODES:,} values, with its aliases"
            raise yaml.composer.ComposerError(None, None, message, mark)
        node.size = self._nodes - nodes_before
        return node

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


class RecipeDumper(yaml.SafeDumper):
    """Writes what `RecipeLoader` reads: a text such as "1e5" is quoted, because it would be read as a number.

    Texts with characters that are not printable are written with escapes in double quotes. Otherwise U+0085, a line
    break of YAML, would be read as a space. Equal parts are written again, instead of a reference to the first one.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


RecipeDumper.add_representer(str, _represent)

TAG = "tag:yaml.org,2002:"
RESOLVERS = {  # by tag: a pattern, and the characters that it can begin with
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": ("[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+|[-+]?([0-9][0-9_]*)?\.[0-9_]+|[-+]?[0-9][0-9_]*\."
              r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+0123456789."),
}  # fmt: skip
"""The types of values without quotes, as in YAML 1.2. PyYAML reads YAML 1.1, in which `no` is false, 12:30 is 750, 010
is 8, and 2024-01-31 is a date."""
for resolver in (RecipeLoader, RecipeDumper):
    kept = {f"{TAG}null", f"{TAG}merge"}
    resolver.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in patterns if tag in kept]
        for first, patterns in resolver.yaml_implicit_resolvers.items()
    }
    for tag, (pattern, first_characters) in RESOLVERS.items():
        resolver.add_implicit_resolver(f"{TAG}{tag}", re.compile(f"^(?:{pattern})$"), list(first_characters))


def to_yaml(data: Any, **layout: Any) -> str:
    """Plain data as the YAML text of a recipe. `layout` has options of `yaml.dump`."""
    options: dict[str, Any] = {"sort_keys": False, "width": 120, "allow_unicode": True} | layout
    return str(yaml.dump(data, Dumper=RecipeDumper, **options))


def override(data: dict[str, Any], text: str, folder: Path | None = None) -> None:
    """Sets one value of the raw recipe from `a.b.c=value`; see `read_recipe`. The value is YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: expected KEY=VALUE, such as tasks.captions.weight=2")
    try:
        parsed = yaml.load(value, RecipeLoader)
    except (yaml.YAMLError, RecursionError, ValueError):  # Of a number with thousands of digits.
        raise UserError(f"--set {text}: {value!r} is not valid YAML") from None
    *path, last = key.strip().split(".")
    node: Any = data
    try:
        for depth, part in enumerate(path):
            place = _place(node, part)
            child = node[place] if isinstance(node, list) else node.get(place)
            # If a misspelled name began a new source or set, the old one would stay and be used.
            if child is None and node and tuple(path[:depth]) in COLLECTIONS:
                raise UserError(f"--set {text}: {'.'.join(path[:depth])} has no {part}{nearest(part, node)}")
            # A copy, because other parts of the recipe may be aliases of this one. Saved recipes have null for options
            # that are off, such as `model.moe`.
            node[place] = {} if child is None else copy(child)
            node = node[place]
        node[_place(node, last)] = _with_folder(parsed, folder)
    except (ValueError, IndexError, TypeError, AttributeError):
        raise UserError(f"--set {text}: the recipe has no such key") from None


def _place(node: Any, part: str) -> Any:
    """A part of a dotted key as a key or as the index of a list."""
    return int(part) if isinstance(node, list) else part


def _with_folder(value: Any, folder: Path | None) -> Any:
    """Marks each string in `value`: if it is a path, it starts at `folder`. None: at the recipe's folder."""
    if isinstance(value, dict):
        return {key: _with_folder(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_folder(item, folder) for item in value]
    if folder is None or not isinstance(value, str):
        return value
    text = TextFrom(value)
    text.folder = folder
    return text
