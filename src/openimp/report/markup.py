"""HTML and SVG from function calls, where whatever is no markup is escaped."""

from collections.abc import Iterable
from html import escape
from typing import Any, TypeAlias

VOID = {"img", "link", "meta", "wbr"}
"""Elements without an end tag."""


class Markup(str):
    """Text that is HTML already. Any other string is text, and is escaped."""


Child: TypeAlias = "str | int | Iterable[Child] | None"


def tag(name: str, /, *children: Child, **attributes: Any) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: markup, text, nested lists of them, or None, which is nothing.
        attributes: `class_` is class and `aria_label` is aria-label; None and False leave an attribute out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str("" if value is True else value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{name}{given}>" if name in VOID else f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """Children one after the other."""
    return Markup("".join(_text(child) for child in children))


def table(
    caption: Child, head: Iterable[Child], rows: Iterable[Iterable[Child]], words: int = 1, class_: str = ""
) -> Markup:
    """A table whose rows begin with `words` cells of text, the first of them the row's header; numbers follow.

    It scrolls in a frame of its own where the page is too narrow.
    """

    def cell(i: int, content: Child) -> Markup:
        if i == 0:
            return tag("th", content, scope="row")
        return tag("td", content, class_=None if i < words else "number")

    heads = [tag("th", name, scope="col", class_=None if i < words else "number") for i, name in enumerate(head)]
    body = [tag("tr", [cell(i, content) for i, content in enumerate(row)]) for row in rows]
    shown = tag("table", tag("caption", tag("span", caption)), tag("thead", tag("tr", heads)), tag("tbody", body))
    return tag("div", shown, class_=f"scroll {class_}".strip(), tabindex=0)


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    return escape(str(child)) if isinstance(child, str | int) else "".join(map(_text, child))
