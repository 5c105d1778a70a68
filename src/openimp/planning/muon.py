"""What Muon needs on one GPU. The owners of its matrices have about equal work; see `parallel.division`."""

from collections.abc import Set

from torch import Tensor

from openimp.parallel.newton_schulz import BATCH_NUMBERS
from openimp.planning.gpus import GPUS_PER_NODE
from openimp.planning.sharding import BF16_BYTES, FP32_BYTES, Group, Sharding, Traffic


class MuonWork:
    """Memory and communication of Muon's updates of the weights `muon_weights`."""

    def __init__(self, sharding: Sharding, muon_weights: Set[Tensor]) -> None:
        self.sharding = sharding
        self.muon_weights = muon_weights
        self.node = Group(min(sharding.layout.ranks, GPUS_PER_NODE))
        self.owner_count = self.node.size if sharding.layout.shard_degree == 1 else sharding.layout.shard_degree

    def is_replicated(self, weight: Tensor) -> bool:
        """Whether all GPUs of a node have the whole weight."""
        return self.sharding.layout.shard_degree == 1 and self.sharding.numbers(weight) == weight.numel()

    def momentum_bytes(self, weights: Set[Tensor]) -> int:
        """Bytes of the momentum of these weights that a GPU keeps: of its shards, and of replicated matrices that it
        owns."""
        held_bytes = 0
        for weight in weights & self.muon_weights:
            kept_by = self.node.size if self.is_replicated(weight) else 1
            held_bytes += self.sharding.held_bytes([weight]) // kept_by
        return held_bytes

    def traffic(self, updated: Set[Tensor]) -> Traffic:
        """Traffic of updates in bf16. Shards go to the owner of their matrix and back. The update of a replicated
        matrix goes from its owner to the other GPUs of the node."""
        traffic = Traffic()
        for weight in updated & self.muon_weights:
            update_bytes = BF16_BYTES * self.sharding.numbers(weight)
            if self.is_replicated(weight):
                traffic += self.node.all_gather(update_bytes)
            else:
                shards = self.sharding.shards(weight)
                traffic += shards.all_gather(2 * update_bytes / shards.size)
        return traffic

    def buffer_bytes(self, updated: Set[Tensor]) -> int:
        """Most bytes that Muon holds during an update besides the momentum.

        It always holds the updates in bf16. Besides them it holds, one after the other: the updates in fp32, before
        they are rounded; an iteration on a batch of matrices, for which shards are gathered; the buffers of a
        collective.
        """
        elements = self.momentum_bytes(updated) // FP32_BYTES
        update_bytes = BF16_BYTES * elements
        fp32_update_bytes = 2 * update_bytes
        # Of square matrices X: X, the product of X X', a polynomial of it, and the result.
        iteration_bytes = 4 * BF16_BYTES * min(elements, BATCH_NUMBERS)
        if self.sharding.layout.shard_degree > 1:
            iteration_bytes += update_bytes
            collective_bytes = 3 * update_bytes
        else:
            collective_bytes = (self.node.size + 1) * update_bytes
        return update_bytes + max(fp32_update_bytes, iteration_bytes, collective_bytes)
