"""What a study file says: a recipe, the variants of it that are compared, and the compute that each gets."""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from openimp.common.schema import Positive, Strict, checked
from openimp.recipe.file import find_file, read_mapping

SMOKE_FLOPS = 0.002
"""Share of the FLOPs that --smoke spends."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Part(Strict):
    """One model of an arm."""

    set: list[str] = Field([])
    """Changes of the study's recipe, as --set takes them, but for what follows from the FLOPs and seeds: train.steps,
    train.save_every, optimizer.warmup_steps and seed."""
    tasks: list[str] | None = None
    """Train these tasks only, with their share of the FLOPs, and measure what their modalities allow; null: all."""
    summed: bool = False
    """Sum the losses of all tasks in each update, in place of alternating; each task's `interval` is then 1."""
    two_towers: bool = False
    """Train open_clip's two towers on the one task, in place of openimp's model; `set` makes the task fit for them."""
    flops: Positive = 1.0
    """A multiple of the study's FLOPs."""


def _parts(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class Study(Strict):
    """What is compared, and with how much compute."""

    title: str
    """What is compared, in a line."""
    question: str
    """What is asked, and what the paper found."""
    recipe: str
    """The recipe that all arms change: a file, relative to the study's, or a bundled one's name."""
    set: list[str] = Field([])
    """Changes that all arms share."""
    flops: Positive
    """Training FLOPs of each arm and seed."""
    seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    """A training each."""
    conflict: bool = False
    """Measure the cosine between the tasks' gradients on the encoder, all through training."""
    clip_benchmark: list[str] = Field([])
    """Retrieval sets of pictures and texts that CLIP_benchmark's own function judges as well."""
    arms: Annotated[dict[str, Annotated[list[Part], Field(min_length=1), BeforeValidator(_parts)]], Field(min_length=2)]
    """By name, the model that makes an arm, or the list of those that share its FLOPs."""
    findings: str = ""
    """What the figures mean, written after they were seen."""

    @model_validator(mode="after")
    def _arms_can_be(self) -> "Study":
        _check_distinct("seeds", self.seeds)
        _check_distinct("clip_benchmark", self.clip_benchmark)
        alike: dict[str, str] = {}
        for name in self.arms:
            if {"/", "\\"} & set(name):  # Arms name folders, which are removed if a training left nothing in them.
                raise ValueError(f"arm {name!r}: no slash may be in its name")
            if not name.isprintable():
                raise ValueError(f"arm {name!r}: no control character may be in its name")
            # Spaces are others in the names of folders and pictures, and commas are left out of the latter.
            other = alike.setdefault(re.sub("[ _-]", "-", name.replace(",", "")), name)
            if other != name:
                raise ValueError(f"arms {other!r} and {name!r} would share files: only spaces, _ - or commas differ")
            seen: list[str] = []
            for part in self.arms[name] if len(self.arms[name]) > 1 else []:
                if part.tasks is None or set(part.tasks) & set(seen):
                    raise ValueError(f"arm {name!r}: each of its models needs tasks of its own, which share the FLOPs")
                seen += part.tasks
        for name, part in ((name, part) for name, parts in self.arms.items() for part in parts):
            _check_distinct(f"arm {name!r}: tasks", part.tasks or [])
            if self.conflict and (part.summed or part.two_towers or part.tasks):
                raise ValueError(f"conflict compares all tasks' gradients on one encoder, which arm {name!r} has not")
            if part.summed and part.two_towers:
                raise ValueError(f"arm {name!r}: two towers have one task; there is nothing to be summed")
        return self


def _check_distinct(where: str, given: Sequence[Any]) -> None:
    for item in given:
        if given.count(item) > 1:
            raise ValueError(f"{where}: {item!r} is given twice")


def read_study(name: str, smoke: bool) -> tuple[Study, str]:
    """A study by its file, or by the name of one that comes with openimp, and what to call its results.

    Raises:
        UserError: no such study, or an invalid one.
    """
    file = find_file(name, "studies", "study")
    study: Study = checked(Study, read_mapping(file, "study"), str(file), file.parent)
    beside = file.parent / study.recipe
    if beside.is_file():
        study = study.model_copy(update={"recipe": str(beside)})
    if not smoke:
        return study, file.stem
    # The findings are of the whole study's figures.
    smaller = {"flops": study.flops * SMOKE_FLOPS, "seeds": study.seeds[:1], "findings": ""}
    smaller["title"] = f"{study.title} (--smoke: figures that mean nothing)"
    return study.model_copy(update=smaller), f"{file.stem}-smoke"
