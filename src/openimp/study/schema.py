"""The schema of a study file: a recipe, the variants that are compared, and the compute of each."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from openimp.common.schema import FolderName, Positive, Strict, checked
from openimp.recipe.file import find_file, read_mapping

SMOKE_FLOPS = 0.002
"""Share of the FLOPs that --smoke spends."""


def _distinct(items: list[Any]) -> list[Any]:
    for item in items:
        if items.count(item) > 1:
            raise ValueError(f"{item!r} is given twice")
    return items


Score = Literal["mrr", "accuracy"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Distinct = AfterValidator(_distinct)


class ArmModel(Strict):
    """One model of an arm."""

    set: list[str] = Field([])
    """Changes to the study's recipe, as --set takes them: relative paths start at the current directory. The FLOPs and
    seeds determine train.steps, train.save_every, optimizer.warmup_steps and seed, so these cannot be set."""
    tasks: Annotated[list[str], Distinct] | None = None
    """Train only these tasks, with their share of the FLOPs, and evaluate only on their modalities. null: all tasks."""
    summed: bool = False
    """Sum the losses of all tasks in each update, instead of alternating. Each task's `interval` is then 1."""
    two_towers: bool = False
    """Train open_clip's two towers on the only task, instead of openimp's model. `set` adapts the task to them."""
    flops_factor: Positive = 1.0
    """The model gets this many times its share of the study's FLOPs."""


Arm = Annotated[
    list[ArmModel], Field(min_length=1), BeforeValidator(lambda value: value if isinstance(value, list) else [value])
]


class Study(Strict):
    """A comparison of variants of a recipe at equal compute."""

    title: str
    """The title of the results page."""
    question: str
    """The question, and the paper's answer to it."""
    recipe: str
    """The recipe that all arms change: a file, relative to the study file, or the name of a bundled recipe."""
    set: list[str] = Field([])
    """Changes to the recipe that all arms share, in the same form."""
    flops: Positive
    """Training FLOPs per arm and seed."""
    seeds: Annotated[list[Seed], Distinct] = Field([0, 1, 2], min_length=1)
    """Each arm is trained once per seed."""
    score: Score = "mrr"
    """mrr: the mean reciprocal rank of the retrieval sets. accuracy: top-1 or mAP of the sets with classes, and R@1 of
    the retrieval sets. A set with several results, such as both directions of retrieval, counts with their mean."""
    conflict: bool = False
    """Measure the cosine between the tasks' gradients on the encoder throughout the training."""
    arms: Annotated[dict[FolderName, Arm], Field(min_length=2)]
    """By name, the model of an arm, or a list of models that share its FLOPs."""
    findings: str = ""
    """An interpretation of the results, written once they are known."""

    @model_validator(mode="after")
    def _arms_are_possible(self) -> "Study":
        name_of_folder: dict[str, str] = {}
        for name, models in self.arms.items():
            other = name_of_folder.setdefault(file_name(name), name)
            if other != name:
                raise ValueError(f"arms {other!r} and {name!r} would have the same folder; rename one")
            tasks = [task for model in models for task in model.tasks or ()]
            if len(models) > 1 and (len(set(tasks)) < len(tasks) or not all(model.tasks for model in models)):
                raise ValueError(f"arm {name!r}: each of its models needs `tasks` that no other model of the arm has")
            for model in models:
                if self.conflict and (model.summed or model.two_towers or model.tasks):
                    raise ValueError(
                        f"conflict compares the gradients of all tasks on one encoder, but arm {name!r} is summed, has "
                        "two towers or trains only some tasks"
                    )
                if model.summed and model.two_towers:
                    raise ValueError(f"arm {name!r}: two towers have only one task, so no losses can be summed")
        return self


def file_name(arm: str) -> str:
    """The name of an arm as a part of file names."""
    return re.sub("[ _]", "-", arm.replace(",", ""))


def read_study(name: str, smoke: bool) -> tuple[Study, str]:
    """Reads a study file, or a bundled study, and returns it with the name of its results. `smoke` reduces it to one
    seed and a small part of the FLOPs."""
    file = find_file(name, "studies", "study")
    study = checked(Study, read_mapping(file, "study"), str(file), file.parent)
    beside = file.parent / study.recipe
    if beside.is_file():
        study = study.model_copy(update={"recipe": str(beside)})
    if not smoke:
        return study, file.stem
    smaller = {
        "title": f"{study.title} (--smoke: the figures mean nothing)",
        "flops": study.flops * SMOKE_FLOPS,
        "seeds": study.seeds[:1],
        "findings": "",  # They describe the results of the full study.
    }
    return study.model_copy(update=smaller), f"{file.stem}-smoke"
