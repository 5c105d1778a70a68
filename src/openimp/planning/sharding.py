"""The bytes that one GPU receives in collectives, and how long they take at the bandwidth of its connections."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from openimp.common.device import Precision
from openimp.model.embedder import Embedder
from openimp.parallel.layout import Layout
from openimp.planning.gpus import GPU, GPUS_PER_NODE

BANDWIDTH_SHARE = 0.7
"""Share of the published bandwidths that collectives reach. On H100s, others measured 0.78 within a node
(NVIDIA/nccl#1281), and 0.5 to 0.85 between nodes (NVIDIA/nccl#1218)."""
FP32_BYTES = 4
BF16_BYTES = 2


@dataclass(frozen=True)
class Traffic:
    """The bytes that one GPU receives in collectives. It sends as many."""

    received_bytes: float = 0.0
    link_bytes: float = 0.0  # over the links within its node
    network_bytes: float = 0.0  # over its network card

    def seconds(self, gpu: GPU) -> float:
        """Duration of the collectives. Links and network are used at the same time."""
        link_seconds = self.link_bytes / gpu.link_gb_per_s
        network_seconds = self.network_bytes / gpu.network_gb_per_s
        return max(link_seconds, network_seconds) / (BANDWIDTH_SHARE * 1e9)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.received_bytes + other.received_bytes,
            self.link_bytes + other.link_bytes,
            self.network_bytes + other.network_bytes,
        )


class Group(NamedTuple):
    """GPUs that communicate with each other. Each is `stride` ranks after the one before."""

    size: int
    stride: int = 1

    def all_gather(self, size_bytes: float) -> Traffic:
        """Traffic of an all-gather of a tensor of `size_bytes`. A reduce-scatter is equal, and an all-reduce is both.

        A ring over several nodes enters each node once. The group's GPUs in one node share their network cards.
        """
        received_bytes = size_bytes * (self.size - 1) / self.size
        per_node = max(1, GPUS_PER_NODE // self.stride)
        if self.size <= per_node:
            return Traffic(received_bytes, link_bytes=received_bytes)
        return Traffic(received_bytes, network_bytes=received_bytes / per_node)


class Sharding:
    """What one GPU holds of a model in a layout, and what it receives of weights and gradients."""

    def __init__(self, layout: Layout, model: Embedder, precision: Precision = "fp32") -> None:
        self.layout = layout
        self.model = model
        self.compute_type_bytes = FP32_BYTES if precision == "fp32" else BF16_BYTES
        self.experts = {weight for module in model.experts() for weight in module.parameters()}

    def shards(self, weight: Tensor) -> Group:
        """The GPUs over which a weight is sharded. Of the weight of an expert, these are GPUs that hold this expert."""
        if weight in self.experts:
            return Group(self.layout.expert_shards, stride=self.layout.expert_degree)
        return Group(self.layout.shard_degree)

    def gathered_elements(self, weights: Iterable[Tensor]) -> int:
        """Number of elements that a GPU gathers of weights. With expert parallelism, it gathers only its experts."""
        return sum(
            weight.numel() // self.layout.expert_degree if weight in self.experts else weight.numel()
            for weight in weights
        )

    def held_bytes(self, weights: Iterable[Tensor]) -> int:
        """Bytes of the GPU's shards of weights, in fp32."""
        return sum(FP32_BYTES * self.gathered_elements([weight]) // self.shards(weight).size for weight in weights)

    def gathered_bytes(self, weights: Iterable[Tensor]) -> int:
        """Bytes of gathered weights, in the type that the model computes with."""
        return self.compute_type_bytes * self.gathered_elements(weights)

    def reduced_bytes(self, weights: Iterable[Tensor]) -> int:
        """Bytes of the gradients of gathered weights, and of their fp32 copy for the reduction."""
        return (self.compute_type_bytes + FP32_BYTES) * self.gathered_elements(weights)

    def gather(self, weights: Iterable[Tensor], element_bytes: int) -> Traffic:
        """Traffic of an all-gather of weights, or of their updates, with `element_bytes` per element."""
        traffic = Traffic()
        for weight in weights:
            traffic += self.shards(weight).all_gather(element_bytes * self.gathered_elements([weight]))
        return traffic

    def reduce(self, weights: Iterable[Tensor]) -> Traffic:
        """Traffic of the reduction of fp32 gradients: a reduce-scatter between shards, and an all-reduce between
        replicas."""
        traffic = Traffic()
        for weight in weights:
            shards = self.shards(weight)
            replica_ranks = shards.size * shards.stride
            replicas = Group(self.layout.ranks // replica_ranks, stride=replica_ranks)
            traffic += shards.all_gather(FP32_BYTES * self.gathered_elements([weight]))
            traffic += replicas.all_gather(2 * self.held_bytes([weight]))
        return traffic
