"""How studies train and what they measure of it: summed losses, the tasks' conflict, peak memory."""

import os
from itertools import accumulate, combinations_with_replacement, islice
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

MEASURED = 12
"""How many times in a training the tasks' gradients are compared."""


class SummedTrainer(Trainer):
    """Every update follows from the sum of all tasks' losses, whose graphs are held until then.

    The tasks are visited in turn (`alternation.kind: intervals`, every interval 1); those of a round share one backward
    pass.
    """

    def __init__(self, recipe: Recipe, run: Path, resume: bool = False, allow_changed_data: bool = False) -> None:
        super().__init__(recipe, run, resume, allow_changed_data)
        self.round = sum(task.weight > 0 for task in recipe.tasks.values())
        self.held: list[Tensor] = []

    def update(self, loaded: LoadedBatch) -> Losses:
        losses = self.forward(loaded)
        self.held.append(losses.total)
        last = loaded.visit.step + 1
        self.savable = (
            False  # No checkpoint can hold graphs. A run that is stopped here resumes from before this round.
        )
        if len(self.held) == self.round or last == self.recipe.train.steps:
            torch.stack(self.held).sum().backward()
            self.apply_gradients(loaded, losses)
            self.held.clear()
            self.savable = True
        self.step = last
        return losses


class ConflictTrainer(Trainer):
    """Compares the tasks' gradients on the encoder from time to time, and writes their cosines to conflict.jsonl.

    Each task gives the gradients of its next two batches. A task's cosine with itself is that between the two, and so
    tells how large a cosine can be at all, for batches differ within a task too. Nothing of the training changes; the
    ledger does not count what is computed here.
    """

    def __init__(self, recipe: Recipe, run: Path, resume: bool = False, allow_changed_data: bool = False) -> None:
        super().__init__(recipe, run, resume, allow_changed_data)
        for source in self.data.sources.values():
            if isinstance(source, Stream):
                raise UserError(f"source {source.name} is streamed, so batches of later steps cannot be looked at now")
        self.file = run / "conflict.jsonl"
        forget_after(self.file, self.step - 1)
        self.every = max(1, recipe.train.steps // MEASURED)

    def update(self, loaded: LoadedBatch) -> Losses:
        step = loaded.visit.step
        if step % self.every == 0:
            append(self.file, {"step": step, "cosine": self.cosines(step)})
        return super().update(loaded)

    def cosines(self, step: int) -> dict[str, float]:
        """The cosine between the gradients of each pair of tasks, by "a|b", at the weights of now.

        Args:
            step: where the batches are looked for; a task that comes fewer than two times from there on is left out.
        """
        gradients = {}
        for name in self.recipe.tasks:
            ahead = (s for s in range(step, len(self.data)) if self.data.schedule[s].task == name)
            found = [self._gradient(self.data[s]) for s in islice(ahead, 2)]
            if len(found) == 2:
                gradients[name] = found
        return {
            f"{a}|{b}": float(F.cosine_similarity(gradients[a][0], gradients[b][1], dim=0))
            for a, b in combinations_with_replacement(gradients, 2)
        }

    def _gradient(self, loaded: LoadedBatch) -> Tensor:
        """The gradient of one batch's loss on all weights of the encoder, in one fp32 vector."""
        assert isinstance(self.model, IMP)
        self.forward(loaded).total.backward()
        parts = [(p.new_zeros(p.shape) if p.grad is None else p.grad) for p in self.model.encoder.parameters()]
        self.model.zero_grad(set_to_none=True)
        return torch.cat([part.flatten() for part in parts])


def peak_memory(recipe: Recipe, run: Path, kind: type[Trainer]) -> int:
    """Bytes that an update holds at most beyond what is there before it, over a visit of every task and view.

    Counted from the allocations that torch's profiler sees on the CPU, so the same on every machine of a kind.

    Args:
        recipe: what to train; nothing is saved.
        run: an empty folder.
        kind: how to train it.
    """
    # Below this level kineto tells of its start and end in the middle of the user's screen.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    training = kind(recipe, run, False)
    first: dict[tuple[str, int], int] = {}
    for step, visit in enumerate(training.data.schedule):
        first.setdefault((visit.task, visit.view), step)
    steps = sorted(first.values())
    if isinstance(training, SummedTrainer):  # Whole rounds, until every view has had its turn.
        steps = list(range(min(-(-(steps[-1] + 1) // training.round) * training.round, recipe.train.steps)))
    batches = [training.data[step] for step in steps]
    for loaded in batches:  # The optimisers' moments are made at the first time.
        training.update(loaded)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for loaded in batches:
            training.update(loaded)
    training.log.metrics.close()
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
