"""What a study file says: a recipe, the variants of it that are compared, and the compute that each gets."""

import re
from collections.abc import Sequence
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, model_validator

from openimp.common.errors import UserError, nearest
from openimp.common.modality import modalities_of
from openimp.data.loader import StepBatches
from openimp.planning.ledger import costs, mixture
from openimp.recipe.file import RecipeLoader, find_file, flat, read_mapping
from openimp.recipe.schema import Positive, Recipe, Strict, checked
from openimp.study.two_towers import flops_of_a_step as towers_flops

SAVES = 5
"""Checkpoints of a training, for stops that nobody asked for."""
DERIVED = {"train.steps", "train.save_every", "optimizer.warmup", "seed"}
SMOKE_FLOPS, SMOKE_ROWS, SMOKE_BATCH = 0.002, 48, 16
"""With --smoke: the share of the FLOPs, rows of each source, and examples a step."""
MOST_STEPS = 10**8
"""Of a training, whose whole schedule is in memory."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Part(Strict):
    """One model of an arm."""

    set: list[str] = Field([])
    """Changes of the study's recipe, as --set takes them, but for what follows from the FLOPs and seeds: train.steps,
    train.save_every, optimizer.warmup and seed."""
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


def part_recipe(study: Study, part: Part, seed: int, smoke: bool = False) -> Recipe:
    """The recipe of one model, with as many steps as its share of the FLOPs pays for.

    Raises:
        UserError: a change that the recipe does not take, an unknown task, or more FLOPs than anyone can train for.
    """
    data = Recipe.load(study.recipe, [*study.set, *part.set, f"seed={seed}"]).to_dict()
    for key, _, value in (change.partition("=") for change in (*study.set, *part.set)):
        for derived in flat({key.strip(): yaml.load(value, RecipeLoader)}).keys() & DERIVED:
            raise UserError(f"{derived} follows from the study's FLOPs and seeds")
    if part.summed:
        data["alternation"]["kind"] = "intervals"
        for task in data["tasks"].values():  # A round sums one batch of each.
            task["interval"] = 1
    if smoke:
        _make_small(data)
    share = 1.0
    if part.tasks is not None:
        # Shares are those of the study's recipe: what the part sets may change what a step of its task costs.
        whole = Recipe.load(study.recipe, study.set)
        spent = _flops_of_a_step(whole)
        _keep_tasks(data, part.tasks, whole)
        share = sum(spent.get(name, 0) for name in part.tasks) / sum(spent.values())  # A task of weight 0 has none.
    recipe = Recipe.build(data)
    a_step = towers_flops(recipe) if part.two_towers else sum(_flops_of_a_step(recipe).values())
    paid = part.flops * share * study.flops / a_step
    if paid > MOST_STEPS:
        raise UserError(f"its FLOPs pay for {paid:.2g} steps, where a training takes at most {MOST_STEPS:,}")
    steps = max(1, round(paid))
    # A whole number of rounds, for within one of summed losses nothing can be saved.
    rounds = len(data["tasks"])
    data["train"].update(steps=steps, save_every=max(1, steps // (SAVES * rounds)) * rounds)
    data["optimizer"]["warmup"] = None  # A share of the steps: a fixed number would be all of a short training.
    return Recipe.build(data)


def _make_small(data: dict[str, Any]) -> None:
    for source in data["sources"].values():
        source.update(limit=SMOKE_ROWS, cache="none")
    for task in data["tasks"].values():
        task["batch"] = SMOKE_BATCH
    data["train"]["workers"] = 0


def _keep_tasks(data: dict[str, Any], names: list[str], whole: Recipe) -> None:
    """Leaves out the other tasks, and the modalities and evaluation sets that then have no use."""
    for name in names:
        if name not in data["tasks"]:
            raise UserError(f"study: no task of the recipe is called {name!r}{nearest(name, data['tasks'])}")
    data["tasks"] = {name: data["tasks"][name] for name in names}
    seen = {name for task in data["tasks"].values() for name in task["inputs"]}
    stems = {modality.stem for name, modality in modalities_of(whole).items() if name in seen}
    data["modalities"] = {stem: options for stem, options in data["modalities"].items() if stem in stems}
    data["evaluation"]["sets"] = {
        name: options
        for name, options in data["evaluation"]["sets"].items()
        if {*options["inputs"], *([options["reader"]] if "reader" in options else [])} <= seen
    }


def _flops_of_a_step(recipe: Recipe) -> dict[str, float]:
    """What each task contributes to the FLOPs of the mean step."""
    data = recipe.to_dict()
    for source in data["sources"].values():
        source["cache"] = "none"
    recipe = Recipe.build(data)
    modalities = modalities_of(recipe)
    batches = StepBatches(recipe, modalities)
    return {name: row["flops"] for name, row in mixture(recipe, costs(recipe, modalities, batches.classes)).items()}
