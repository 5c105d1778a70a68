"""Counts what a search does, by wrapping the real methods of an open index."""

from collections import Counter
from functools import wraps
from typing import Any

from openimp.search import Index


def counting(index: Index) -> Counter[str]:
    """Counts forward passes of the encoder ("encode") and queries of the table ("search") from now on."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        @wraps(real)
        def counted(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return real(*arguments, **options)

        setattr(owner, name, counted)

    count(index.model.imp, "encode")
    count(index._items.table, "search")
    return counts
