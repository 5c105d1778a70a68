"""The tables that `openimp plan` and `openimp info` print."""

from collections.abc import Sequence
from typing import Any

import torch

from openimp.common.errors import counted
from openimp.common.modality import Modalities
from openimp.common.progress import clock, console, number_table
from openimp.model.build import build_model
from openimp.planning.gpus import USABLE
from openimp.planning.ledger import costs, mixture_table, short
from openimp.planning.plan import Plan, count, encoder_per_token, recommended
from openimp.recipe.schema import Recipe


def print_plan(recipe: Recipe, modalities: Modalities, every: Sequence[Plan], gpu: str) -> None:
    """Prints the first plan, compares it with those of other layouts, and says whether it fits on the type `gpu`."""
    found = every[0]
    counts = {"used by a token on average, after its embedding": found.per_token}
    if found.frozen:
        counts["frozen"] = found.frozen
    _print_parameters(found.parameters, counts, modalities)
    _print_steps(found)
    task, view = found.largest
    rows = [(what, f"{size / 2**30:,.3f}") for what, size in found.steps[found.largest].memory.items()]
    whole = ("in all", f"{found.memory / 2**30:,.3f}")
    console.print(number_table("memory of a GPU", (f"largest step: {task}, view {view}", "GiB"), rows, [whole]))
    if len(every) > 1:
        _print_layouts(every)
    _print_verdict(recipe, found, recommended(every), gpu)


def _print_layouts(every: Sequence[Plan]) -> None:
    """Compares the layouts of a run. The first one is that of the recipe, or the default."""
    rows = [
        (
            str(found.layout._replace(reshard_after_forward=True)),
            "yes" if found.layout.reshard_after_forward else "no",
            f"{found.memory / 2**30:,.1f}", "yes" if found.fits else "no",
            duration(found.computing), duration(found.waiting), duration(found.seconds),
        )
        for found in every
    ]  # fmt: skip
    head = ("parallel", "reshard_after_\nforward", "memory\nGiB", "fits", "computes", "waits", "whole run")
    console.print(number_table("layouts; this plan is that of the first", head, rows))


def _print_verdict(recipe: Recipe, found: Plan, best: Plan, gpu: str) -> None:
    verdict, room = "fits" if found.fits else "does not fit", USABLE * found.gpu.memory
    utilization = "HFU" if any(step.cost.repeated_flops for step in found.steps.values()) else "MFU"
    lines = [
        f"{recipe.name} {verdict}: {found.memory / 2**30:,.2f} of {room:.1f} GiB for tensors on each of "
        f"{found.layout.ranks} x {gpu}",
        f"workers prepare {counted(recipe.train.prefetch_factor, 'batch')} in advance, at most "
        f"{found.prefetched / 2**30:,.2f} GiB of CPU memory per GPU",
        f"{counted(recipe.train.steps, 'step')}, {short(found.flops)}FLOPs: {duration(found.computing)} at an "
        f"{utilization} of {found.mfu:.0%}",
    ]
    if found.layout.ranks > 1:
        waiting = f"waiting is {found.waiting / found.computing:.1%} of computing"
        lines.append(f"with communication {duration(found.seconds)}: {waiting}")
        verdict = "as recommended" if best is found else f"better: {best.layout}"
        lines.append(f"parallel: {found.layout}; {verdict}")
    console.print("\n".join(lines), soft_wrap=True)


def duration(seconds: float) -> str:
    """Days, or hours, minutes and seconds."""
    return f"{seconds / 86400:,.1f} days" if seconds >= 86400 else clock(seconds)


def print_model(recipe: Recipe, modalities: Modalities, classes: dict[str, list[Any]]) -> None:
    """Prints the parameters of a recipe's model. `classes` has the classes of each head."""
    with torch.device("meta"):
        model = build_model(recipe, modalities, {name: len(values) for name, values in classes.items()})
    used = encoder_per_token(recipe, model) if recipe.model.moe else None
    parts = {name: count(part) for name, part in model.named_children()}
    _print_parameters(parts, {"encoder, used by a token on average": used}, modalities)


def _print_parameters(parts: dict[str, int], used: dict[str, int | None], modalities: Modalities) -> None:
    specs = {name: modality.stem_spec() for name, modality in modalities.items()}
    limits = {name: spec.values for name, spec in specs.items() if spec.is_limit}
    rows = [(name, f"{size:,}") for name, size in parts.items()]
    whole = [("in all, at most" if limits else "in all", f"{sum(parts.values()):,}")]
    whole += [(what, f"{some:,}") for what, some in used.items() if some is not None]
    console.print(number_table("parameters", ("part", "parameters"), rows, whole))
    for name, limit in limits.items():
        about = "the limit of its vocabulary, which is learned from the data and may be smaller"
        console.print(f"{name} counts with {limit:,} tokens, {about}", soft_wrap=True)


def _print_steps(found: Plan) -> None:
    head = ("task, view", "examples", "tokens", "FLOPs", "computes\nms", "waits\nms", "receives\nGB", "collec-\ntives",
            "activa-\ntions\nGiB", "memory\nGiB")  # fmt: skip
    rows = []
    for (task, view), step in found.steps.items():
        memory = (step.memory["activations"], sum(step.memory.values()))
        rows.append((
            f"{task}, {view}", f"{step.cost.examples:,}", f"{step.cost.tokens:,}", short(step.cost.flops),
            f"{1e3 * found.computes(step):,.1f}", f"{1e3 * found.waits(step):,.1f}", f"{step.received / 1e9:,.2f}",
            f"{len(step.traffic.collectives):,}", *(f"{size / 2**30:,.2f}" for size in memory),
        ))  # fmt: skip
    console.print(number_table(f"one step, divided by {found.layout.ranks}", head, rows))


def print_costs(recipe: Recipe, modalities: Modalities, classes: dict[str, list[Any]]) -> None:
    """Prints what a step of each task and view costs, and the mixture of the tasks."""
    by_view = costs(recipe, modalities, classes)
    rows = [
        (task, str(view), str(cost.examples), str(cost.tokens), f"{cost.flops / 1e9:,.1f}")
        for (task, view), cost in by_view.items()
    ]
    console.print(number_table("one step", ("task", "view", "examples", "tokens", "GFLOPs"), rows))
    console.print(mixture_table(recipe, by_view))
