"""Renders the page from the templates beside this file."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from openimp.common.progress import clock
from openimp.evaluation.results import main_metric
from openimp.planning.ledger import short
from openimp.report.charts import percent

# Autoescape turns every value into text, and no template marks a value as safe, so data cannot add markup.
TEMPLATES = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
TEMPLATES.loader = PackageLoader("openimp.report")
TEMPLATES.filters.update(clock=clock, commas="{:,}".format, main_metric=main_metric, percent=percent, short=short)


def render(sections: dict[str, Any], **about: Any) -> str:
    """The page as HTML: the sections that are not empty, by title, which names a template; and facts about the run."""
    shown = {title: data for title, data in sections.items() if data}
    return TEMPLATES.get_template("page.html").render(sections=shown, **about)
