"""`Objective`, the base class of contrastive, classification, distill and of objectives in other packages.

An objective is a loss, the columns that it reads and the heads that it needs. It registers through the entry point
group `openimp.objectives`. docs/objectives.md shows an objective in a package of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from openimp.common.modality import Tokens
from openimp.common.schema import Positive, Strict

if TYPE_CHECKING:
    from openimp.model.embedder import Embedder, EncodedAll
    from openimp.recipe.schema import Recipe
    from openimp.recipe.tasks import Task


Row = Mapping[str, Any]
"""The values of a row of a source, by column."""
Tensors = dict[str, Tensor]
"""Targets or losses, by name."""


class ClassColumn(NamedTuple):
    """A column with classes, for which the model gets a classification head."""

    name: str
    has_lists: bool  # each row has a list of classes; otherwise each row has one class
    classes: list[str] | list[int] | None  # in the order of the head's outputs; None: all values of the column


class TargetSizes(NamedTuple):
    """The sizes that determine the shapes of targets, besides the options of an objective."""

    embed_dim: int  # features of the model's embeddings
    class_numbers: Mapping[str, Mapping[Any, int]]  # the output of each class, by the name of the classification head


class Teacher(NamedTuple):
    """A frozen model whose embeddings of one modality of a task are targets."""

    modality: str
    model: str  # as a tower is named

    @property
    def column(self) -> str:
        """The name under which `Objective.read` finds the vector (Z,) of a row."""
        return f"{self.modality} by {self.model}"


class LossSizes(NamedTuple):
    """What a loss needs in one step, over all GPUs."""

    heads: int  # passes of features through a head
    vectors: int = 0  # vectors that each GPU receives from all, and their gradients
    similarities: int = 0


class Objective(Strict, ABC):
    """Base class of objectives. Its fields are the options in the recipe, each with a docstring below it.

    A subclass defines `type: Literal["NAME"]`, the name under which it is registered. Methods get the task that has the
    objective. Targets are the tensors that the loss compares embeddings or classes with.
    """

    type: str
    """The kind of objective."""
    weight: Positive = 1.0
    """Weight of its loss in the task's sum."""

    def check(self, location: str, task: Task, recipe: Recipe) -> None:
        """Raises a UserError, whose message begins with `location`, if the options do not fit the task or the recipe.

        Before, openimp checks that all `modalities` are inputs of the task.
        """

    def compared_pairs(self, task: Task) -> list[tuple[str, str]]:
        """The pairs of modalities that are trained to agree. The model has heads and a temperature for each."""
        return []

    def projected(self, task: Task) -> list[tuple[str, str]]:
        """Other projection heads that the loss uses: a modality, and the one that its vectors are compared with."""
        return []

    def modalities(self, task: Task) -> list[str]:
        """The modalities whose features the loss uses."""
        paired = [modality for pair in self.compared_pairs(task) for modality in pair]
        return paired + [modality for modality, _ in self.projected(task)]

    def class_column(self) -> ClassColumn | None:
        """The column with classes for which the objective needs a classification head."""
        return None

    def taught_by(self) -> Teacher | None:
        """The teacher that embeds one modality of all rows before the first step, for `read`."""
        return None

    def columns(self) -> set[str]:
        """The columns of the source that `read` needs."""
        return set()

    @abstractmethod
    def read(self, task: Task, row: Row, number: int, sizes: TargetSizes) -> Tensors:
        """Reads the targets of one example. Names and shapes must be the same for all rows.

        `number` is that of the row in its source.

        Raises:
            BadMedia: the target cannot be read; the example is skipped.
        """

    def read_texts(self, texts: Mapping[str, list[str]]) -> Tensors:
        """Further targets of one example, from the texts that its text modalities have drawn, `draw` texts each.

        The names must not be those of `read`. `zeros` has these targets, too.
        """
        return {}

    @abstractmethod
    def zeros(self, task: Task, examples: int, sizes: TargetSizes) -> Tensors:
        """The targets of a batch, of zeros: tensors of the shapes (B, ...) that the loader stacks."""

    @abstractmethod
    def losses(self, model: Embedder, task: Task, encoded: EncodedAll, targets: Tensors) -> Tensors:
        """The loss of each pair or modality, by a name for the metrics. Their mean is weighted with `weight`.

        No two objectives of a task may have losses with the same name.

        A modality with `draw: k` has k consecutive rows of features per example.
        """

    def loss_sizes(self, task: Task, examples: int) -> LossSizes:
        """What the loss needs in a step with this many examples, for `openimp plan`."""
        classified = self.modalities(task) if self.class_column() else []
        return LossSizes(heads=2 * len(self.compared_pairs(task)) + len(self.projected(task)) + len(classified))

    def warning(self, task: Task, tokens: Mapping[str, Tokens], targets: Tensors) -> str | None:
        """A sentence for the user if the task's first batch does not suit the objective. All ranks call it."""
        return None


def head_key(source: str, label: str) -> str:
    """The name of the classification head of a source's column. Module names must not contain a dot."""
    return f"{source}:{label}".replace(".", "/")
