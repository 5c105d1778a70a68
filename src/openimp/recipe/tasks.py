"""The schema of `sources` and `tasks` in the recipe."""

from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Literal

from pydantic import Field, model_validator

from openimp.common.errors import UserError, nearest
from openimp.common.schema import Count, Positive, RecipePath, Strict
from openimp.recipe.inputs import Input, Inputs, View
from openimp.recipe.registry import modality_class


class Source(Strict):
    """Where examples come from. Exactly one of `path` and `hub`; several tasks may share a source."""

    path: RecipePath | None = None
    """A folder (one sub-folder a class), a .csv/.jsonl manifest, .parquet or .tar files (`*` allowed), a URL that
    fsspec opens, or `openimp:NAME` for bundled data. Relative to the recipe."""
    hub: str | None = None
    """A data set's name on the Hugging Face hub."""
    config: str | None = None
    """The configuration of a hub data set."""
    split: str = "train"
    """The split of a hub data set."""
    revision: str | None = None
    """The commit, tag or branch of a hub data set. Left out: the newest version, which its owner may change."""
    format: Literal["folder", "manifest", "parquet", "webdataset"] | None = None
    """Left out: told by the path."""
    root: RecipePath | None = None
    """The folder to which paths in the rows are relative. Left out: the manifest's folder; for a hub data set, its own
    folder in the hub's cache. Files outside of this folder are never read."""
    where: dict[str, str | int | bool | list[str] | list[int]] = {}
    """Keep the rows whose column has this value, or one of these values."""
    stream: bool = False
    """Read in order, shard after shard, without an index: for what does not fit the disk."""
    window: Count = 1024
    """Streams only: examples that are shuffled together."""
    limit: Count | None = None
    """Tables only: keep at most so many of those rows, evenly spaced; for a quick try."""
    cache: Literal["none", "memory", "disk"] = "none"
    """Where decoded pictures, clips and sounds are kept, for data small enough to be decoded once. Of clips above 256
    frames and sounds above 300 s only the parts that evaluation sees are kept, end to end; do not cache those."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path and hub")
        if self.stream and self.cache != "none":
            raise ValueError("a streamed source cannot be cached; drop stream or cache")
        if self.stream and self.limit:
            raise ValueError("a streamed source has no limit; drop stream or limit")
        # Defaults are written out in a resolved recipe, so only other values can be told to be in vain.
        if self.path and (self.config, self.split, self.revision) != (None, "train", None):
            raise ValueError("config, split and revision are for hub data sets; to select rows of a path, use where")
        if self.hub and self.format:
            raise ValueError("format is for a path; drop it")
        if not self.stream and self.window != type(self).model_fields["window"].default:
            raise ValueError("window is for streams; drop it, or set stream: true")
        return self


class Contrastive(Strict):
    """Symmetric contrastive loss over pairs of the task's modalities."""

    type: Literal["contrastive"]
    """What kind of objective this is."""
    pairs: Annotated[list[Annotated[list[str], Field(min_length=2, max_length=2)]], Field(min_length=1)] | None = None
    """Left out: every pair of the task's modalities."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Softmax NCE with the positives of an item log-summed (MIL-NCE, arXiv 1912.06430), or SigLIP's sigmoid loss
    (arXiv 2303.15343)."""
    same: str | None = None
    """Rows with equal values in this column count as one item: positives of each other, never negatives. A row
    without a value is an item of its own."""
    weight: Positive = 1.0
    """How much its loss counts in the task's sum."""


class Classification(Strict):
    """One linear head for each (source, label column) on the pooled features."""

    renamed = {"smoothing": "label_smoothing"}

    type: Literal["classification"]
    """What kind of objective this is."""
    label: str
    """The column with the class, or (sigmoid) with a list of classes; where it is empty there, the row has none."""
    of: str | None = None
    """The modality to classify. Left out: each of the task's modalities that is not text-like (has no mask)."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """One class an example, or any number of them."""
    classes: list[str] | list[int] | None = None
    """The classes, in the order of the head's outputs; left out: every value that the column has. Streams need it."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over all classes."""
    weight: Positive = 1.0
    """How much its loss counts in the task's sum."""


Objective = Annotated[Contrastive | Classification, Field(discriminator="type")]


class Task(Strict):
    """A source, the modalities read from it, their views, one or more objectives, a batch size and a weight."""

    renamed = {"batch": "batch_size"}

    source: str
    """The name of one of `sources`."""
    inputs: Inputs
    """Which column, or text template, feeds which modality."""
    objectives: Annotated[list[Objective], Field(min_length=1)]
    """Summed with their weights."""
    views: Annotated[list[View], Field(min_length=1, default_factory=lambda: [View()])]
    """How its examples are seen; one view is drawn at each of the task's steps."""
    batch_size: Count = 256
    """Examples a step, over all processes."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """How often the task is drawn, against the other tasks (alternation random and cycle)."""
    interval: Count = 1
    """Visited every so many rounds (alternation intervals)."""


def check_objective(key: str, objective: Contrastive | Classification, inputs: Mapping[str, Input]) -> None:
    """An objective may name only modalities of its task."""
    named = chain(*(objective.pairs or [])) if isinstance(objective, Contrastive) else [objective.of]
    for modality in named:
        if modality is not None and modality not in inputs:
            raise UserError(f"{key}: objective {objective.type}: {modality!r} is no input{nearest(modality, inputs)}")
    if isinstance(objective, Contrastive):
        pairs = [frozenset(pair) for pair in objective.pairs or []]
        if any(len(pair) < 2 for pair in pairs) or len(set(pairs)) < len(pairs):
            raise UserError(f"{key}: objective contrastive: pairs needs different modalities, and each pair once")
    if isinstance(objective, Contrastive) and len(inputs) < 2:
        raise UserError(f"{key}: a contrastive objective needs two modalities in inputs")
    if isinstance(objective, Classification) and not objective.of and all(modality_class(n).masked for n in inputs):
        raise UserError(f"{key}: a classification of {', '.join(inputs)} only must name it as its `of`")
