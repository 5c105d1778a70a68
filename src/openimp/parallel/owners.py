"""Owners of Muon's matrices: each matrix is orthogonalized by one rank of those that share it.

Orthogonalizing is too much work to repeat on every rank. Nothing here communicates, so a plan can use it too.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Matrix:
    """One of the matrices that a weight stacks in its first dimension."""

    weight: Tensor
    index: int  # in the stack
    rows: tuple[int, ...]  # number of its rows that each rank holds, in the order of the ranks

    @property
    def columns(self) -> int:
        """Number of its columns, which are never sharded."""
        return self.weight.shape[-1]

    @property
    def work(self) -> int:
        """See `muon_work`."""
        return muon_work(sum(self.rows), self.columns)


def matrix_shape(weight: Tensor, count: int) -> tuple[int, int]:
    """Rows and columns of each matrix of a weight that stacks `count` of them, or of the weights of experts."""
    rows = weight.shape[1] if weight.ndim == 3 else weight.shape[0] // count
    return rows, weight.shape[-1]


def muon_work(rows: int, columns: int) -> int:
    """FLOPs of orthogonalizing a matrix, up to a constant factor."""
    small, large = sorted((rows, columns))
    return small * small * (2 * large + small)


def matrices_of(stacks: Mapping[Tensor, int], ranks: int) -> list[Matrix]:
    """All matrices of weights that are sharded over a number of ranks.

    `stacks` has the number of matrices of each weight. FSDP2 divides the rows of a two-dimensional weight like
    `torch.chunk`. It divides the rows of each expert evenly.
    """
    matrices = []
    for weight, count in stacks.items():
        rows, _ = matrix_shape(weight, count)
        if weight.ndim == 3:
            matrices += [Matrix(weight, i, (rows // ranks,) * ranks) for i in range(count)]
            continue
        rows_per_rank = -(-weight.shape[0] // ranks)
        bounds = [min(i * rows_per_rank, weight.shape[0]) for i in range(ranks + 1)]
        for i in range(count):
            # The bounds of the ranks' shards, as rows of matrix i.
            bounds_in_matrix = [min(max(bound - i * rows, 0), rows) for bound in bounds]
            matrices.append(Matrix(weight, i, tuple(end - start for start, end in pairwise(bounds_in_matrix))))
    return matrices


def assign_owners(items: Iterable[T], ranks: int, work: Callable[[T], int]) -> list[list[T]]:
    """For each rank, the items that it owns: matrices, or weights.

    Items are assigned in descending order of work, each to the rank that has the least work so far.
    """
    owned: list[list[T]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for item in sorted(items, key=work, reverse=True):
        owner = loads.index(min(loads))
        owned[owner].append(item)
        loads[owner] += work(item)
    return owned


def own_matrices(stacks: Mapping[Tensor, int], ranks: int) -> list[list[Matrix]]:
    """For each of the ranks that weights are sharded over, the matrices that it owns."""
    return assign_owners(matrices_of(stacks, ranks), ranks, lambda matrix: matrix.work)


def own_weights(stacks: Mapping[Tensor, int], ranks: int) -> list[list[Tensor]]:
    """For each of the ranks that have replicas of weights, the weights whose matrices it owns."""

    def work(weight: Tensor) -> int:
        return stacks[weight] * muon_work(*matrix_shape(weight, stacks[weight]))

    return assign_owners(stacks, ranks, work)
