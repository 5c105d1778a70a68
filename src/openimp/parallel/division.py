"""How the ranks divide Muon's work. Each class orthogonalizes the updates of weights with one kind of layout.

The attribute `kept` of a class has the weights whose momentum this rank keeps. The method `orthogonalized` takes this
rank's shards of their updates in bf16, and may change them. It yields each weight that is updated in this step, and
this rank's shard of its orthogonalized update. A step takes one or two collectives per class, however many matrices
there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openimp.parallel.distributed import Group, node_group
from openimp.parallel.layout import local_shard
from openimp.parallel.newton_schulz import orthogonalize_in_batches
from openimp.parallel.owners import Matrix, matrix_shape, own_matrices, own_weights

Updates = Mapping[Tensor, Tensor]
"""This rank's shard of the update of each weight."""


def divide_work(stacks: Mapping[Tensor, int]) -> "list[WholeMatrices | ReplicatedMatrices | ShardedMatrices]":
    """Divides the matrices of Muon; `stacks` has the number that each weight stacks. All ranks must call this."""
    whole: dict[Tensor, int] = {}
    replicated: dict[Tensor, int] = {}
    sharded: dict[tuple[Any, int], dict[Tensor, int]] = {}  # by device mesh and its dimension
    for weight, count in stacks.items():
        if not hasattr(weight, "device_mesh"):
            whole[weight] = count
        elif local_shard(weight).shape == weight.shape:
            replicated[weight] = count
        elif mesh_dim := _sharded_over(weight):
            local_experts = len(local_shard(weight))
            sharded.setdefault(mesh_dim, {})[weight] = local_experts if weight.ndim == 3 else count
        else:  # Each rank has whole experts.
            whole[weight] = count
    divisions: list[WholeMatrices | ReplicatedMatrices | ShardedMatrices] = []
    if whole:
        divisions.append(WholeMatrices(whole))
    if replicated:
        divisions.append(ReplicatedMatrices(replicated, node_group()))
    for (mesh, dim), weights in sharded.items():
        divisions.append(ShardedMatrices(weights, mesh.get_group(dim)))
    return divisions


def _sharded_over(weight: Any) -> tuple[Any, int] | None:
    """The device mesh and its dimension over which the rows of a weight's matrices are sharded, if they are."""
    for dim, placement in enumerate(weight.placements):
        shards_experts = weight.ndim == 3 and placement.is_shard(0)
        if placement.is_shard() and not shards_experts and weight.device_mesh.size(dim) > 1:
            return weight.device_mesh, dim
    return None


class WholeMatrices:
    """This rank holds whole matrices, and no other rank has them, except in other replicas."""

    def __init__(self, stacks: Mapping[Tensor, int]) -> None:
        self.stacks = stacks
        self.kept = [*stacks]

    def orthogonalized(self, updates: Updates) -> Iterator[tuple[Tensor, Tensor]]:
        updated = [weight for weight in self.kept if weight in updates]
        _orthogonalize(updated, updates, self.stacks)
        for weight in updated:
            yield weight, updates[weight]


class ReplicatedMatrices:
    """Every rank holds a full replica. Each weight has an owner among the ranks of `group`.

    The owner alone keeps the weight's momentum. It orthogonalizes the update, and an all-gather sends it to the others.
    """

    def __init__(self, stacks: Mapping[Tensor, int], group: Group) -> None:
        self.stacks = stacks
        self.group = group
        self.rank = dist.get_rank(group)
        self.owned = own_weights(stacks, dist.get_world_size(group))
        self.kept = self.owned[self.rank]

    def orthogonalized(self, updates: Updates) -> Iterator[tuple[Tensor, Tensor]]:
        updated = [[weight for weight in weights if weight.grad is not None] for weights in self.owned]
        sizes = [[weight.numel() for weight in weights] for weights in updated]
        largest = max(map(sum, sizes))
        if largest == 0:
            return
        _orthogonalize(updated[self.rank], updates, self.stacks)
        device = local_shard(next(iter(self.stacks))).device
        sent = torch.zeros(largest, dtype=torch.bfloat16, device=device)
        if updated[self.rank]:
            sent[: sum(sizes[self.rank])] = torch.cat([updates[weight].flatten() for weight in updated[self.rank]])
        gathered = sent.new_empty(len(sizes) * largest)
        # torch 2.13 renamed it.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(gathered, sent, self.group)
        for weights, weight_sizes, part in zip(updated, sizes, gathered.split(largest)):
            yield from zip(weights, part[: sum(weight_sizes)].split(weight_sizes))


