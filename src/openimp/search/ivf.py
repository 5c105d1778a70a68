"""Approximate search with an inverted file (IVF), for large indexes.

Each vector is in the partition of its nearest centroid. A query is compared with the vectors of a few partitions only,
so it may miss some of the nearest ones. The share that it finds, the recall, is measured whenever the partitions are
computed.
"""

from math import isqrt
from pathlib import Path

import numpy as np

from openimp.common.progress import console
from openimp.search.folder import Ivf, Metadata, write_metadata
from openimp.search.table import Items

MIN_ROWS = 50_000
"""Fewest rows with an inverted file."""
GROWTH = 2
"""The partitions are computed again if the table has grown by more than this factor."""
QUERIES, NEAREST = 200, 10
"""Recall is measured on the `NEAREST` nearest items of `QUERIES` items."""
RECALL = 0.99
"""The recall for which the number of partitions to search is chosen."""
FEWEST, BISECTIONS = 10, 3
"""At least `FEWEST` partitions are searched. After doubling, the number is bisected this often."""


def update(folder: Path, items: Items, about: Metadata) -> Metadata:
    """Builds the IVF index if the table needs a new one, measures its recall, and records both in index.json."""
    rows = items.table.count_rows()
    old = about.ivf if "vector" in items.indexed() else None
    if rows < MIN_ROWS or (old and rows <= GROWTH * old.rows):
        new = old
    else:
        console.print(f"building an IVF index of {rows:,} vectors for approximate search")
        items.build_ivf(isqrt(rows))
        new = measure(items, rows)
    if new != about.ivf:
        about = about.model_copy(update={"ivf": new})
        write_metadata(folder, about)
    return about


def measure(items: Items, rows: int) -> Ivf:
    """Finds about the fewest partitions to search for a recall of at least `RECALL`: it doubles them, then bisects."""
    queries = _sample(items, rows)
    exact = _exact_nearest(items, queries)

    def recall(probes: int) -> float:
        found = [{row["id"] for row in items.nearest(query, NEAREST, probes=probes)} for query in queries]
        return float(np.mean([len(ids & best) / len(best) for ids, best in zip(found, exact)]))

    partitions, few = isqrt(rows), 0
    probes = min(FEWEST, partitions)
    while (reached := recall(probes)) < RECALL and probes < partitions:
        few, probes = probes, min(2 * probes, partitions)
    for _ in range(BISECTIONS if few else 0):
        middle = (few + probes) // 2
        if (found := recall(middle)) >= RECALL:
            probes, reached = middle, found
        else:
            few = middle
    return Ivf(rows=rows, probes=probes, recall=reached)


def _sample(items: Items, rows: int) -> np.ndarray:
    """Vectors of items that are evenly spaced in the table, (Q, Z) fp32."""
    step, kept, start = max(1, rows // QUERIES), [], 0
    for _, vectors in items.vectors():
        kept.append(vectors[-start % step :: step])
        start += len(vectors)
    return np.concatenate(kept)[:QUERIES]


def _exact_nearest(items: Items, queries: np.ndarray) -> list[set[str]]:
    """The ids of the nearest items of each query, by comparing it with all of them."""
    scores = np.full((len(queries), 0), 0, np.float32)
    ids = np.empty((len(queries), 0), object)
    for names, vectors in items.vectors():
        scores = np.concatenate([scores, queries @ vectors.T], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(np.array(names, object), (len(queries), len(names)))], axis=1)
        best = np.argsort(-scores, axis=1)[:, :NEAREST]
        scores, ids = np.take_along_axis(scores, best, axis=1), np.take_along_axis(ids, best, axis=1)
    return [set(row) for row in ids]
