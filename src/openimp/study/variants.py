"""Variants of training that only studies use, and the measurement of peak memory."""

import os
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate, combinations_with_replacement, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.common.errors import UserError
from openimp.common.json_lines import append, forget_after
from openimp.data.loaded_batch import LoadedBatch
from openimp.data.streams import Stream
from openimp.model.imp import IMP
from openimp.training.setup import Variant
from openimp.training.trainer import Trainer

MEASUREMENTS = 12
"""How many times per training `measure_conflict` measures."""


def measure_conflict(trainer: Trainer, step: int) -> None:
    """Measures the cosine between the tasks' gradients on the encoder, and writes it to conflict.jsonl. It does so at
    about `MEASUREMENTS` steps per training.

    For each task it computes the gradients of the task's next two batches. A task's cosine with itself compares these
    two. It shows how large a cosine can be at all, because batches of one task differ too. The measurements do not
    change the training, and the FLOPs in metrics.jsonl do not include them.
    """
    if step % max(1, trainer.recipe.train.steps // MEASUREMENTS):
        return
    for source in trainer.data.source_of_task.values():
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
    for task in trainer.recipe.tasks:
        steps = (later for later in range(step, len(trainer.batches)) if trainer.batches.schedule[later].task == task)
        two_gradients = [_gradient(trainer, trainer.batches[task_step]) for task_step in islice(steps, 2)]
        if len(two_gradients) == 2:
            gradients[task] = two_gradients
    # Of different batches, so that "a|a" does not compare a gradient with itself.
    return {
        f"{a}|{b}": float(F.cosine_similarity(gradients[a][0], gradients[b][1], dim=0))
        for a, b in combinations_with_replacement(gradients, 2)
    }


def _gradient(trainer: Trainer, loaded: LoadedBatch) -> Tensor:
    """The gradient of a batch's loss with respect to all weights of the encoder, as one fp32 vector."""
    assert isinstance(trainer.model, IMP)
    trainer.forward(loaded).total.backward()
    weights = [*trainer.model.encoder.parameters()]
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    trainer.model.zero_grad(set_to_none=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


SUMMED = Variant(name="SummedTrainer", sum_tasks=True)
"""Sums the losses of all tasks in each update.

A round is one step of each task, as `alternation.kind: intervals` with every interval 1 schedules them. The graphs of a
round are kept until its last step, which runs one backward pass and updates the weights.
"""
CONFLICT = Variant(name="ConflictTrainer", before_step=measure_conflict)
"""Trains as usual, and measures the cosines between the tasks' gradients."""


def peak_memory(trainer: Trainer) -> int:
    """The most bytes that one update allocates beyond what existed before it.

    The maximum is over one update of each task and view. It is computed from the CPU allocations that torch's profiler
    records, so it does not depend on other programs. The trainer must not have made a step yet. It cannot be used
    afterwards, because it has made updates.
    """
    first_steps: dict[tuple[str, int], int] = {}  # of each task and view
    for step, visit in enumerate(trainer.batches.schedule):
        first_steps.setdefault((visit.task, visit.view), step)
    step_groups = [[step] for step in sorted(first_steps.values())]
    if (round_length := trainer.steps_per_update) > 1:  # Whole rounds, until every view has occurred.
        rounds = -(-(max(first_steps.values()) + 1) // round_length)
        step_groups = [[*range(min(rounds * round_length, len(trainer.batches)))]]
    batch_groups = [[trainer.batches[step] for step in steps] for steps in step_groups]
    # The first updates create the optimizer state, which must not count.
    for batches in batch_groups:
        _make_steps(trainer, batches)
    peak = max(peak_bytes(partial(_make_steps, trainer, batches)) for batches in batch_groups)
    trainer.log.close()
    return peak


def _make_steps(trainer: Trainer, batches: Iterable[LoadedBatch]) -> None:
    for loaded in batches:
        trainer.make_step(loaded)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors on the CPU hold at any moment of `work`, beyond what they held before it."""
    # At lower levels kineto prints its start and end.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    allocations = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocations.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in allocations))
