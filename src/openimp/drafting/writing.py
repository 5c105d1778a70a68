"""Writes a recipe as YAML that is pleasant to read: short mappings on one line, and comments above keys."""

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

WIDTH = 120
BLOCKS = ("model", "tasks")
"""Parts of a recipe that are written with one key per line even if they are short."""
Key = tuple[str, ...]


def write(recipe: Mapping[str, Any], comments: Mapping[Key, str], head: str) -> str:
    """The recipe as YAML. Each comment is above the key whose path it has; `head` is above all."""
    lines = _comment(head, "")
    for key, value in recipe.items():
        lines += _entry((key,), value, comments, "")
        if isinstance(value, dict):
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _entry(path: Key, value: Any, comments: Mapping[Key, str], indent: str) -> list[str]:
    """The lines of one key, with its comment."""
    lines = _comment(comments[path], indent) if path in comments else []
    key = f"{indent}{_flow(path[-1])}:"
    line = f"{key} {_flow(value)}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [*lines, key, *(f"{indent}  - {_flow(item)}" for item in value)]
    has_comments = any(len(other) > len(path) and other[: len(path)] == path for other in comments)
    if isinstance(value, dict) and (has_comments or (path[0] in BLOCKS and len(path) < 3) or len(line) > WIDTH):
        inner = (part for name, each in value.items() for part in _entry((*path, name), each, comments, indent + "  "))
        return [*lines, key, *inner]
    return [*lines, line]


class _Dumper(yaml.SafeDumper):
    """Writes texts with line breaks in double quotes, which need no further line."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent)


def _flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=2**31)
    return text.removesuffix("\n").removesuffix("\n...")


def _comment(text: str, indent: str) -> list[str]:
    """Comment lines. Each line of the text begins a new one, and lines that begin with spaces are not wrapped."""
    lines = []
    for line in text.split("\n"):
        wrapped = [line] if line.startswith(" ") else textwrap.wrap(line, WIDTH - len(indent) - 2) or [""]
        lines += [f"{indent}# {part}".rstrip() for part in wrapped]
    return lines
