"""Search over media: `build_index` embeds files into an index, and `open_index` answers queries from it."""

from openimp.search.build import Indexed, build_index
from openimp.search.index import Hit, Index, Like, Query, open_index

__all__ = ["Hit", "Index", "Indexed", "Like", "Query", "build_index", "open_index"]
