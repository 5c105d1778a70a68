"""`StepBatches`: one batch for each step of a recipe.

The alternation and the order of examples are pure functions of the recipe. So a worker needs only the number of a step
to make its part of the batch, and communicates with no other worker or rank.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch.utils._pytree import tree_map

from openimp.alternation import Schedule, Visit
from openimp.data.batch import Batch
from openimp.data.examples import ExampleReader
from openimp.data.loaded_batch import LoadedBatch
from openimp.data.order import batch_digest
from openimp.data.streams import Stream
from openimp.data.task_data import TaskData
from openimp.data.vectors import VectorTask, vector_tasks


class StepBatches:
    """`batches[step]` is this rank's part of the batch of a step, and `part` a worker's part of that."""

    def __init__(self, data: TaskData, rank: int = 0) -> None:
        """Each batch is divided into `data.world_size` equal parts. These are the parts of `rank`."""
        self.data = data
        self.schedule = Schedule(data.recipe)
        self.rank = rank
        self._examples = ExampleReader(data)

    @cached_property
    def vector_tasks(self) -> dict[str, VectorTask]:
        """The tasks whose inputs all have towers, read once. `data` must be prepared."""
        return vector_tasks(self.data)

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, step: int) -> LoadedBatch:
        return self.part(step, 0, 1)

    def part(self, step: int, part_index: int, part_count: int) -> LoadedBatch:
        """One of `part_count` parts, of about equal size, of this rank's examples of a step.

        A part with the same index reads the same lanes of a stream in every step.
        """
        visit = self.schedule[step]
        task = self.data.recipe.tasks[visit.task]
        source = self.data.source_of_task[visit.task]
        positions = self._positions(visit, part_index, part_count)
        if not positions:
            return LoadedBatch(visit)
        if visit.task in self.vector_tasks:
            return self.vector_tasks[visit.task].read(visit, positions)
        loaded = self._examples.load(visit, positions)
        # Adds the replacements of bad examples to `loaded`.
        examples = [self._examples.find_readable(visit, position, loaded) for position in positions]
        tokens = {}
        for name, spec in task.inputs.items():
            items = np.stack([array for example in examples for array in example.arrays[name]])
            # The generator of the position, not of its replacement: an example that replaces two bad ones must not drop
            # the same tokens twice.
            rngs = [loaded[position].rng for position in positions for _ in range(spec.draw)]
            tokens[name] = self.data.modalities[name].tokens(items, task.views[visit.view][name], rngs)
        # For each objective of the task, its targets by name.
        targets = tree_map(lambda *tensors: torch.stack(tensors), *(example.targets for example in examples))
        names = [example.name for example in examples]
        # A bad example counts in the part that has its position, not in one that tried it as a replacement.
        at_positions = [loaded[position] for position in positions]
        return LoadedBatch(
            visit,
            batches=[Batch(tokens, targets)],
            rows=[example.row for example in examples],
            names=names,
            bad=[(example.name, example.bad) for example in at_positions if example.bad],
            cursors=source.cursors() if isinstance(source, Stream) else {},
            digest=batch_digest(f"{visit.task} {name}" for name in names),
        )

    def _positions(self, visit: Visit, part_index: int, part_count: int) -> list[int]:
        """The positions, in the task's order, of the examples of a part.

        A batch lists the examples of its first lane, then those of the second, and so on. The task's order takes one
        example of each lane in turn: position p is in lane p % lanes. For example, with 2 lanes and a batch of 4, the
        batch from position 8 on has the positions 8, 10 (lane 0), 9, 11 (lane 1). A table has as many lanes as
        examples. A part has whole lanes, unless the lanes are not a multiple of the ranks: then several ranks share a
        lane, and each takes some of its examples.
        """
        lanes = self.data.source_of_task[visit.task].lanes or visit.batch_size
        lane_size = visit.batch_size // lanes  # examples of a lane in the batch
        rank_size = visit.batch_size // self.data.world_size
        rank_start = rank_size * self.rank
        rank_stop = rank_start + rank_size
        first_lane = rank_start // lane_size
        rank_lanes = -(-rank_stop // lane_size) - first_lane
        part_start = (first_lane + rank_lanes * part_index // part_count) * lane_size
        part_stop = (first_lane + rank_lanes * (part_index + 1) // part_count) * lane_size
        positions = []
        for index_in_batch in range(max(rank_start, part_start), min(rank_stop, part_stop)):
            lane, index_in_lane = divmod(index_in_batch, lane_size)
            positions.append(visit.start + index_in_lane * lanes + lane)
        return positions
