"""Hooks of the documentation's site, see mkdocs.yml."""

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+[\w./-]+\)")
"""A link to a file of the repository that is not a page."""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replaces links that leave docs/ by their text."""
    is_below = "/" in page.file.src_uri  # There, one ../ stays in docs/.
    return markdown if is_below else OUTSIDE.sub(r"\1", markdown)
