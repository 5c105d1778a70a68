"""Search over media: `build_index` embeds files into an index, and `open_index` answers queries from it."""

from openimp.search.build import IndexResult, build_index
from openimp.search.index import Index, open_index
from openimp.search.query import Hit, Like, Query

__all__ = ["Hit", "Index", "IndexResult", "Like", "Query", "build_index", "open_index"]
