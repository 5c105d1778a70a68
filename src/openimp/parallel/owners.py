"""Matrices that one rank updates for all.

Muon orthogonalizes every matrix that it updates, which is too much work to repeat on every replica.
"""

from collections.abc import Callable, Iterable, Sequence, Set
from typing import cast

import torch.distributed as dist
from torch import Tensor

from openimp.parallel.distributed import Group, rank, world_size
from openimp.parallel.layout import local_shard

BUCKET_BYTES = 2**24
"""Size of the buffers in which updated matrices are sent."""


class MatrixOwners:
    """Assigns each matrix that all ranks hold to the rank that updates it. Only that rank has its optimizer state.

    Sharded matrices have no owner: all ranks update them together.

    Attributes:
        owned: the matrices of each rank.
    """

    def __init__(self, matrices: Iterable[Tensor], steps: Iterable[Set[Tensor]]) -> None:
        """Assigns the matrices.

        Args:
            matrices: those that Muon updates.
            steps: the parameters that each kind of step updates.
        """
        replicated = [m for m in matrices if world_size() > 1 and local_shard(m).shape == m.shape]
        self.owned = assign_owners(replicated, steps, world_size(), muon_work)

    def updated_here(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """The parameters that this rank updates: all but the matrices of other ranks."""
        others = {matrix for owner, owned in enumerate(self.owned) if owner != rank() for matrix in owned}
        return [parameter for parameter in parameters if parameter not in others]

    def broadcast_updates(self) -> None:
        """Sends every matrix that has a gradient from its owner, which has updated it, to all other ranks."""
        for owner, owned in enumerate(self.owned):
            if updated := [local_shard(matrix.detach()) for matrix in owned if matrix.grad is not None]:
                dist._broadcast_coalesced(cast(Group, dist.group.WORLD), updated, BUCKET_BYTES, owner)


def assign_owners(
    tensors: Iterable[Tensor], steps: Iterable[Set[Tensor]], ranks: int, work: Callable[[Tensor], int]
) -> Sequence[list[Tensor]]:
    """The tensors of each rank. The largest is assigned first, and each to the rank with the least work in the kinds of
    steps that update it."""
    owned: list[list[Tensor]] = [[] for _ in range(ranks)]
    loads = [(step, [0] * ranks) for step in dict.fromkeys(map(frozenset, steps))]
    for tensor in sorted(tensors, key=work, reverse=True):
        concerned = [load for step, load in loads if tensor in step]
        least = min(range(ranks), key=lambda rank: sum(load[rank] for load in concerned))
        owned[least].append(tensor)
        for load in concerned:
            load[least] += work(tensor)
    return owned


def muon_work(matrix: Tensor) -> int:
    """FLOPs of orthogonalizing a matrix, up to a constant factor."""
    return matrix.numel() * min(matrix.shape)
