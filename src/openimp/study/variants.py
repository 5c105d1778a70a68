"""Variants of training that only studies use, and the measurement of peak memory."""

import os
from collections.abc import Iterable
from itertools import accumulate, chain, combinations_with_replacement, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.common.errors import UserError
from openimp.common.json_lines import append, forget_after
from openimp.data.step_batches import LoadedBatch
from openimp.data.streams import Stream
from openimp.model.imp import IMP
from openimp.training.setup import Variant
from openimp.training.trainer import Trainer

MEASUREMENTS = 12
"""How many times per training `measure_conflict` measures."""


def measure_conflict(trainer: Trainer, step: int) -> None:
    """Measures the cosine between the tasks' gradients on the encoder now and then, and writes it to conflict.jsonl.

    For each task it computes the gradients of the task's next two batches. A task's cosine with itself compares these
    two. It shows how large a cosine can be at all, because batches of one task differ too. The measurements do not
    change the training, and the FLOPs in metrics.jsonl do not include them.
    """
    if step % max(1, trainer.recipe.train.steps // MEASUREMENTS):
        return
    for source in trainer.data.sources.values():
        if isinstance(source, Stream):
            raise UserError(f"source {source.name} is streamed, so the batches of later steps cannot be read now")
    file = trainer.run / "conflict.jsonl"
    forget_after(file, step - 1)  # A run that resumes measures this step again.
    append(file, {"step": step, "cosine": _cosines(trainer, step)})


def _cosines(trainer: Trainer, step: int) -> dict[str, float]:
    """The cosine between the gradients of each pair of tasks a and b, under "a|b", at the current weights.

    A task with fewer than two steps from `step` on is left out.
    """
    gradients = {}
    for name in trainer.recipe.tasks:
        steps = (s for s in range(step, len(trainer.data)) if trainer.data.schedule[s].task == name)
        computed = [_gradient(trainer, trainer.data[s]) for s in islice(steps, 2)]
        if len(computed) == 2:
            gradients[name] = computed
    return {
        f"{a}|{b}": float(F.cosine_similarity(gradients[a][0], gradients[b][1], dim=0))
        for a, b in combinations_with_replacement(gradients, 2)
    }


def _gradient(trainer: Trainer, loaded: LoadedBatch) -> Tensor:
    """The gradient of a batch's loss with respect to all weights of the encoder, as one fp32 vector."""
    assert isinstance(trainer.model, IMP)
    trainer.forward(loaded).total.backward()
    parts = [(p.new_zeros(p.shape) if p.grad is None else p.grad) for p in trainer.model.encoder.parameters()]
    trainer.model.zero_grad(set_to_none=True)
    return torch.cat([part.flatten() for part in parts])


SUMMED = Variant(name="SummedTrainer", sum_tasks=True)
"""Sums the losses of all tasks in each update.

A round is one step of each task, as `alternation.kind: intervals` with every interval 1 schedules them. The graphs of a
round are kept until its last step, which runs one backward pass and updates the weights.
"""
CONFLICT = Variant(name="ConflictTrainer", before_step=measure_conflict)


def peak_memory(training: Trainer) -> int:
    """The most memory that an update of a new training allocates on top of what existed before it, in bytes.

    The maximum is over one update of each task and view. It is computed from the CPU allocations that torch's profiler
    records, so it does not depend on what else runs on the machine. The training cannot go on afterwards.
    """
    # At lower levels kineto prints its start and end.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    first: dict[tuple[str, int], int] = {}
    for step, visit in enumerate(training.data.schedule):
        first.setdefault((visit.task, visit.view), step)
    step_groups = [[step] for step in sorted(first.values())]
    if (round_length := training.steps_per_update) > 1:  # Whole rounds, until every view has occurred.
        rounds = -(-(max(first.values()) + 1) // round_length)
        step_groups = [[*range(min(rounds * round_length, len(training.data)))]]
    together = [[training.data[step] for step in steps] for steps in step_groups]
    for loaded in chain.from_iterable(together):  # The first updates create the optimizer state, which must not count.
        training.make_step(loaded)
    peak = max(_peak_of(training, batches) for batches in together)
    training.log.metrics.close()
    return peak


def _peak_of(training: Trainer, batches: Iterable[LoadedBatch]) -> int:
    """The most bytes that are allocated at any moment of these updates, beyond what existed before them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for loaded in batches:
            training.make_step(loaded)
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
