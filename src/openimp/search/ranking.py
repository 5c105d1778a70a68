"""Orders the results of a search: of several kinds of items, and of several rankings."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from openimp.common.errors import UserError
from openimp.search.query import EncodedQuery, Hit, Space

RANK_CONSTANT = 60
"""Of reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009): the larger, the less the first ranks count."""
PRIOR = 5
"""Items with the usual variance that are added to each group, so that the variance of three items is not left to
chance."""


class Spread(NamedTuple):
    """Mean and variance of the cosines of a query with the items of a group, or with a sample of them.

    In many models, one modality is closer to every query than another: for example, each sound closer than any picture.
    So cosines of different groups are compared by how far they are above the others of their group.
    """

    mean: float
    variance: float
    items: int  # of the group

    def excess(self, cosine: float, usual_variance: float) -> float:
        """How far a cosine is above the mean of the group's other items, in their standard deviations.

        Their variance is estimated as if `PRIOR` more items had the variance that is usual in the groups.
        """
        others = self.items - 1
        if others == 0:
            return 0.0
        above_others = (cosine - self.mean) * self.items / others
        # The sum of the squared deviations of the other items.
        squares = self.items * self.variance - above_others * (cosine - self.mean)
        variance = (max(squares, 0.0) + PRIOR * usual_variance) / (others + PRIOR)
        return above_others / (variance + 1e-12) ** 0.5


def by_excess(hits_and_spreads: Sequence[tuple[Sequence[Hit], Spread]]) -> list[Hit]:
    """The hits of several groups, in the order of their `Spread.excess`."""
    usual_variance = fmean([spread.variance for _, spread in hits_and_spreads] or [0.0])
    excess_and_hits = [
        (spread.excess(hit.score or 0.0, usual_variance), hit) for hits, spread in hits_and_spreads for hit in hits
    ]
    return [hit for _, hit in sorted(excess_and_hits, key=lambda pair: -pair[0])]


def unit_vector(parts: Sequence[EncodedQuery], space: Space) -> np.ndarray | None:
    """The direction (Z,) of the weighted sum of the parts of a query in a space.

    Texts of unknown words do not count. None: another part is not in this space, or no part is left.
    """
    known = [part for part in parts if part.vectors]
    if not known or not all(space in part.vectors for part in known):
        return None
    total = sum(part.weight * part.vectors[space] for part in known)
    assert isinstance(total, np.ndarray)
    length = np.linalg.norm(total)
    if length < 1e-3:
        raise UserError("the queries cancel each other out")
    return total / length


def merged(rankings: Iterable[Sequence[Hit]], under: str | Path | None) -> list[Hit]:
    """Merges rankings by the sum of reciprocal ranks, the largest first."""
    sums: dict[str, float] = defaultdict(float)
    hits: dict[str, Hit] = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, start=1):
            key = result_key(hit, under)
            sums[key] += 1 / (RANK_CONSTANT + rank)
            first_hit = hits.setdefault(key, hit)
            if first_hit.found_by != hit.found_by:
                hits[key] = replace(first_hit, found_by="both")
    return [hits[key] for key in sorted(hits, key=lambda key: -sums[key])]


def result_key(hit: Hit, under: str | Path | None) -> str:
    """Hits with equal keys are one result: the segments of a file, or an item."""
    return hit.path if stands_for_file(hit, under) else hit.id


def stands_for_file(hit: Hit, under: str | Path | None) -> bool:
    """Whether a hit is a segment that stands for its whole file. It does not if `under` is that file."""
    return hit.start is not None and (under is None or hit.path not in paths_of(under))


def paths_of(under: str | Path) -> tuple[str, str]:
    """`under` as the path of a row (SOURCE/ROW/COLUMN), and as the path of a file."""
    return str(under), os.path.abspath(under)
