"""Writes a recipe as YAML, with comments above its sections."""

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

WIDTH = 120


class _Dumper(yaml.SafeDumper):
    """Writes equal parts again, instead of a reference to the first one.

    Texts with characters that are not printable are written with escapes in double quotes. Otherwise U+0085, a line
    break of YAML, would be read as a space.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent)


def write(recipe: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """The recipe as YAML. Each section has its comment above it. Lines that begin with spaces are not wrapped."""
    sections = []
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": WIDTH - 30}
    for key, value in recipe.items():
        for line in comments.get(key, "").splitlines():
            wrapped = [line] if line.startswith(" ") else textwrap.wrap(line, WIDTH - 2) or [""]
            sections += [f"# {part}".rstrip() for part in wrapped]
        is_flow = None if isinstance(value, dict) else False  # None: innermost mappings are on one line.
        sections.append(yaml.dump({key: value}, Dumper=_Dumper, default_flow_style=is_flow, **options))
    return "\n".join(sections)
