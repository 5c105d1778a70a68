"""The schema of `sources` and `tasks` in the recipe."""

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from openimp.common.names import HUB, HubName, Name, map_path
from openimp.common.objective import ClassColumn, Objective, Teacher
from openimp.common.schema import Count, NotNegative, RecipePath, Strict, Whole
from openimp.recipe.inputs import Inputs, View
from openimp.recipe.registry import validated_objective


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
        highest = max(self.keep or self.drop or ())
        if highest >= self.of:
            raise ValueError(f"there is no part {highest}, because {self.of} parts are counted from 0")
        return self

    def selects(self, part: int) -> bool:
        """Whether the rows of a part are selected."""
        if self.keep is not None:
            return part in self.keep
        return part not in (self.drop or ())

    def is_disjoint(self, other: "Part") -> bool:
        """Whether surely no row is selected by both."""
        equal_parts = (self.of, self.by) == (other.of, other.by)
        return equal_parts and not any(self.selects(part) and other.selects(part) for part in range(self.of))


Unwanted = Annotated[dict[Literal["not"], str | int | bool | list[str | int | None] | None], Field(min_length=1)]
"""`{not: VALUES}`: rows with one of these values in a column are left out."""


class Source(Strict):
    """Data from exactly one `path` or `hub`. Several tasks may share a source."""

    path: RecipePath | None = None
    """A folder (of files, or one subfolder per class), a manifest (.csv, .tsv, .json, .jsonl), a .parquet or .tar file,
    several such files by a pattern with `*`, a URL that fsspec opens, `openimp:NAME` for bundled data, or
    `hub:OWNER/NAME`. Relative to the recipe's folder; `~` is the home directory."""
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
    where: dict[str, str | int | bool | list[str] | list[int] | Unwanted] = {}
    """Selects the rows in which each of these columns has the given value, or one of the given values. `{not: VALUE}`
    or `{not: [VALUE, ...]}`: rows with other values; `{not: null}`: rows with any value."""
    part: Part | None = None
    """Selects a fixed share of the rows that `where` leaves. Streams have no parts."""
    stream: bool = False
    """Reads the shards (files) forward: tars, and other data that does not fit on disk."""
    lanes: Count = 64
    """Only for streams: the number of lanes. A lane reads one shard at a time. Each rank, and each of its workers,
    reads whole lanes. The number must divide batch sizes, and should be a multiple of the number of ranks.
    With fewer shards than lanes, the stream has the largest divisor of `lanes` that is not above the number of
    shards."""
    window: Count = 1024
    """Only for streams: number of rows that are shuffled together. Each lane shuffles its share of them."""
    limit: Count | None = None
    """Selects at most this many evenly spaced rows, for a quick trial. Streams have no limit."""
    cache: Literal["none", "memory", "disk"] = "none"
    """Where decoded pictures, clips and sounds are stored, so that small data is decoded only once. Do not cache clips
    of more than 256 frames or sounds of more than 300 s: only the parts that evaluation reads would be stored."""

    @model_validator(mode="before")
    @classmethod
    def _named_on_hub(cls, data: Any) -> Any:
        """`path: hub:OWNER/NAME@REVISION` is the same as the keys `hub` and `revision`."""
        path = data.get("path") if isinstance(data, dict) else None
        if not isinstance(path, str):
            return data
        name = Name.parse(path)
        if name.scheme != HUB:
            return data
        hub_name = HubName.parse(name.rest)
        if hub_name is None:
            raise ValueError(f"path: expected hub:OWNER/NAME or hub:OWNER/NAME@REVISION, found {path!r}")
        if data.get("hub") is not None:
            raise ValueError("give exactly one of path and hub")
        revision = data.get("revision")
        if hub_name.revision and revision not in (None, hub_name.revision):
            raise ValueError(f"revision is {revision!r}, and path names {hub_name.revision!r}; give one of the two")
        return {**data, "path": None, "hub": hub_name.repository, "revision": hub_name.revision or revision}

    @model_validator(mode="after")
    def _options_fit(self) -> "Source":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path and hub")
        if self.stream:
            self.refuse(("cache", "part", "limit"), "does not work with stream; remove one of the two")
        else:
            self.refuse(("lanes", "window"), "is for streams; remove it, or set stream: true")
        if self.hub:
            self.refuse(("format",), "is for a path; remove it")
        else:
            self.refuse(("config", "split", "revision"), "is for hub data sets; to select rows of a path, use where")
        return self

    @property
    def data(self) -> tuple[str | None, ...]:
        """What identifies the data, without the selection of rows. Revisions of a hub data set count as equal."""
        paths = (None if path is None else map_path(str(path), os.path.realpath) for path in (self.path, self.root))
        return (*paths, self.hub, self.config, self.split)

    @property
    def selection(self) -> tuple[Any, ...]:
        """What selects the rows of the data."""
        return (self.where, self.part, self.limit)


AnyObjective = Annotated[SerializeAsAny[Objective], BeforeValidator(validated_objective)]
"""An instance of the class that its `type` names."""


class Task(Strict):
    """A source, the modalities that are read from it, their views, the objectives, a batch size and a weight."""

    source: str
    """The name of a source."""
    inputs: Inputs
    """The column or text template that each modality reads."""
    objectives: Annotated[list[AnyObjective], Field(min_length=1)]
    """Losses, which are summed with their weights."""
    views: Annotated[list[View], Field(min_length=1, default_factory=lambda: [View()])]
    """How the examples are presented. Each of the task's steps uses one view; see `alternation.views`."""
    batch_size: Count = 256
    """Examples per step, over all ranks."""
    weight: NotNegative = 1.0
    """How often the task is drawn, relative to the other tasks (alternation random, cycle and sequence). 0: never."""
    interval: Annotated[int, Field(ge=1, le=10**6)] = 1
    """The task is visited once per this many rounds (alternation intervals)."""

    @property
    def batch_sizes(self) -> list[int]:
        """The batch size of each view."""
        return [view.batch_size or self.batch_size for view in self.views]

    @property
    def class_columns(self) -> list[ClassColumn]:
        """The columns for which the objectives need classification heads."""
        columns = [objective.class_column() for objective in self.objectives]
        return [column for column in columns if column]

    @property
    def teachers(self) -> list[Teacher]:
        """The models that the objectives learn from."""
        return [teacher for objective in self.objectives if (teacher := objective.taught_by())]
