"""The templates of the page, which are beside this file."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from openimp.common.progress import clock
from openimp.evaluation.results import main_metric
from openimp.planning.costs import short
from openimp.report.charts import percent

# Autoescape turns every value into text, and no template marks a value as safe, so data cannot add markup.
TEMPLATES = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
TEMPLATES.loader = PackageLoader("openimp.report")
TEMPLATES.filters.update(clock=clock, commas="{:,}".format, main_metric=main_metric, percent=percent, short=short)
