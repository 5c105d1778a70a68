"""Writes a recipe as YAML, with comments above its sections."""

import textwrap
from collections.abc import Mapping
from typing import Any

from openimp.recipe.file import to_yaml

WIDTH = 120


def write(recipe: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """The recipe as YAML. Each section has its comment above it. Lines that begin with spaces are not wrapped."""
    sections = []
    for key, value in recipe.items():
        for line in comments.get(key, "").splitlines():
            wrapped = [line] if line.startswith(" ") else textwrap.wrap(line, WIDTH - 2) or [""]
            sections += [f"# {part}".rstrip() for part in wrapped]
        is_flow = None if isinstance(value, dict) else False  # None: innermost mappings are on one line.
        sections.append(to_yaml({key: value}, default_flow_style=is_flow, width=WIDTH - 30))
    return "\n".join(sections)