class ShardedMatrices:
    """The rows of each matrix are sharded over the ranks of `group`, of which one owns the matrix.

    An all-to-all sends the shards of all matrices to their owners, which orthogonalize the matrices. A second
    all-to-all returns to each rank its shards of the results. Every rank keeps the momentum of its shards.
    """

    def __init__(self, stacks: Mapping[Tensor, int], group: Group) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.kept = [*stacks]
        self.owned = own_matrices(stacks, dist.get_world_size(group))
        self.matrices: dict[Tensor, list[Matrix]] = {weight: [] for weight in stacks}
        for matrix in sorted(chain.from_iterable(self.owned), key=lambda matrix: matrix.index):
            self.matrices[matrix.weight].append(matrix)

    def orthogonalized(self, updates: Updates) -> Iterator[tuple[Tensor, Tensor]]:
        by_owner = [[matrix for matrix in matrices if matrix.weight in updates] for matrices in self.owned]
        owned = by_owner[self.rank]
        if not any(by_owner):
            return
        shards: dict[Matrix, Tensor] = {}  # of this rank
        for weight, matrices in self.matrices.items():
            if weight in updates:
                rows = updates[weight].view(-1, weight.shape[-1])
                shards |= zip(matrices, rows.split([matrix.rows[self.rank] for matrix in matrices]))
        local_shards = [shards[matrix] for matrix in chain.from_iterable(by_owner)]
        sizes_to_owners = [sum(shards[matrix].numel() for matrix in matrices) for matrices in by_owner]
        shard_sizes = [[matrix.rows[rank] * matrix.columns for matrix in owned] for rank in range(len(by_owner))]
        sizes_from_ranks = [*map(sum, shard_sizes)]

        received = self._all_to_all(local_shards, sizes_to_owners, sizes_from_ranks)
        parts = received.split([*chain.from_iterable(shard_sizes)])
        whole = [torch.cat(parts[i :: len(owned)]).view(1, -1, matrix.columns) for i, matrix in enumerate(owned)]
        del received, parts  # `whole` is a copy, and the second all-to-all needs memory for two more.
        orthogonalize_in_batches(whole)
        results = [x[0].split(matrix.rows) for x, matrix in zip(whole, owned)]  # by matrix and rank
        returned = self._all_to_all([*chain.from_iterable(zip(*results))], sizes_from_ranks, sizes_to_owners)

        orthogonal = returned.split([shard.numel() for shard in local_shards])
        torch._foreach_copy_(local_shards, [x.view_as(shard) for x, shard in zip(orthogonal, local_shards)])
        for weight in self.kept:
            if weight in updates:
                yield weight, updates[weight]

    def _all_to_all(self, parts: Sequence[Tensor], sent: list[int], received: list[int]) -> Tensor:
        """Sends `sent[i]` numbers to rank i, and receives `received[i]` from it."""
        empty = torch.empty(0, dtype=torch.bfloat16, device=local_shard(self.kept[0]).device)
        sending = torch.cat([empty, *(part.flatten() for part in parts)])
        receiving = sending.new_empty(sum(received))
        dist.all_to_all_single(receiving, sending, received, sent, self.group)
        return receiving


def _orthogonalize(weights: Sequence[Tensor], updates: Updates, stacks: Mapping[Tensor, int]) -> None:
    """Orthogonalizes the updates of unsharded weights in place."""
    shapes = [matrix_shape(weight, stacks[weight]) for weight in weights]
    orthogonalize_in_batches([updates[weight].view(-1, *shape) for weight, shape in zip(weights, shapes)])
