"""The tables that `openimp plan` and `openimp info` print."""

from collections.abc import Sequence

from openimp.common.modality import Classes, Modalities
from openimp.common.progress import clock, console, number_table
from openimp.model.embedder import Embedder
from openimp.model.imp import IMP
from openimp.planning.costs import META, costs, mixture_table, short
from openimp.planning.gpus import GIB
from openimp.planning.plan import Plan, active_parameters, parameter_count, recommended
from openimp.recipe.model_config import ModelConfig
from openimp.recipe.schema import Recipe


def print_plan(recipe: Recipe, plans: Sequence[Plan], gpu: str) -> None:
    """Prints the first plan, compares it with the other plans, and says whether it fits on GPUs of the type `gpu`."""
    recipe_plan = plans[0]
    _print_parameters(recipe_plan.model)
    step_rows = [
        (
            f"{task}, {view}",
            f"{step.cost.examples:,}",
            f"{step.cost.tokens:,}",
            short(step.cost.flops),
            f"{1e3 * step.compute_seconds:,.1f}",
            f"{1e3 * step.wait_seconds:,.1f}",
            f"{step.received_bytes / 1e9:,.2f}",
            f"{step.memory.total / GIB:,.2f}",
        )
        for (task, view), step in recipe_plan.step_needs.items()
    ]
    head = ("task, view", "examples", "tokens", "FLOPs", "computes\nms", "waits\nms", "receives\nGB", "memory\nGiB")
    console.print(number_table(f"one step, divided by {recipe_plan.layout.ranks}", head, step_rows))
    task, view = recipe_plan.peak_task_view
    memory = recipe_plan.step_needs[task, view].memory
    memory_head = (f"largest step: {task}, view {view}", "GiB")
    memory_rows = [(name.replace("_", " "), f"{size / GIB:,.3f}") for name, size in memory._asdict().items()]
    total_row = ("in all", f"{memory.total / GIB:,.3f}")
    console.print(number_table("memory of a GPU", memory_head, memory_rows, [total_row]))
    if len(plans) > 1:
        layout_rows = [
            (
                str(plan.layout),
                f"{plan.memory_bytes / GIB:,.1f}",
                "yes" if plan.fits else "no",
                duration(plan.compute_seconds),
                duration(plan.wait_seconds),
                duration(plan.seconds),
            )
            for plan in plans
        ]
        layout_head = ("parallel", "memory\nGiB", "fits", "computes", "waits", "whole run")
        console.print(number_table("layouts; this plan is that of the first", layout_head, layout_rows))
    _print_verdict(recipe, recipe_plan, recommended(plans), gpu)


def _print_verdict(recipe: Recipe, plan: Plan, best: Plan, gpu: str) -> None:
    verdict = "fits" if plan.fits else "does not fit"
    utilization = "HFU" if any(step.cost.repeated_flops for step in plan.step_needs.values()) else "MFU"
    lines = [
        f"{recipe.name} {verdict}: {plan.memory_bytes / GIB:,.2f} of {plan.gpu.usable_bytes / GIB:.1f} GiB for tensors "
        f"on each of {plan.layout.ranks} x {gpu}",
        f"{recipe.train.steps:,} steps, {short(plan.flops)}FLOPs: {duration(plan.compute_seconds)} at an {utilization} "
        f"of {plan.utilization:.0%}",
    ]
    if recipe.train.precision == "fp32":
        lines.append("the time is that of bf16 (train.precision); fp32 takes several times as long")
    if plan.layout.ranks > 1:
        lines.append(f"with communication about {duration(plan.seconds)}, an estimate from published bandwidths")
        advice = "as recommended" if best is plan else f"better: {best.layout}"
        lines.append(f"parallel: {plan.layout}; {advice if best.fits else 'no other layout fits'}")
    if not best.fits:
        lines.append("try memory.chunk_size, memory.activation_checkpointing, smaller batches, or other GPUs")
    console.print("\n".join(lines), soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds as days or, below one day, as hours, minutes and seconds."""
    return f"{seconds / 86400:,.1f} days" if seconds >= 86400 else clock(seconds)


def print_model(config: ModelConfig, modalities: Modalities) -> None:
    """Prints the parameters of a model."""
    with META:
        model = IMP(config, modalities)
    _print_parameters(model)
    for stem, options in config.modalities.items():
        if hasattr(options, "tower"):
            console.print(f"{stem} is read by the frozen encoder {options.tower}, which is not counted", soft_wrap=True)


def print_costs(recipe: Recipe, modalities: Modalities, classes: Classes) -> None:
    """Prints what a step of each task and view costs, and the mixture of the tasks."""
    cost_by_task_view = costs(recipe, modalities, classes)
    rows = [
        (task, str(view), str(cost.examples), str(cost.tokens), f"{cost.flops / 1e9:,.1f}")
        for (task, view), cost in cost_by_task_view.items()
    ]
    console.print(number_table("one step", ("task", "view", "examples", "tokens", "GFLOPs"), rows))
    console.print(mixture_table(recipe, cost_by_task_view))


def _print_parameters(model: Embedder) -> None:
    """Prints the parameters by part of the model."""
    rows = [(name, f"{parameter_count(part):,}") for name, part in model.named_children()]
    totals = [("in all", f"{parameter_count(model):,}")]
    if isinstance(model, IMP):
        totals.append(("used by a token on average, after its embedding", f"{active_parameters(model):,}"))
    if frozen := parameter_count(model, frozen=True):
        totals.append(("frozen", f"{frozen:,}"))
    console.print(number_table("parameters", ("part", "parameters"), rows, totals))
