"""Approximate search with an inverted file (IVF), for large indexes.

The vectors are grouped by their nearest centroids. A query is compared with the vectors of a few groups only, so it may
miss some of the nearest ones. How many it finds, the recall, is measured whenever the groups are made.
"""

from math import isqrt
from pathlib import Path

import numpy as np

from openimp.common.progress import console
from openimp.search.folder import About, Ivf, write_about
from openimp.search.table import Items

MIN_ROWS = 50_000
"""Fewest rows with an inverted file. Fewer are scanned in some 10 ms."""
GROWTH = 2
"""The groups are made anew if the table has grown by this factor."""
QUERIES, NEAREST = 200, 10
"""Recall is measured on the `NEAREST` nearest items of `QUERIES` items."""
RECALL = 0.99
"""The recall for which the number of groups that a query compares is chosen."""


def update(folder: Path, items: Items, about: About) -> About:
    """Makes the inverted file if the table needs a new one, measures its recall, and records both in index.json."""
    rows = items.table.count_rows()
    old = about.ivf if items.table.list_indices() else None
    if rows < MIN_ROWS or (old and rows <= GROWTH * old.rows):
        new = old
    else:
        console.print(f"grouping {rows:,} vectors for approximate search")
        items.group(isqrt(rows))
        new = measure(items, rows)
    if new != about.ivf:
        about = about.model_copy(update={"ivf": new})
        write_about(folder, about)
    return about


def measure(items: Items, rows: int) -> Ivf:
    """Finds the number of groups to compare for a recall of `RECALL`, or all of them if that needs all."""
    queries = _sample(items, rows)
    exact = _nearest(items, queries)
    groups, probes = isqrt(rows), 5
    while True:
        probes = min(2 * probes, groups)
        found = [{row["id"] for row in items.nearest(query, NEAREST, probes=probes)} for query in queries]
        recall = float(np.mean([len(found[i] & exact[i]) / len(exact[i]) for i in range(len(queries))]))
        if recall >= RECALL or probes == groups:
            return Ivf(rows=rows, probes=probes, recall=recall)


def _sample(items: Items, rows: int) -> np.ndarray:
    """Vectors of items that are evenly spaced in the table, (Q, Z) fp32."""
    step, kept, start = max(1, rows // QUERIES), [], 0
    for _, vectors in items.vectors():
        kept.append(vectors[-start % step :: step])
        start += len(vectors)
    return np.concatenate(kept)[:QUERIES]


def _nearest(items: Items, queries: np.ndarray) -> list[set[str]]:
    """The ids of the nearest items of each query, by comparing it with all of them."""
    scores = np.full((len(queries), 0), 0, np.float32)
    ids = np.empty((len(queries), 0), object)
    for names, vectors in items.vectors():
        scores = np.concatenate([scores, queries @ vectors.T], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(np.array(names, object), (len(queries), len(names)))], axis=1)
        best = np.argsort(-scores, axis=1)[:, :NEAREST]
        scores, ids = np.take_along_axis(scores, best, axis=1), np.take_along_axis(ids, best, axis=1)
    return [set(row) for row in ids]
