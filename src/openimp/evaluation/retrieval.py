"""Retrieval between two modalities of a source, both ways.

Shape suffixes: N queries, M candidates, E correct pairs, Z features of the common space.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openimp.common.modality import Modality
from openimp.data.tables import Table
from openimp.encoding.items import Encoded, Progress, encode_input, require_columns, require_pair
from openimp.evaluation.figures import Readable, interval, readable_rows
from openimp.model.embedder import Embedder
from openimp.recipe.evaluation import Retrieval
from openimp.recipe.schema import Recipe

SIMILARITIES = 2**22
"""Similarities that are held at once (16 MiB)."""


@dataclass(frozen=True)
class Answer:
    """A candidate that is offered to a query.

    Attributes:
        candidate: its number.
        similarity: the dot product of the two unit vectors.
        right: whether it is correct.
    """

    candidate: int
    similarity: float
    right: bool


@dataclass(frozen=True)
class Retrieved:
    """One direction of an evaluation set, for its figures and for a closer look.

    Attributes:
        query, target: the modalities.
        rank: (N,) int64, the rank from 1 of each query's best correct candidate.
        correct: (E, 2) int64, every correct pair (query, candidate).
        query_row, target_row: a row of the source that shows each query and each candidate.
        query_NZ, target_MZ: their unit vectors.
    """

    query: str
    target: str
    rank: np.ndarray
    correct: np.ndarray
    query_row: np.ndarray
    target_row: np.ndarray
    query_NZ: Tensor
    target_MZ: Tensor

    @property
    def task(self) -> str:
        """What a result calls it."""
        return f"{self.query} -> {self.target}"

    def answers(self, query: int, k: int) -> list[Answer]:
        """The `k` candidates most similar to a query, in order, then the best correct one if it is not among them.

        Where they tie, a wrong candidate stands before a correct one, so that the best correct one has its `rank`.
        """
        similar_M = (self.target_MZ @ self.query_NZ[query]).cpu().numpy()
        right_M = np.zeros(len(similar_M), bool)
        right_M[self.correct[self.correct[:, 0] == query, 1]] = True
        against_M = np.where(right_M, -np.inf, np.inf)  # NaN counts against the model too.
        order = np.lexsort((right_M, -np.where(np.isnan(similar_M), against_M, similar_M)))
        chosen = [*order[:k], *(order[right_M[order]][:1] if not right_M[order[:k]].any() else [])]
        return [Answer(int(i), float(similar_M[i]), bool(right_M[i])) for i in chosen]

    def figures(self) -> dict[str, Any]:
        """R@1, R@5, R@10, median rank, mean reciprocal rank, chance, and the 95 % interval of R@1."""
        candidates = len(self.target_row)
        return {
            "n": len(self.rank),
            "candidates": candidates,
            **{f"r{k}": float((self.rank <= k).mean()) for k in (1, 5, 10)},
            "interval": interval(self.rank == 1),
            "median_rank": float(np.median(self.rank)),
            "mrr": float((1 / self.rank).mean()),
            # The mean over the queries of correct / all candidates.
            "chance": len(self.correct) / len(self.rank) / candidates,
        }


def retrieve(
    model: Embedder,
    recipe: Recipe,
    modalities: dict[str, Modality],
    name: str,
    table: Table,
    progress: Progress | None = None,
) -> tuple[list[Retrieved], Readable]:
    """Both directions of one evaluation set, and its rows that counted.

    Values of a modality that are equal are one item, and a pair is correct if any row has it: 250 notes of 104
    instruments have 104 names as candidates, and for a name all notes of the instrument are correct.

    Raises:
        UserError: a column is missing, no row can be read, or the two modalities share no space.
    """
    options = recipe.evaluation.sets[name]
    assert isinstance(options, Retrieval)
    where = f"evaluation.sets.{name}"
    a, b = options.inputs
    check(model, modalities, options, where, table)
    encoded: dict[str, Encoded] = {
        side: encode_input(model, recipe, modalities, options, side, table, other, progress)
        for side, other in ((a, b), (b, a))
    }
    counted = readable_rows(table, list(encoded.values()), where)
    rows = counted.row
    # Items that no readable row has are neither asked for nor offered.
    shown = {side: np.unique(encoded[side].item[rows], return_index=True, return_inverse=True) for side in (a, b)}
    pairs = np.unique(np.stack([shown[a][2], shown[b][2]], axis=1), axis=0)
    vectors = {side: encoded[side].embeddings[torch.from_numpy(shown[side][0])] for side in (a, b)}
    found = []
    for query, target, correct in ((a, b, pairs), (b, a, pairs[:, ::-1])):
        rank = ranks(vectors[query], vectors[target], correct)
        query_row, target_row = rows[shown[query][1]], rows[shown[target][1]]
        found.append(Retrieved(query, target, rank, correct, query_row, target_row, vectors[query], vectors[target]))
    return found, counted


def check(model: Embedder, modalities: dict[str, Modality], options: Retrieval, where: str, table: Table) -> None:
    """Finds what would stop `retrieve`, without encoding anything.

    Raises:
        UserError: as `retrieve`.
    """
    a, b = options.inputs
    require_pair(model, a, b, where)
    for side, spec in options.inputs.items():
        require_columns(table, modalities[side], spec, where)


@torch.inference_mode()
def ranks(queries_NZ: Tensor, candidates_MZ: Tensor, correct: np.ndarray, limit: int = SIMILARITIES) -> np.ndarray:
    """The rank from 1 of each query's best correct candidate by dot product.

    A tie counts against the model: a wrong candidate as similar as the best correct one stands before it. So a model
    that gives everything the same vector, or NaN, finds nothing.

    Args:
        queries_NZ, candidates_MZ: vectors on one device.
        correct: (E, 2) the correct pairs (query, candidate), distinct, at least one for each query.
        limit: similarities that are held at once, at least one query's.

    Returns:
        (N,) int64.
    """
    step = max(1, limit // len(candidates_MZ))
    correct = correct[np.argsort(correct[:, 0], kind="stable")]
    found = []
    for start in range(0, len(queries_NZ), step):
        similar_nM = queries_NZ[start : start + step] @ candidates_MZ.T
        first, last = np.searchsorted(correct[:, 0], [start, start + len(similar_nM)])
        query_E, candidate_E = torch.from_numpy(correct[first:last].copy()).to(similar_nM.device).unbind(1)
        query_E = query_E - start
        right_E = similar_nM[query_E, candidate_E]
        best_n = similar_nM.new_full((len(similar_nM),), -torch.inf).scatter_reduce(0, query_E, right_E, "amax")
        # Not `>=`, which NaN would pass by unseen.
        before_n = (~(similar_nM < best_n[:, None])).sum(1)
        right_before_n = torch.zeros_like(before_n).index_add(0, query_E, (~(right_E < best_n[query_E])).long())
        found.append(1 + before_n - right_before_n)
    return torch.cat(found).cpu().numpy()
