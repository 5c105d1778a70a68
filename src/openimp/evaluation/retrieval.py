"""Retrieval between two modalities of a source, in both directions.

Shape suffixes: N queries, n of them in a block, M candidates, E correct pairs, e of them in a block, Z dimensions of
the shared embedding space.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openimp.data.tables import Table
from openimp.evaluation.evaluator import MAX_NAMED_ROWS, Evaluator, Predicted, ReadableRows, readable_rows
from openimp.evaluation.metrics import interval
from openimp.recipe.evaluation import Retrieval

MAX_SIMILARITIES = 2**22
"""Maximum number of similarities in memory at once (16 MiB)."""


class RankedCandidate(NamedTuple):
    """The index of a candidate, its similarity to the query, and whether it is correct."""

    candidate: int
    similarity: float
    correct: bool


@dataclass(frozen=True)
class RetrievalResult(Predicted):
    """One direction of a retrieval set: items of the modality `query` retrieve items of `target` (see `Predicted`)."""

    rank: np.ndarray  # (N,) int64, the rank from 1 of each query's best correct candidate
    correct_pairs: np.ndarray  # (E, 2) int64, all correct pairs (query, candidate)
    query_row: np.ndarray  # (N,) int64, for each query, the first row of the source that has it
    candidate_row: np.ndarray  # (M,) int64, for each candidate, the first row of the source that has it
    query_NZ: Tensor  # unit vectors; zeros for a text without a word that the model knows
    candidate_MZ: Tensor
    rows_of_unknown_texts: list[str]  # for each text without a word that the model knows, the name of its first row

    def answers(self, query_index: int, k: int) -> list[RankedCandidate]:
        """The `k` candidates most similar to a query, in order. If none is correct, the best correct one follows.

        In a tie, wrong candidates come first. So the best correct candidate is at position `rank[query_index]` of all
        candidates, unless a similarity is NaN.
        """
        similarity_M = (self.candidate_MZ @ self.query_NZ[query_index]).cpu().numpy()
        correct_candidates = self.correct_pairs[self.correct_pairs[:, 0] == query_index, 1]
        correct_M = np.zeros(len(similarity_M), bool)
        correct_M[correct_candidates] = True
        order = np.lexsort((correct_M, -similarity_M))  # by descending similarity; in a tie, wrong candidates first
        chosen = list(order[:k])
        if not correct_M[chosen].any():
            correct_in_order = order[correct_M[order]]
            chosen.append(correct_in_order[0])
        return [RankedCandidate(int(i), float(similarity_M[i]), bool(correct_M[i])) for i in chosen]

    def metrics(self) -> dict[str, Any]:
        """R@1, R@5, R@10, median rank, mean reciprocal rank, chance, the 95 % interval of R@1, and numbers of items."""
        candidates = len(self.candidate_row)
        return {
            "n": len(self.rank),
            "candidates": candidates,
            **{f"r{k}": float((self.rank <= k).mean()) for k in (1, 5, 10)},
            "interval": interval(self.rank == 1),
            "median_rank": float(np.median(self.rank)),
            "mrr": float((1 / self.rank).mean()),
            # R@1 of a random order: the share of correct candidates, averaged over the queries.
            "chance": len(self.correct_pairs) / len(self.rank) / candidates,
            "unknown": len(self.rows_of_unknown_texts),
            "unknown_rows": self.rows_of_unknown_texts[:MAX_NAMED_ROWS],
        }


def retrieve(
    evaluator: Evaluator, options: Retrieval, error_prefix: str, table: Table
) -> tuple[list[RetrievalResult], ReadableRows]:
    """Retrieves in both directions. Also returns the rows that could be read, because only they count.

    Equal values of a modality are one item. A pair of items is correct if any row has both. For example, recordings of
    242 notes with the names of 109 instruments make 109 texts, and all notes of an instrument are correct for its name.
    """
    a, b = options.inputs  # the names of two modalities
    # With `space: disjoint`, a modality has a head for each modality that it is compared with; `towards` selects it.
    encoded_by_modality = {
        a: evaluator.encode(options, a, table, towards=b),
        b: evaluator.encode(options, b, table, towards=a),
    }
    readable = readable_rows(table, list(encoded_by_modality.values()), error_prefix)
    rows = readable.row
    vectors = {}  # by modality: of each item
    first_row_of_item = {}  # by modality: for each item, the first row of the source that has it
    item_of_row = {}  # by modality: for each readable row, the index of its item in the vectors
    for modality, encoded in encoded_by_modality.items():
        # Items that occur in unreadable rows only are neither queries nor candidates.
        indices, first_index, inverse = np.unique(encoded.embedding_index[rows], return_index=True, return_inverse=True)
        vectors[modality] = encoded.embeddings[torch.from_numpy(indices)]
        first_row_of_item[modality] = rows[first_index]
        item_of_row[modality] = inverse
    pairs = np.unique(np.stack([item_of_row[a], item_of_row[b]], axis=1), axis=0)
    # Only texts without a known word have zero vectors.
    rows_of_unknown_texts = [
        table.row_name(row)
        for modality, vectors_NZ in vectors.items()
        for row in first_row_of_item[modality][~vectors_NZ.any(1).cpu().numpy()]
    ]
    directions = [
        RetrievalResult(
            query=query,
            target=target,
            rank=ranks(vectors[query], vectors[target], correct),
            correct_pairs=correct,
            query_row=first_row_of_item[query],
            candidate_row=first_row_of_item[target],
            query_NZ=vectors[query],
            candidate_MZ=vectors[target],
            rows_of_unknown_texts=rows_of_unknown_texts,
        )
        for query, target, correct in ((a, b, pairs), (b, a, pairs[:, ::-1]))
    ]
    return directions, readable


@torch.inference_mode()
def ranks(queries_NZ: Tensor, candidates_MZ: Tensor, pairs: np.ndarray, limit: int = MAX_SIMILARITIES) -> np.ndarray:
    """(N,) int64, the rank from 1 of each query's best correct candidate by dot product.

    Ties count against the model: a wrong candidate that is as similar as the best correct one ranks before it. A model
    that returns the same vector for everything, or NaN, therefore finds nothing. `pairs` (E, 2) int64 are the correct
    pairs (query, candidate), distinct, at least one per query. At most `limit` similarities are in memory at once,
    unless a single query has more.
    """
    block_size = max(1, limit // len(candidates_MZ))
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    rank_blocks = []
    for start in range(0, len(queries_NZ), block_size):
        similarity_nM = queries_NZ[start : start + block_size] @ candidates_MZ.T
        first_pair, end_pair = np.searchsorted(pairs[:, 0], [start, start + len(similarity_nM)])
        block_pairs = torch.from_numpy(pairs[first_pair:end_pair]).to(similarity_nM.device)
        query_e = block_pairs[:, 0] - start  # as an index in the block
        candidate_e = block_pairs[:, 1]
        correct_similarity_e = similarity_nM[query_e, candidate_e]
        best_n = similarity_nM.new_full((len(similarity_nM),), -torch.inf).scatter_reduce(
            0, query_e, correct_similarity_e, "amax"
        )
        # `not <` instead of `>=`, so that every comparison with NaN counts against the model.
        not_below_n = (~(similarity_nM < best_n[:, None])).sum(1)
        # Rank = 1 + wrong candidates not below `best_n`
        #      = 1 + all candidates not below `best_n` - correct candidates not below `best_n`.
        not_below_e = ~(correct_similarity_e < best_n[query_e])
        correct_not_below_n = torch.zeros_like(not_below_n).index_add(0, query_e, not_below_e.long())
        rank_blocks.append(1 + not_below_n - correct_not_below_n)
    return torch.cat(rank_blocks).cpu().numpy()
