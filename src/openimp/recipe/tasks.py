"""The schema of `sources` and `tasks` in the recipe."""

from collections.abc import Iterable
from itertools import combinations
from typing import Annotated, Literal

from pydantic import Field, model_validator

from openimp.common.errors import UserError, nearest
from openimp.common.schema import Count, Positive, RecipePath, Strict, Whole
from openimp.recipe.inputs import Inputs, View
from openimp.recipe.registry import modality_class


class Part(Strict):
    """A fixed share of the rows, for example to hold some out for evaluation.

    A hash assigns each row to one of `of` parts of about equal size. Rows that are appended later change no assignment.
    """

    of: Annotated[int, Field(ge=2)]
    """Number of parts."""
    keep: Annotated[list[Whole], Field(min_length=1)] | None = None
    """The parts that are selected, counted from 0."""
    drop: Annotated[list[Whole], Field(min_length=1)] | None = None
    """The parts that are left out; all others are selected. Give either `keep` or `drop`."""
    by: str | None = None
    """Rows with equal values in this column are in the same part, so that no caption, picture or speaker is in two.
    Case and white space do not count. null, or a row without a value: the number of the row is hashed."""

    @model_validator(mode="after")
    def _one_choice(self) -> "Part":
        if (self.keep is None) == (self.drop is None):
            raise ValueError("give exactly one of keep and drop")
        if (highest := max(self.keep or self.drop or ())) >= self.of:
            raise ValueError(f"there is no part {highest}, because {self.of} parts are counted from 0")
        return self

    def selects(self, part: int) -> bool:
        """Whether the rows of a part are selected."""
        return part in self.keep if self.keep is not None else part not in (self.drop or ())


class Source(Strict):
    """Data from exactly one `path` or `hub`. Several tasks may share a source."""

    path: RecipePath | None = None
    """A folder (of files, or one subfolder per class), a manifest (.csv, .json or .jsonl), .parquet or .tar files (`*`
    matches several files), a URL that fsspec opens, or `openimp:NAME` for bundled data. Relative to the recipe's
    folder; `~` is the home directory."""
    hub: str | None = None
    """The name of a data set on the Hugging Face Hub."""
    config: str | None = None
    """The configuration of a hub data set."""
    split: str = "train"
    """The split of a hub data set."""
    revision: str | None = None
    """The commit, tag or branch of a hub data set. Default: the newest version, which its owner may change."""
    format: Literal["folder", "manifest", "parquet", "webdataset"] | None = None
    """The data's format. Default: that of the path's extension."""
    root: RecipePath | None = None
    """The folder to which paths in the rows are relative. Files outside of it are never read. Default: the folder of
    the manifest or, for a hub data set, its own folder in the hub's cache."""
    license: str | None = None
    """The license of the data, such as CC-BY-4.0, for the model card that `openimp push` writes."""
    where: dict[str, str | int | bool | list[str] | list[int]] = {}
    """Selects the rows in which each of these columns has the given value, or one of the given values."""
    part: Part | None = None
    """Selects a fixed share of the rows that `where` leaves. Streams have no parts."""
    stream: bool = False
    """Reads the shards (files) forward: tars, and other data that does not fit on disk."""
    lanes: Count = 64
    """Number of shards that are read at the same time, only for streams. Each rank, and each of its workers, reads some
    of the lanes and nothing else. The number of lanes must divide batch sizes, and should be a multiple of the number
    of ranks. If there are fewer shards, it is the largest divisor of this number that they can fill."""
    window: Count = 1024
    """Number of rows that are shuffled together, only for streams: each lane shuffles its share of consecutive rows."""
    limit: Count | None = None
    """Selects at most this many evenly spaced rows, for a quick trial. Streams have no limit."""
    cache: Literal["none", "memory", "disk"] = "none"
    """Where decoded pictures, clips and sounds are stored, so that small data is decoded only once. Do not cache clips
    of more than 256 frames or sounds of more than 300 s: only the parts that evaluation reads would be stored."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path and hub")
        if self.stream and self.cache != "none":
            raise ValueError("a streamed source cannot be cached; remove stream or cache")
        if self.stream and self.part:
            raise ValueError("a streamed source has no parts; remove stream or part")
        if self.stream and self.limit:
            raise ValueError("a streamed source has no limit; remove stream or limit")
        # A resolved recipe contains all defaults, so only other values are errors.
        if self.path and (self.config, self.split, self.revision) != (None, "train", None):
            raise ValueError("config, split and revision are for hub data sets; to select rows of a path, use where")
        if self.hub and self.format:
            raise ValueError("format is for a path; remove it")
        for key in ("lanes", "window"):
            if not self.stream and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for streams; remove it, or set stream: true")
        return self


class Contrastive(Strict):
    """Symmetric contrastive loss between pairs of the task's modalities.

    A pair has the same heads and the same temperature in all tasks. Within a task, one objective may compare it.
    """

    type: Literal["contrastive"]
    """The kind of objective."""
    pairs: Annotated[list[Annotated[list[str], Field(min_length=2, max_length=2)]], Field(min_length=1)] | None = None
    """Pairs of modalities. Default: all pairs of the task's modalities."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: InfoNCE, in which the probabilities of an item's positives are summed (MIL-NCE, arXiv 1912.06430).
    sigmoid: SigLIP's loss (arXiv 2303.15343)."""
    same: str | None = None
    """Rows with equal values in this column are the same item, so they are positives of each other. Case and white
    space do not count. A row without a value is an item by itself. Default: each row is an item."""
    weight: Positive = 1.0
    """Weight of its loss in the task's sum."""


