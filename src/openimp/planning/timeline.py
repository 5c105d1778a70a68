"""The collectives of one step, and how long a step waits for them.

What FSDP2 does on a GPU is simulated: it gathers the weights of the next block while a block computes, and reduces the
gradients of a block while the blocks before it compute. All other collectives make the GPU wait.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from openimp.planning.communication import Collective
from openimp.planning.gpus import GPU
from openimp.planning.sharding import UnitTraffic


@dataclass(frozen=True)
class Traffic:
    """The collectives of one step, in order."""

    start: list[Collective]  # before the encoder
    passes: list[list[UnitTraffic]]  # of the blocks of each pass
    backward: list[list[UnitTraffic]]  # of the blocks of each pass that are gathered again for the backward pass
    loss: list[Collective]
    heads: list[UnitTraffic]  # gradients of the heads, and then of everything else outside of the blocks
    slots: list[Collective]  # to the experts and back
    update: list[Collective]
    reshard_after_forward: bool = True  # see `Layout`

    @property
    def collectives(self) -> list[Collective]:
        """All of them."""
        found = [*self.start, *self.loss, *self.slots, *self.update]
        found += [collective for unit in chain(self._forward, self._backward) for collective in unit.gather]
        for unit in [*self._blocks, *self.heads]:
            found += [*unit.scatter, *unit.reduce]
        return found

    @property
    def _forward(self) -> list[UnitTraffic]:
        """The blocks of the forward passes in order, with the collectives that gather them there."""
        units = [*chain.from_iterable(self.passes)]
        if self.reshard_after_forward:
            return units
        first = {id(unit): i for i, unit in reversed([*enumerate(units)])}
        return [unit if first[id(unit)] == i else unit._replace(gather=[]) for i, unit in enumerate(units)]

    @property
    def _backward(self) -> list[UnitTraffic]:
        """The blocks of the backward passes in order, with the collectives that gather them there."""
        units = [*chain.from_iterable(self.backward)][::-1]
        return units if self.reshard_after_forward else [unit._replace(gather=[]) for unit in units]

    @property
    def _blocks(self) -> list[UnitTraffic]:
        """Those of each block once, however many passes go through it."""
        return [*{id(unit): unit for unit in chain.from_iterable(self.passes)}.values()]

    def counts(self) -> Counter[tuple[str, int]]:
        """The number of collectives, by kind and number of ranks."""
        return Counter((each.kind, each.group.size) for each in self.collectives)

    def waits(self, forward: float, backward: float, gpu: GPU) -> float:
        """Seconds that a GPU waits for these collectives, if it computes for `forward` and `backward` seconds.

        The computation is divided equally among the blocks.
        """
        clock = _Clock(gpu)
        # Blocks wait for the slots of their experts. These go both ways as often as a block is computed.
        slots = sum(collective.seconds(gpu) for collective in self.slots) / (forward + backward or 1)
        clock.wait(self.start)
        clock.compute(self._forward, forward * (1 + slots))
        clock.wait(self.loss)
        *heads, rest = self.heads
        for head in heads:
            clock.reduce(head)
        # With several passes, the gradients of all blocks are reduced after the last pass has added its own.
        clock.compute(self._backward, backward * (1 + slots), reduce=len(self.passes) == 1)
        for block in self._blocks if len(self.passes) > 1 else ():
            clock.reduce(block)
        clock.reduce(rest)
        clock.finish()
        clock.wait(self.update)
        return max(0.0, clock.now - forward - backward)


class _Clock:
    """The time of a GPU's computation, and when the collectives that FSDP2 has started will be done.

    Those between shards follow each other, and so do those between replicas.
    """

    def __init__(self, gpu: GPU) -> None:
        self.gpu, self.now, self._shards, self._replicas = gpu, 0.0, 0.0, 0.0

    def wait(self, collectives: Iterable[Collective]) -> None:
        """Runs collectives while nothing is computed."""
        self.now += self._seconds(collectives)

    def compute(self, units: Sequence[UnitTraffic], seconds: float, reduce: bool = False) -> None:
        """Computes blocks. The weights of each are gathered while the one before it computes."""
        if not units:
            self.now += seconds
            return
        ready = self._start(self.now, units[0].gather)
        for unit, following in pairwise([*units, None]):
            assert unit
            begin = max(self.now, ready)
            if following:
                ready = self._start(begin, following.gather)
            self.now = begin + seconds / len(units)
            if reduce:
                self.reduce(unit)

    def reduce(self, unit: UnitTraffic) -> None:
        """Starts to reduce gradients."""
        scattered = self._start(self.now, unit.scatter)
        self._replicas = max(self._replicas, scattered) + self._seconds(unit.reduce)

    def finish(self) -> None:
        """Waits for all gradients."""
        self.now = max(self.now, self._shards, self._replicas)

    def _start(self, earliest: float, collectives: Iterable[Collective]) -> float:
        """When collectives between shards are done that start at `earliest`, or when those before them are done."""
        if seconds := self._seconds(collectives):
            self._shards = max(self._shards, earliest) + seconds
            return self._shards
        return earliest

    def _seconds(self, collectives: Iterable[Collective]) -> float:
        return sum(collective.seconds(self.gpu) for collective in collectives)
