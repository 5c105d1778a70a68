"""Collectives: the bytes that one GPU receives, and how long they take by NCCL's own model of its rings and trees.

A ring of several nodes crosses the boundary of each node once. NCCL makes as many rings as a node has network cards, so
the GPUs of a group that are in one node share their cards.
"""

from dataclasses import dataclass
from math import gcd, log2
from typing import Literal, NamedTuple

from openimp.planning.gpus import GPU, NODE

LINK_SHARE = 0.78
"""Share of the link's bandwidth that large collectives reach: in a node of H100s, NCCL gathers at 350 of 450 GB/s
(NVIDIA/nccl#1281)."""
REDUCE_SHARE, NETWORK_SHARE = 0.85, 0.5
"""Shares of the network's bandwidth that all-reduces and all other collectives reach: between 32 nodes of H100s, NCCL
reduces at 340 and gathers at 200 of 8 x 50 GB/s (NVIDIA/nccl#1218)."""


class Algorithm(NamedTuple):
    """An algorithm of NCCL with one of its protocols, as in its src/graph/tuning.cc. Times are in microseconds."""

    bandwidth: float  # share of that of the fastest one
    start: float
    link_hop: float  # from one GPU of a node to the next
    network_hop: float  # from one node to the next

    def seconds(self, link_hops: float, network_hops: float, transfer: float) -> float:
        """How long so many hops take, and a transfer that takes `transfer` seconds at the full bandwidth."""
        hops = self.start + link_hops * self.link_hop + network_hops * self.network_hop
        return 1e-6 * hops + transfer / self.bandwidth


RINGS = Algorithm(1, 8.4, 3.4, 14), Algorithm(0.92, 14, 1.9, 4), Algorithm(0.08, 6.6, 0.6, 2.7)
"""With the protocols Simple, LL128 and LL."""
TREES = Algorithm(0.92, 8.4, 4, 14), Algorithm(0.86, 14, 1.25, 8.5), Algorithm(0.08, 6.8, 0.6, 5)
"""The same. Only all-reduces use trees."""


class Group(NamedTuple):
    """Ranks that communicate with each other."""

    size: int
    together: int  # of them, in one node

    @classmethod
    def of(cls, size: int, stride: int, ranks: int) -> "Group":
        """Each of the `size` ranks is `stride` ranks after the one before; there are `ranks` in all."""
        if ranks <= NODE or NODE % (size * stride) == 0:
            return cls(size, size)
        return cls(size, max(1, gcd(NODE, size * stride) // stride))


@dataclass(frozen=True)
class Collective:
    """A collective of one group."""

    kind: Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]
    group: Group
    size: int  # bytes of the whole tensor: gathered, scattered, reduced, or sent by one GPU to all

    @property
    def received(self) -> int:
        """Bytes that one GPU receives; it sends as many. A ring's all-reduce is a reduce-scatter and an all-gather."""
        return (2 if self.kind == "all-reduce" else 1) * self.size * (self.group.size - 1) // self.group.size

    def seconds(self, gpu: GPU) -> float:
        """How long it takes if nothing else uses its connections. Like NCCL, this takes the fastest algorithm."""
        size, together = self.group
        nodes, transfer = self._nodes, self._transfer(gpu)
        if self.kind == "all-to-all":
            return RINGS[0].seconds(nodes == 1, nodes > 1, transfer)
        twice = 2 if self.kind == "all-reduce" else 1
        # The hops of a single GPU of a node are not hidden by others, so they take as long as a tree's.
        rings = RINGS if together > 1 else [r._replace(network_hop=t.network_hop) for r, t in zip(RINGS, TREES)]
        found = [each.seconds(twice * (size - nodes), twice * (nodes - 1), transfer) for each in rings]
        if self.kind == "all-reduce":
            found += [each.seconds(2 * (together - 1), 2 * log2(nodes), transfer) for each in TREES]
        return min(found)

    @property
    def _nodes(self) -> int:
        return -(-self.group.size // self.group.together)

    def _transfer(self, gpu: GPU) -> float:
        """Seconds in which the bytes arrive, over the link and over the network at the same time."""
        size, together = self.group
        if self.kind == "all-to-all":  # Each GPU sends directly to each other one.
            inside = self.received * (together - 1) / (size - 1)
            outside = self.received - inside
        else:
            inside, outside = self.received * (together > 1), self.received / together * (self._nodes > 1)
        share = REDUCE_SHARE if self.kind == "all-reduce" else NETWORK_SHARE
        return max(inside / (gpu.link * LINK_SHARE), outside / (gpu.network * share)) / 1e9
