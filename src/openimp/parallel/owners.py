"""Division of Muon's work: each replicated matrix has an owner, the rank that updates it and sends it to all others.

Muon orthogonalizes every matrix that it updates, which is too much work to repeat on every rank.
"""

from collections.abc import Callable, Iterable, Sequence, Set
from typing import cast

import torch.distributed as dist
from torch import Tensor

from openimp.parallel.distributed import Group, rank, world_size
from openimp.parallel.layout import local_shard

BUCKET_BYTES = 2**24
"""Size of the buffers in which updated matrices are broadcast."""


class MatrixOwners:
    """Assigns an owner to each matrix that every rank holds whole. Only the owner has its optimizer state.

    Sharded matrices have no owner: all ranks update them together.

    Attributes:
        owned: for each rank, the matrices that it owns.
    """

    def __init__(self, matrices: Iterable[Tensor], updated_sets: Iterable[Set[Tensor]]) -> None:
        """Assigns the matrices of Muon. `updated_sets` has the parameters that each kind of step updates."""
        replicated = [m for m in matrices if world_size() > 1 and local_shard(m).shape == m.shape]
        self.owned = assign_owners(replicated, updated_sets, world_size(), muon_work)

    def updated_by_this_rank(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """All given parameters except the matrices that other ranks own."""
        others = {matrix for owner, owned in enumerate(self.owned) if owner != rank() for matrix in owned}
        return [parameter for parameter in parameters if parameter not in others]

    def broadcast_updates(self) -> None:
        """Sends each matrix that has a gradient from its owner to all other ranks, after the owner has updated it."""
        for owner, owned in enumerate(self.owned):
            if updated := [local_shard(matrix.detach()) for matrix in owned if matrix.grad is not None]:
                dist._broadcast_coalesced(cast(Group, dist.group.WORLD), updated, BUCKET_BYTES, owner)


def assign_owners(
    tensors: Iterable[Tensor], updated_sets: Iterable[Set[Tensor]], ranks: int, work: Callable[[Tensor], int]
) -> Sequence[list[Tensor]]:
    """For each rank, the tensors that it owns.

    Tensors are assigned in descending order of work. Each goes to the rank that has the least work so far in the kinds
    of steps that update this tensor.
    """
    owned: list[list[Tensor]] = [[] for _ in range(ranks)]
    loads = [(updated, [0] * ranks) for updated in dict.fromkeys(map(frozenset, updated_sets))]
    for tensor in sorted(tensors, key=work, reverse=True):
        affected = [load for updated, load in loads if tensor in updated]
        least = min(range(ranks), key=lambda rank: sum(load[rank] for load in affected))
        owned[least].append(tensor)
        for load in affected:
            load[least] += work(tensor)
    return owned


def muon_work(matrix: Tensor) -> int:
    """FLOPs of orthogonalizing a matrix, up to a constant factor."""
    return matrix.numel() * min(matrix.shape[-2:])
