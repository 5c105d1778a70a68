"""Retrieval between two modalities of a source, in both directions.

Shape suffixes: N queries, M candidates, E correct pairs, Z features of the common space.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openimp.data.tables import Table
from openimp.encoding.items import require_columns, require_pair
from openimp.evaluation.evaluator import Evaluator, Predicted, Readable, readable_rows
from openimp.evaluation.metrics import interval
from openimp.recipe.evaluation import Retrieval

SIMILARITIES = 2**22
"""Maximum number of similarities that are in memory at once (16 MiB)."""


class Answer(NamedTuple):
    """A candidate for a query by its index, with its similarity to the query, and whether it is correct."""

    candidate: int
    similarity: float
    right: bool


@dataclass(frozen=True)
class Retrieved(Predicted):
    """One direction of a retrieval set."""

    rank: np.ndarray  # (N,) int64, the rank from 1 of each query's best correct candidate
    correct: np.ndarray  # (E, 2) int64, all correct pairs (query, candidate)
    query_row: np.ndarray  # for each query, a row of the source that has it
    target_row: np.ndarray  # for each candidate, a row of the source that has it
    query_NZ: Tensor  # unit vectors
    target_MZ: Tensor

    def answers(self, query: int, k: int) -> list[Answer]:
        """The `k` candidates most similar to a query, in order, then the best correct one if it is not among them.

        In a tie, wrong candidates come first, so the best correct candidate is at its `rank`.
        """
        similar_M = (self.target_MZ @ self.query_NZ[query]).cpu().numpy()
        right_M = np.zeros(len(similar_M), bool)
        right_M[self.correct[self.correct[:, 0] == query, 1]] = True
        against_M = np.where(right_M, -np.inf, np.inf)  # NaN counts against the model, too.
        order = np.lexsort((right_M, -np.where(np.isnan(similar_M), against_M, similar_M)))
        chosen = [*order[:k], *(order[right_M[order]][:1] if not right_M[order[:k]].any() else [])]
        return [Answer(int(i), float(similar_M[i]), bool(right_M[i])) for i in chosen]

    def metrics(self) -> dict[str, Any]:
        """R@1, R@5, R@10, median rank, mean reciprocal rank, chance, and the 95 % interval of R@1."""
        candidates = len(self.target_row)
        return {
            "n": len(self.rank),
            "candidates": candidates,
            **{f"r{k}": float((self.rank <= k).mean()) for k in (1, 5, 10)},
            "interval": interval(self.rank == 1),
            "median_rank": float(np.median(self.rank)),
            "mrr": float((1 / self.rank).mean()),
            # The share of correct candidates, averaged over the queries.
            "chance": len(self.correct) / len(self.rank) / candidates,
        }


def check(evaluator: Evaluator, options: Retrieval, where: str, table: Table) -> None:
    """Raises UserError if a column is missing or the two modalities share no space. Nothing is encoded."""
    a, b = options.inputs
    require_pair(evaluator.model, a, b, where)
    for side, spec in options.inputs.items():
        require_columns(table, evaluator.modalities[side], spec, where)


def retrieve(evaluator: Evaluator, options: Retrieval, where: str, table: Table) -> tuple[list[Retrieved], Readable]:
    """Retrieves in both directions, and returns the rows that could be read.

    Equal values of a modality are one item. A pair is correct if any row has it. For example, 250 notes of 104
    instruments make 104 candidates by name, and for a name, all notes of the instrument are correct.
    """
    a, b = options.inputs
    encoded = {side: evaluator.encode(options, side, table, other) for side, other in ((a, b), (b, a))}
    readable = readable_rows(table, list(encoded.values()), where)
    rows = readable.row
    # Items that occur in unreadable rows only are neither queries nor candidates.
    shown = {side: np.unique(encoded[side].item[rows], return_index=True, return_inverse=True) for side in (a, b)}
    pairs = np.unique(np.stack([shown[a][2], shown[b][2]], axis=1), axis=0)
    vectors = {side: encoded[side].embeddings[torch.from_numpy(shown[side][0])] for side in (a, b)}
    found = []
    for query, target, correct in ((a, b, pairs), (b, a, pairs[:, ::-1])):
        rank = ranks(vectors[query], vectors[target], correct)
        query_row, target_row = rows[shown[query][1]], rows[shown[target][1]]
        found.append(Retrieved(query, target, rank, correct, query_row, target_row, vectors[query], vectors[target]))
    return found, readable


@torch.inference_mode()
def ranks(queries_NZ: Tensor, candidates_MZ: Tensor, correct: np.ndarray, limit: int = SIMILARITIES) -> np.ndarray:
    """(N,) int64, the rank from 1 of each query's best correct candidate by dot product.

    Ties count against the model: a wrong candidate that is as similar as the best correct one ranks before it. A model
    that returns the same vector for everything, or NaN, therefore finds nothing. `correct` (E, 2) int64 has the correct
    pairs (query, candidate), distinct, at least one per query. `limit` similarities are in memory at once, but at least
    those of one query.
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
        # Not `>=`, which is false for NaN.
        before_n = (~(similar_nM < best_n[:, None])).sum(1)
        right_before_n = torch.zeros_like(before_n).index_add(0, query_E, (~(right_E < best_n[query_E])).long())
        found.append(1 + before_n - right_before_n)
    return torch.cat(found).cpu().numpy()
