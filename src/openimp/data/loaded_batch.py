"""`LoadedBatch`: the examples of a step, as the loader gives them to the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from openimp.alternation import Visit
from openimp.data.batch import Batch
from openimp.data.streams import Cursor


@dataclass
class LoadedBatch:
    """This rank's examples of a step, or a worker's part of them, and what the training loop must know about them.

    Attributes:
        visit: the step, with its task and view.
        batches: the examples, in order; one batch of each worker that has any.
        rows: the row of each example in the source, or its position in the stream.
        names: the name of each example's row.
        bad: (row name, reason) of each example that could not be read. Another example replaces it in the batch.
        cursors: for each lane that was read from the task's stream, where it resumes; empty for tables.
        digest: a hash of the examples, whatever their order; see `batch_digest`.
        stop_reason: why this rank stops before this step: an error's text, or "" for a signal or a failed save. None:
            it does not stop.
    """

    visit: Visit
    batches: list[Batch] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    cursors: dict[str, Cursor] = field(default_factory=dict)
    digest: int = 0
    stop_reason: str | None = None

    def without_tensors(self) -> LoadedBatch:
        """Everything but the tensors, which take much memory."""
        return replace(self, batches=[])

    @classmethod
    def merged(cls, parts: Sequence[LoadedBatch]) -> LoadedBatch:
        """The parts of all workers together."""
        merged = cls(parts[0].visit)
        for part in parts:
            merged.batches += part.batches
            merged.rows += part.rows
            merged.names += part.names
            merged.bad += part.bad
            merged.cursors |= part.cursors
            merged.digest += part.digest
        return merged

    @cached_property
    def batch(self) -> Batch:
        """All examples, in CPU memory."""
        return Batch.cat(self.batches)

    def batch_on(self, device: torch.device) -> Batch:
        """All examples on a device. They are concatenated there, because only `batches` are in pinned memory."""
        return Batch.cat([batch.to(device) for batch in self.batches])

    def pin_memory(self) -> LoadedBatch:
        """The DataLoader calls this if there is CUDA: only copies from pinned memory are asynchronous."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])
