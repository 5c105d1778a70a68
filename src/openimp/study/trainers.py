"""Trainers that only studies use, and the measurement of peak memory."""

import os
from collections.abc import Iterable
from itertools import accumulate, chain, combinations_with_replacement, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.common.errors import UserError
from openimp.common.json_lines import append, forget_after
from openimp.data.step_batches import LoadedBatch
from openimp.data.streams import Stream
from openimp.model.imp import IMP
from openimp.objectives import Losses
from openimp.recipe.schema import Recipe
from openimp.training.trainer import Trainer

MEASUREMENTS = 12
"""How many times per training `ConflictTrainer` measures."""


class SummedTrainer(Trainer):
    """Sums the losses of all tasks in each update.

    A round is one step of each task, as `alternation.kind: intervals` with every interval 1 schedules them. The graphs
    of a round are kept until its last step, which runs one backward pass and updates the weights.
    """

    summed = True

    def __init__(self, recipe: Recipe, run: Path, resume: bool = False, allow_changed_data: bool = False) -> None:
        super().__init__(recipe, run, resume, allow_changed_data)
        self.round = sum(task.weight > 0 for task in recipe.tasks.values())
        self.pending: list[tuple[LoadedBatch, Losses]] = []

    def update(self, loaded: LoadedBatch) -> Losses:
        losses = self.forward(loaded)
        self.pending.append((loaded.without_tensors(), losses))
        self.savable = False  # A checkpoint cannot hold graphs, so a run that stops here resumes before this round.
        next_step = loaded.visit.step + 1
        if len(self.pending) == self.round or next_step == self.recipe.train.steps:
            self.backward(loaded, torch.stack([summand.total for _, summand in self.pending]).sum())
            # If the update fails, the error names the first task whose loss is not finite.
            failed = [pair for pair in self.pending if not pair[1].total.isfinite()]
            self.apply_gradients(*failed[0] if failed else (loaded, losses))
            self.confirm()
            self.pending.clear()
            self.savable = True
        self.step = next_step
        return losses


class ConflictTrainer(Trainer):
    """Measures the cosine between the tasks' gradients on the encoder, and writes it to conflict.jsonl.

    For each task it computes the gradients of the task's next two batches. A task's cosine with itself compares these
    two. It shows how large a cosine can be at all, because batches of one task differ too. The measurements do not
    change the training, and the FLOPs in metrics.jsonl do not include them.
    """

    def __init__(self, recipe: Recipe, run: Path, resume: bool = False, allow_changed_data: bool = False) -> None:
        super().__init__(recipe, run, resume, allow_changed_data)
        for source in self.data.sources.values():
            if isinstance(source, Stream):
                raise UserError(f"source {source.name} is streamed, so the batches of later steps cannot be read now")
        self.file = run / "conflict.jsonl"
        forget_after(self.file, self.step - 1)
        self.every = max(1, recipe.train.steps // MEASUREMENTS)

    def update(self, loaded: LoadedBatch) -> Losses:
        step = loaded.visit.step
        if step % self.every == 0:
            append(self.file, {"step": step, "cosine": self.cosines(step)})
        return super().update(loaded)

    def cosines(self, step: int) -> dict[str, float]:
        """The cosine between the gradients of each pair of tasks a and b, under "a|b", at the current weights.

        A task with fewer than two steps from `step` on is left out.
        """
        gradients = {}
        for name in self.recipe.tasks:
            steps = (s for s in range(step, len(self.data)) if self.data.schedule[s].task == name)
            computed = [self._gradient(self.data[s]) for s in islice(steps, 2)]
            if len(computed) == 2:
                gradients[name] = computed
        return {
            f"{a}|{b}": float(F.cosine_similarity(gradients[a][0], gradients[b][1], dim=0))
            for a, b in combinations_with_replacement(gradients, 2)
        }

    def _gradient(self, loaded: LoadedBatch) -> Tensor:
        """The gradient of a batch's loss with respect to all weights of the encoder, as one fp32 vector."""
        assert isinstance(self.model, IMP)
        self.forward(loaded).total.backward()
        parts = [(p.new_zeros(p.shape) if p.grad is None else p.grad) for p in self.model.encoder.parameters()]
        self.model.zero_grad(set_to_none=True)
        return torch.cat([part.flatten() for part in parts])


def peak_memory(recipe: Recipe, run: Path, trainer: type[Trainer]) -> int:
    """The most memory that an update allocates on top of what existed before it, in bytes.

    The maximum is over one update of each task and view. It is computed from the CPU allocations that torch's profiler
    records, so it does not depend on what else runs on the machine. `run` is an empty folder; nothing is saved.
    """
    # At lower levels kineto prints its start and end.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    training = trainer(recipe, run, False)
    first: dict[tuple[str, int], int] = {}
    for step, visit in enumerate(training.data.schedule):
        first.setdefault((visit.task, visit.view), step)
    each = [[step] for step in sorted(first.values())]
    if isinstance(training, SummedTrainer):  # Whole rounds, until every view has occurred.
        rounds = -(-(max(first.values()) + 1) // training.round)
        each = [[*range(min(rounds * training.round, recipe.train.steps))]]
    together = [[training.data[step] for step in steps] for steps in each]
    for loaded in chain.from_iterable(together):  # The first updates create the optimizer state, which must not count.
        training.update(loaded)
    peak = max(_peak_of(training, batches) for batches in together)
    training.log.metrics.close()
    return peak


def _peak_of(training: Trainer, batches: Iterable[LoadedBatch]) -> int:
    """The most bytes that are allocated at any moment of these updates, beyond what existed before them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for loaded in batches:
            training.update(loaded)
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
