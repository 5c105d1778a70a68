"""How the ranks divide Muon's work. Each class orthogonalizes the updates of weights with one kind of layout.

Its argument `updates` has bf16 updates: this rank's shard of each weight for which this rank keeps the momentum.
The result has the orthogonalized shards of all weights. A step takes one or two collectives per class, however many
matrices there are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from openimp.parallel.distributed import Group, node_group
from openimp.parallel.layout import local_shard
from openimp.parallel.owners import Matrix, matrix_shape, own_matrices, own_weights

Orthogonalize = Callable[[Sequence[Tensor]], None]
"""Replaces the matrices of tensors (N, rows, columns) by orthogonalized ones, in place."""
Updates = Mapping[Tensor, Tensor]


class Division(Protocol):
    """A set of weights whose work is divided in one way."""

    @property
    def kept(self) -> Sequence[Tensor]:
        """The weights whose momentum this rank keeps."""
        ...

    def orthogonalized(self, updates: Updates, orthogonalize: Orthogonalize) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields each weight that is updated in this step, and its orthogonalized update."""
        ...


def divide_work(stacks: Mapping[Tensor, int]) -> list[Division]:
    """Divides the matrices of Muon; `stacks` has the number that each weight stacks. All ranks must call this."""
    whole, replicated = dict[Tensor, int](), dict[Tensor, int]()
    sharded: dict[tuple[Any, int], dict[Tensor, int]] = {}  # by device mesh and its dimension
    for weight, count in stacks.items():
        if getattr(weight, "device_mesh", None) is None:
            whole[weight] = count
        elif local_shard(weight).shape == weight.shape:
            replicated[weight] = count
        elif mesh_dim := _sharded_over(weight):
            experts = len(local_shard(weight))  # This rank's, with expert parallelism.
            sharded.setdefault(mesh_dim, {})[weight] = experts if weight.ndim == 3 else count
        else:  # Each rank has whole experts.
            whole[weight] = count
    found: list[Division] = [WholeMatrices(whole)] if whole else []
    if replicated:
        found.append(ReplicatedMatrices(replicated, node_group()))
    for (mesh, dim), some in sharded.items():
        found.append(ShardedMatrices(some, mesh.get_group(dim)))
    return found


def _sharded_over(weight: Any) -> tuple[Any, int] | None:
    """The device mesh and its dimension over which the rows of a weight's matrices are sharded, if they are."""
    for dim, placement in enumerate(weight.placements):
        of_experts = weight.ndim == 3 and placement.is_shard(0)
        if placement.is_shard() and not of_experts and weight.device_mesh.size(dim) > 1:
            return weight.device_mesh, dim
    return None


class WholeMatrices:
    """This rank holds whole matrices, and no other rank has them, except in other replicas."""

    def __init__(self, stacks: Mapping[Tensor, int]) -> None:
        self.stacks, self.kept = stacks, [*stacks]

    def orthogonalized(self, updates: Updates, orthogonalize: Orthogonalize) -> Iterator[tuple[Tensor, Tensor]]:
        updated = [weight for weight in self.kept if weight in updates]
        orthogonalize([updates[w].view(-1, *matrix_shape(w, self.stacks[w])) for w in updated])
        for weight in updated:
            yield weight, updates[weight]


class ReplicatedMatrices:
    """Every rank holds a full replica. Each weight has an owner among the ranks of `group`.

    The owner alone keeps the weight's momentum. It orthogonalizes the update, and an all-gather sends it to the others.
    """

    def __init__(self, stacks: Mapping[Tensor, int], group: Group) -> None:
        self.stacks, self.group = stacks, group
        self.owned = own_weights(stacks, dist.get_world_size(group))
        self.kept = self.owned[dist.get_rank(group)]

    def orthogonalized(self, updates: Updates, orthogonalize: Orthogonalize) -> Iterator[tuple[Tensor, Tensor]]:
        updated = [[weight for weight in owned if weight.grad is not None] for owned in self.owned]
        sizes = [[weight.numel() for weight in weights] for weights in updated]
        largest = max(map(sum, sizes))
        if largest == 0:
            return
        own, device = updated[dist.get_rank(self.group)], local_shard(next(iter(self.stacks))).device
        orthogonalize([updates[w].view(-1, *matrix_shape(w, self.stacks[w])) for w in own])
        padding = torch.empty(largest - sum(w.numel() for w in own), dtype=torch.bfloat16, device=device)
        sent = torch.cat([*(updates[w].flatten() for w in own), padding])
        gathered = sent.new_empty(len(sizes) * largest)
        # torch 2.13 renamed it.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(gathered, sent, self.group)
        for weights, numbers, part in zip(updated, sizes, gathered.split(largest)):
            yield from zip(weights, part[: sum(numbers)].split(numbers))


class ShardedMatrices:
    """The rows of each matrix are sharded over the ranks of `group`, of which one owns the matrix.

    An all-to-all sends the shards of all matrices to their owners, which orthogonalize them. Another one returns to
    each rank its shards of the results. Every rank keeps the momentum of its shards.
    """

    def __init__(self, stacks: Mapping[Tensor, int], group: Group) -> None:
        self.group, self.rank, self.kept = group, dist.get_rank(group), [*stacks]
        self.owned = own_matrices(stacks, dist.get_world_size(group))
        self.matrices: dict[Tensor, list[Matrix]] = {weight: [] for weight in stacks}
        for matrix in sorted(chain.from_iterable(self.owned), key=lambda matrix: matrix.index):
            self.matrices[matrix.weight].append(matrix)

    def orthogonalized(self, updates: Updates, orthogonalize: Orthogonalize) -> Iterator[tuple[Tensor, Tensor]]:
        owned = [[matrix for matrix in matrices if matrix.weight in updates] for matrices in self.owned]
        own, order = owned[self.rank], [matrix for matrices in owned for matrix in matrices]
        if not order:
            return
        shards: dict[Matrix, Tensor] = {}  # of this rank
        for weight, matrices in self.matrices.items():
            if weight in updates:
                rows = updates[weight].view(-1, weight.shape[-1])
                shards |= zip(matrices, rows.split([matrix.rows[self.rank] for matrix in matrices]))
        sent = [sum(shards[matrix].numel() for matrix in matrices) for matrices in owned]
        sizes = [[matrix.rows[rank] * matrix.columns for matrix in own] for rank in range(len(owned))]

        ours = [shards[matrix] for matrix in order]
        received = self._all_to_all(ours, sent, [*map(sum, sizes)])
        parts = received.split([*chain.from_iterable(sizes)])
        whole = [torch.cat(parts[i :: len(own)]).view(1, -1, matrix.columns) for i, matrix in enumerate(own)]
        del received, parts  # `whole` is a copy, and the way back needs memory for two more.
        orthogonalize(whole)
        results = [x[0].split(matrix.rows) for x, matrix in zip(whole, own)]  # by matrix and rank
        returned = self._all_to_all([*chain.from_iterable(zip(*results))], [*map(sum, sizes)], sent)

        orthogonal = returned.split([shard.numel() for shard in ours])
        torch._foreach_copy_(ours, [x.view_as(shard) for x, shard in zip(orthogonal, ours)])
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
