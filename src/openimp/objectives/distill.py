"""`distill`: a modality learns the vectors of another model.

Shape suffixes: B examples of this rank, N embeddings, M vectors of all ranks, Z features of the embedding space.
"""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import model_validator

from openimp.common.device import full_precision
from openimp.common.errors import UserError, nearest
from openimp.common.modality import BadMedia
from openimp.common.objective import LossSizes, Objective, Row, TargetSizes, Teacher, Tensors
from openimp.common.schema import Positive, RecipePath
from openimp.data.tables import item_id, number_array
from openimp.model.embedder import Embedder, EncodedAll
from openimp.objectives.nce import mean_by_blocks, softmax_nce
from openimp.parallel.distributed import all_gather
from openimp.recipe.registry import modality_class
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Task


class Distill(Objective):
    """Trains the embeddings of one modality to match the embeddings of another model, the teacher.

    It trains the modality's own projection head. So modalities that learn from one teacher can be compared with each
    other, and with the teacher's own vectors. In a disjoint space, two modalities that are to be compared must each
    name the other in `towards`.
    """

    type: Literal["distill"]
    """The kind of objective."""
    of: str
    """The modality to train. It must be an input of the task."""
    teacher: RecipePath | None = None
    """A frozen model that embeds the rows before the first step, as an evaluation would read them: a run,
    `openimp:base`, `hub:OWNER/NAME`, `open_clip:NAME/TAG`, `timm:NAME` for pictures, or
    `sentence_transformers:OWNER/NAME`. All texts of a row learn the vector of one text, the one that an evaluation
    would read: that of the first template that fits. openimp's cache keeps the vectors. They must have
    `model.embed_dim` numbers."""
    to: str | None = None
    """Instead of `teacher`: the column with a list of numbers per row, as `openimp embed --join` writes it:
    `model.embed_dim` of them, which are scaled to length 1. A row without such a list is a bad example."""
    towards: str | None = None
    """The modality with which the embeddings are to be compared, only for `model.space: disjoint`, which has a head for
    each. So a modality may have two teachers. Default: the task's other input, if there is one."""
    loss: Literal["cosine", "contrastive"] = "cosine"
    """cosine: 1 - cosine (arXiv 2307.12732 compares such losses). contrastive: InfoNCE (arXiv 1807.03748), in which an
    embedding is to find its vector among those of the whole batch. Rows with equal vectors are the same item."""
    temperature: Positive = 0.07
    """Temperature of the contrastive loss. It is not learned."""

    @model_validator(mode="after")
    def _has_vectors(self) -> "Distill":
        if (self.teacher is None) == (self.to is None):
            raise ValueError("distill needs either a teacher, or the column `to`")
        return self

    def check(self, location: str, task: Task, recipe: Recipe) -> None:
        """Checks `towards`, that a teacher reads one column and has its own head, and that the model has the head."""
        known = recipe.modality_names
        if self.towards and self.towards not in known:
            raise UserError(f"{location}.towards: no modality {self.towards!r}{nearest(self.towards, known)}")
        if self.teacher and len(task.inputs[self.of].columns) > 1 and not modality_class(self.of).reads_text:
            raise UserError(f"{location}.teacher: {self.of} has several columns, of which each step draws one")
        if recipe.model.space == "disjoint" and self._target(task) == self.of:
            raise UserError(
                f"{location}: in a disjoint space, distill needs `towards`, another modality to compare {self.of} "
                "with; or set model.space: joint"
            )
        if self.teacher:
            self._check_other_teachers(location, task, recipe)

    def _check_other_teachers(self, location: str, task: Task, recipe: Recipe) -> None:
        """Refuses a second teacher for the same head: each teacher has a space of its own."""
        teachers = [other for other in task.objectives if isinstance(other, Distill) and other.teacher]
        same_modality = [other for other in teachers if other.of == self.of]
        if recipe.model.space == "disjoint":
            stem = modality_class(self._target(task)).stem
            same_head = [other for other in same_modality if modality_class(other._target(task)).stem == stem]
            advice = "give each another modality in `towards`"
        else:
            same_head = same_modality
            advice = "drop one of the two, or set model.space: disjoint and `towards`"
        if len(same_head) > 1:
            raise UserError(f"{location}: two objectives with a teacher train the same head of {self.of}; {advice}")

    def projected(self, task: Task) -> list[tuple[str, str]]:
        return [(self.of, self._target(task))]

    def _target(self, task: Task) -> str:
        """The modality that the distilled embeddings can be compared with, which determines the head.

        If the recipe names none, it is the task's only other input, or else the distilled modality itself, which only a
        joint space allows.
        """
        others = [name for name in task.inputs if name != self.of]
        return self.towards or (others[0] if len(others) == 1 else self.of)

    def taught_by(self) -> Teacher | None:
        return Teacher(self.of, self.teacher) if self.teacher else None

    def columns(self) -> set[str]:
        return {self.to} if self.to else set()

    def read(self, task: Task, row: Row, number: int, sizes: TargetSizes) -> Tensors:
        teacher = self.taught_by()
        column = teacher.column if teacher else str(self.to)
        vector_Z = unit_vector(row[column], sizes.embed_dim, column)
        item = item_id(vector_Z.tobytes(), number)
        return {"vector": torch.from_numpy(vector_Z), "item": torch.tensor(item)}

    def zeros(self, task: Task, examples: int, sizes: TargetSizes) -> Tensors:
        item = torch.zeros(examples, dtype=torch.int64)
        return {"vector": torch.zeros(examples, sizes.embed_dim), "item": item}

    def losses(self, model: Embedder, task: Task, encoded: EncodedAll, targets: Tensors) -> Tensors:
        """The loss of a modality's embeddings, by the name "modality:column" or "modality by teacher", or "modality to
        other by teacher" if the modality has a teacher for each of several others. All is fp32.

        For the contrastive loss, each rank compares its own N embeddings with the vectors of all ranks.
        """
        vector_BZ = targets["vector"]
        z_NZ = model.project(encoded[self.of].features, self.of, self._target(task))
        draws = len(z_NZ) // len(vector_BZ)  # embeddings of each example
        with full_precision(z_NZ.device):
            if self.loss == "cosine":
                loss = 1 - (z_NZ * vector_BZ.repeat_interleave(draws, dim=0)).sum(1).mean()
            else:
                (all_items,) = all_gather(targets["item"])
                (vector_MZ,) = all_gather(vector_BZ)
                local_items = targets["item"].repeat_interleave(draws)
                loss = mean_by_blocks(
                    softmax_nce, z_NZ / self.temperature, local_items[:, None], vector_MZ, all_items[:, None]
                )
        return {self._loss_name(task): loss}

    def _loss_name(self, task: Task) -> str:
        if self.to:
            return f"{self.of}:{self.to}"
        has_several = sum(teacher.modality == self.of for teacher in task.teachers) > 1
        return f"{self.of} to {self._target(task)} by teacher" if has_several else f"{self.of} by teacher"

    def loss_sizes(self, task: Task, examples: int) -> LossSizes:
        if self.loss == "cosine":
            return LossSizes(heads=1)
        return LossSizes(heads=1, vectors=examples, similarities=examples**2 * task.inputs[self.of].draw)


def unit_vector(value: Any, size: int, column: str) -> np.ndarray:
    """(Z,) fp32, the vector in a cell of a column, scaled to length 1; BadMedia if there is none of this size."""
    is_list = isinstance(value, list | np.ndarray)
    try:
        vector = number_array(value).astype(np.float64) if is_list else np.empty(0)
    except BadMedia as error:
        raise BadMedia(f"column {column!r}: {error}") from None
    if vector.shape != (size,):
        wrong = f"a list of shape {[*vector.shape]}" if is_list else f"{value!r:.60}"
        raise BadMedia(f"column {column!r}: expected a list of {size} numbers (the model's embed_dim), found {wrong}")
    length = np.linalg.norm(vector)
    if not 0 < length < np.inf:
        raise BadMedia(f"column {column!r}: a vector of length {length:g} has no direction")
    return (vector / length).astype(np.float32)