class Classification(Strict):
    """A linear classification head on the pooled features, one per source and label column."""

    renamed = {"smoothing": "label_smoothing"}

    type: Literal["classification"]
    """The kind of objective."""
    label: str
    """The column with the class or, if the loss is sigmoid, with a list of classes. An empty cell is an empty list."""
    of: str | None = None
    """The modality to classify. Default: each of the task's modalities except those with a mask, such as text."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: one class per example. sigmoid: any number of classes per example."""
    classes: list[str] | list[int] | None = None
    """The classes, in the order of the head's outputs. Default: all values of the column. Required for streams."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is distributed over all classes."""
    weight: Positive = 1.0
    """Weight of its loss in the task's sum."""


class Distill(Strict):
    """Trains the embeddings of one modality to match the vectors in a column, for example those of a larger model.

    The projection head is that of the modality in the embedding space. So modalities that learn from one model can be
    compared with each other, and with this model's own vectors. In a disjoint space, each must name the other.
    """

    type: Literal["distill"]
    """The kind of objective."""
    of: str
    """The modality to train. It must be an input of the task."""
    to: str
    """The column with a list of numbers per row, as `openimp embed --join` writes it: `model.embed_dim` of them, or as
    many as the embeddings of a wrapped model have. They are scaled to length 1. A row without such a list is a bad
    example."""
    towards: str | None = None
    """The modality with which the embeddings are to be compared, only for `model.space: disjoint`, which has a head for
    each. Default: the task's other input, if there is one."""
    loss: Literal["cosine", "contrastive"] = "cosine"
    """cosine: 1 - cosine (arXiv 2307.12732 compares such losses). contrastive: InfoNCE (arXiv 1807.03748), in which an
    embedding is to find its vector among those of the whole batch. Rows with equal vectors are the same item."""
    temperature: Positive = 0.07
    """Temperature of the contrastive loss. It is not learned."""
    weight: Positive = 1.0
    """Weight of its loss in the task's sum."""


Objective = Annotated[Contrastive | Classification | Distill, Field(discriminator="type")]


class Task(Strict):
    """A source, the modalities that are read from it, their views, the objectives, a batch size and a weight."""

    renamed = {"batch": "batch_size"}

    source: str
    """The name of a source."""
    inputs: Inputs
    """The column or text template that each modality reads."""
    objectives: Annotated[list[Objective], Field(min_length=1)]
    """Losses, which are summed with their weights."""
    views: Annotated[list[View], Field(min_length=1, default_factory=lambda: [View()])]
    """How the examples are presented. Each of the task's steps draws one view."""
    batch_size: Count = 256
    """Examples per step, over all ranks."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """How often the task is drawn, relative to the other tasks (alternation random, cycle and sequence). 0: never."""
    interval: Count = 1
    """The task is visited once per this many rounds (alternation intervals)."""


def pairs_of(objective: Contrastive, inputs: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs of modalities that an objective compares: those that it names, or all pairs of the inputs."""
    return list(combinations(inputs, 2)) if objective.pairs is None else [(a, b) for a, b in objective.pairs]


def classified_by(objective: Classification, inputs: Iterable[str]) -> list[str]:
    """The modalities that an objective classifies: the one that it names, or all inputs without a mask."""
    return [objective.of] if objective.of else [name for name in inputs if not modality_class(name).masked]


def target_of(objective: Distill, inputs: Iterable[str]) -> str:
    """The modality that the distilled embeddings can be compared with, which determines the head.

    If the recipe names none, it is the task's only other input, or else the distilled modality itself, which only a
    joint space allows.
    """
    others = [name for name in inputs if name != objective.of]
    return objective.towards or (others[0] if len(others) == 1 else objective.of)


def check_objectives(key: str, task: Task) -> None:
    """Checks that the task has the inputs of its objectives, and that no two objectives do the same.

    Those would share a temperature or a head, and the name of their metric. Messages begin with `key`.
    """
    done: dict[str, int] = {}
    for i, objective in enumerate(task.objectives):
        where = f"{key}.objectives.{i}"
        if isinstance(objective, Contrastive):
            pairs = pairs_of(objective, task.inputs)
            used = [modality for pair in pairs for modality in pair]
            work = [f"compares {' and '.join(sorted(pair))}, with the same temperature" for pair in pairs]
            if not pairs:
                raise UserError(f"{where}: a contrastive objective needs two inputs")
            if any(a == b for a, b in pairs):
                raise UserError(f"{where}.pairs: a pair needs two different modalities")
        elif isinstance(objective, Distill):
            used = [objective.of]
            work = [f"distills {objective.of} to {objective.to}"]
        else:
            used = classified_by(objective, task.inputs)
            work = [f"classifies {name} by {objective.label}, with the same head" for name in used]
            if not used:
                raise UserError(f"{where}: no input is without a mask, so name the modality to classify in `of`")
        for modality in used:
            if modality not in task.inputs:
                raise UserError(f"{where}: {modality!r} is not an input of the task{nearest(modality, task.inputs)}")
        for what in work:
            if what in done:
                raise UserError(f"{where}: objectives.{done[what]} already {what}; drop one of the two")
            done[what] = i
