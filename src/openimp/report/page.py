"""The page about the sections: what the run is, a table of contents, and the style sheet."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from openimp.common.progress import clock
from openimp.planning.ledger import short
from openimp.recipe.schema import Recipe
from openimp.report.markup import Child, Markup, tag

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser lets the page do: show what is in it, run nothing, fetch nothing."""


def facts(
    recipe: Recipe, parameters: int | None, step: int | None, lines: list[dict[str, Any]], until: datetime
) -> Markup:
    """What the run is: a sentence, and the numbers that say how much went into it.

    Args:
        recipe: of the run.
        parameters: of its model; None where there is no checkpoint.
        step: how far it came; None where that is not known.
        lines: of metrics.jsonl.
        until: when it was written last, UTC.
    """
    shown: dict[str, Child] = {}
    if parameters is not None:
        shown["parameters"] = short(parameters)
    if step is not None:
        shown["steps"] = [f"{step:,}", tag("small", f" of {recipe.train.steps:,}")]
    if lines:
        totals = lines[-1]["totals"].values()
        shown["examples"] = short(sum(units["examples"] for units in totals))
        shown["FLOPs"] = short(sum(units["flops"] for units in totals))
        shown["training time"] = clock(sum(line["seconds"] for line in lines))
    shown["last written"] = f"{until:%Y-%m-%d}"
    tiles = [tag("div", tag("dt", name), tag("dd", value)) for name, value in shown.items()]
    return tag("div", tag("p", _sentence(recipe), class_="lead"), tag("dl", tiles, class_="facts"))


def page(name: str, head: Markup, sections: dict[str, Markup | None]) -> str:
    """The whole document, with the sections that are there."""
    there = {title: content for title, content in sections.items() if content is not None}
    links = [tag("a", title, href=f"#{title.lower()}") for title in there]
    body = [
        tag("header", tag("p", "openimp run", class_="kicker"), tag("h1", name), head),
        tag("nav", links, aria_label="Sections"),
        tag("main", [
            tag("section", tag("h2", title, id=f"h-{title.lower()}"), content, id=title.lower(),
                aria_labelledby=f"h-{title.lower()}")
            for title, content in there.items()
        ]),
        tag("footer", _made()),
    ]  # fmt: skip
    style = (files("openimp.report") / "page.css").read_text(encoding="utf-8")
    meta = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{name} · openimp report"),
        tag("style", Markup(style)),
    ]
    return f"<!doctype html>\n{tag('html', tag('head', meta), tag('body', body), lang='en')}\n"


def _sentence(recipe: Recipe) -> str:
    model, moe = recipe.model, recipe.model.moe
    sparse = f", {moe.layers} of them with {moe.experts} experts" if moe else ""
    *most, last = recipe.modality_names
    read = f"{', '.join(most)} and {last}" if most else last
    return f"One encoder of {model.layers} layers{sparse}, {model.width} wide, for {read}."


def _made() -> str:
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return (
        f"Report made {made} with openimp {version('openimp')}, torch {version('torch')}, "
        f"Python {platform.python_version()}."
    )
