"""What one GPU holds of a model in a layout, and the collectives of its weights and gradients."""

from collections.abc import Iterable, Mapping, Set
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from openimp.common.device import Precision
from openimp.model.embedder import Embedder
from openimp.parallel.layout import Layout
from openimp.parallel.muon import batches_by_shape
from openimp.parallel.owners import matrix_shape, muon_work, own_matrices, own_weights
from openimp.planning.communication import Collective, Group
from openimp.planning.gpus import NODE


class Mesh(NamedTuple):
    """The groups of ranks over which weights are sharded, and between which shards are replicated."""

    shards: Group
    replicas: Group


class UnitTraffic(NamedTuple):
    """Collectives of the weights that FSDP2 gathers together, such as those of a block: to gather them, and to
    reduce-scatter and then all-reduce their gradients."""

    gather: list[Collective]
    scatter: list[Collective]
    reduce: list[Collective]


class Sharding:
    """A model in a layout. The model has only the experts that one GPU has or gathers.

    Attributes:
        fp32_modules: those that FSDP2 gathers apart from other weights, in fp32, because the others are bf16.
    """

    def __init__(self, layout: Layout, model: Embedder, precision: Precision) -> None:
        self.layout, self._weight_bytes = layout, 4 if precision == "fp32" else 2
        self.fp32_modules = [] if precision == "fp32" else model.fp32_modules()
        self._fp32 = {weight for module in self.fp32_modules for weight in module.parameters()}
        ranks, shards, expert_degree, _ = layout
        self.dense = self.experts = Mesh(Group.of(shards, 1, ranks), Group.of(ranks // shards, shards, ranks))
        self._experts: set[Tensor] = set()
        if expert_degree > 1:
            replicas, shards, _ = layout.expert_mesh_shape
            stride = shards * expert_degree
            self.experts = Mesh(Group.of(shards, expert_degree, ranks), Group.of(replicas, stride, ranks))
            self._experts = {weight for module in model.experts() for weight in module.parameters()}

    def mesh(self, weight: Tensor) -> Mesh:
        return self.experts if weight in self._experts else self.dense

    def has_own(self, weight: Tensor) -> bool:
        """Whether the weight has the experts of one GPU only, because of expert parallelism."""
        return weight in self._experts

    def held(self, weights: Iterable[Tensor]) -> int:
        """Bytes of the GPU's shards of weights, in fp32."""
        return sum(4 * weight.numel() // self.mesh(weight).shards.size for weight in weights)

    def gathered(self, weights: Iterable[Tensor]) -> int:
        """Bytes of weights that FSDP2 has gathered, in the type that the model computes with."""
        return sum((4 if weight in self._fp32 else self._weight_bytes) * weight.numel() for weight in weights)

    def unit(self, weights: Iterable[Tensor], touched: Set[Tensor]) -> UnitTraffic:
        """The collectives of weights that FSDP2 gathers together. `touched` have gradients, which are fp32."""
        found = UnitTraffic([], [], [])
        by_mesh: dict[Mesh, list[Tensor]] = {}
        for weight in weights:
            by_mesh.setdefault(self.mesh(weight), []).append(weight)
        for mesh, some in by_mesh.items():
            gradients = 4 * sum(weight.numel() for weight in some if weight in touched)
            if mesh.shards.size > 1:
                found.gather.append(Collective("all-gather", mesh.shards, self.gathered(some)))
            if mesh.shards.size > 1 and gradients:
                found.scatter.append(Collective("reduce-scatter", mesh.shards, gradients))
            if mesh.replicas.size > 1 and gradients:
                found.reduce.append(Collective("all-reduce", mesh.replicas, gradients // mesh.shards.size))
        return found

    def norm(self, updated: Set[Tensor]) -> list[Collective]:
        """The collectives of the gradient norm: one per mesh, and the mean over all ranks if there are two meshes."""
        ranks = self.layout.ranks
        groups = [self.dense.shards]
        if self._experts & updated:
            _, expert_shards, expert_degree = self.layout.expert_mesh_shape
            groups += [Group.of(expert_shards * expert_degree, 1, ranks), Group.of(ranks, 1, ranks)]
        return [Collective("all-reduce", group, 4) for group in groups if group.size > 1]


class MuonDivision:
    """How the GPUs divide Muon's matrices, as `parallel.division` does.

    `stacks` has the number of matrices of each weight.
    """

    def __init__(self, sharding: Sharding, stacks: Mapping[Tensor, int]) -> None:
        self._sharding, self._stacks, ranks = sharding, stacks, sharding.layout.ranks
        self._whole: dict[Tensor, int] = {}  # with the number of matrices that this GPU orthogonalizes
        replicated: dict[Tensor, int] = {}
        sharded: dict[Group, dict[Tensor, int]] = {}
        for weight, count in stacks.items():
            mesh = sharding.mesh(weight)
            if mesh.shards.size == 1 and mesh.replicas.size == ranks > 1:
                replicated[weight] = count
            elif mesh.shards.size == 1:
                self._whole[weight] = count
            elif weight.ndim == 3 and weight.shape[1] % mesh.shards.size:  # FSDP2 divides the experts instead.
                self._whole[weight] = -(-count // mesh.shards.size)
            else:
                sharded.setdefault(mesh.shards, {})[weight] = count
        self._node = Group.of(min(ranks, NODE), 1, ranks)
        self._replicated = own_weights(replicated, self._node.size)
        self._sharded = {group: own_matrices(some, group.size) for group, some in sharded.items()}

    def momentum(self, updated: Set[Tensor]) -> int:
        """Bytes of momentum of some weights, on the GPU that keeps most."""
        replicated = {weight for weights in self._replicated for weight in weights}
        shards = [weight for weight in self._stacks if weight in updated and weight not in replicated]
        parts = (self._sharding.held(w for w in weights if w in updated) for weights in self._replicated)
        return self._sharding.held(shards) + max(parts)

    def share(self, updated: Set[Tensor]) -> float:
        """The part of a step's orthogonalization that the busiest GPU does."""
        experts = self._sharding.layout.expert_degree
        total = sum(
            self._work(weight, count) * (experts if self._sharding.has_own(weight) else 1)
            for weight, count in self._stacks.items()
            if weight in updated
        )
        own = sum(self._work(weight, count) for weight, count in self._whole.items() if weight in updated)
        own += max(sum(self._work(w, self._stacks[w]) for w in weights if w in updated) for weights in self._replicated)
        for owned in self._sharded.values():
            own += max(sum(m.work for m in matrices if m.weight in updated) for matrices in owned)
        return own / total if total else 0.0

    def _work(self, weight: Tensor, count: int) -> int:
        return count * muon_work(*matrix_shape(weight, self._stacks[weight]))

    def collectives(self, updated: Set[Tensor]) -> list[Collective]:
        """In bf16: an all-gather of the updates of replicated matrices, which is padded to the largest part; for each
        group of shards an all-to-all of its matrices to their owners, and one back."""
        found = []
        largest = max(sum(w.numel() for w in weights if w in updated) for weights in self._replicated)
        if largest and self._node.size > 1:
            found.append(Collective("all-gather", self._node, 2 * largest * self._node.size))
        for group in self._sharded:
            if sent := self._sent(group, updated):
                found += 2 * [Collective("all-to-all", group, sent)]
        return found

    def buffers(self, updated: Set[Tensor]) -> int:
        """Most bytes that Muon holds during an update besides the momentum.

        It holds the updates of the weights in bf16, and next to them, one after the other: the same in fp32, from which
        they are rounded; the buffers of a collective; an iteration, with the gathered matrices if they are sharded.
        """
        fp32 = self.momentum(updated)
        stacks = {weight: (count, *matrix_shape(weight, count)) for weight, count in self._stacks.items()}
        others = [fp32, _iteration_bytes((n, *stacks[w][1:]) for w, n in self._whole.items() if w in updated)]
        others += [_iteration_bytes(stacks[weight] for weight in own if weight in updated) for own in self._replicated]
        gathers = [c for c in self.collectives(updated) if c.kind == "all-gather"]
        others += [c.size + c.size // c.group.size for c in gathers]
        for group, owned in self._sharded.items():
            for own in owned:
                shapes = [matrix.shape for matrix in own if matrix.weight in updated]
                matrices = 2 * sum(map(prod, shapes))
                others += [matrices + _iteration_bytes(shapes), 2 * matrices + self._sent(group, updated)]
        return fp32 // 2 + max(others)

    def _sent(self, group: Group, updated: Set[Tensor]) -> int:
        """Bytes of an all-to-all of matrices that are sharded over a group."""
        weights = {matrix.weight for matrices in self._sharded[group] for matrix in matrices} & updated
        return 2 * sum(weight.numel() for weight in weights) // group.size


def _iteration_bytes(shapes: Iterable[tuple[int, int, int]]) -> int:
    """Bytes of an iteration on the largest batch of matrices X: X, the product of X X' or X' X, a polynomial of it, and
    the result, all in bf16. `shapes` has the number of matrices, rows and columns of each stack."""
    largest = 0
    for batch in batches_by_shape([torch.empty(shape, device="meta") for shape in shapes]):
        _, rows, columns = batch[0].shape
        count = sum(len(x) for x in batch)
        largest = max(largest, 4 * count * (rows * columns + min(rows, columns) ** 2))
    return largest
