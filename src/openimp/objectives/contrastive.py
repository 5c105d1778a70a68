"""`contrastive`: the embeddings of two modalities of an item find each other among those of a batch.

Shape suffixes: B examples of this rank, N and M embeddings of the two modalities of a pair, I and J ids of an
embedding, Z features of the shared embedding space.
"""

from collections.abc import Mapping
from functools import partial
from itertools import combinations
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from openimp.common.device import full_precision
from openimp.common.errors import UserError
from openimp.common.modality import Tokens
from openimp.common.objective import LossSizes, Objective, Row, TargetSizes, Tensors
from openimp.data.tables import item_id, value_id
from openimp.model.embedder import Embedder, EncodedAll
from openimp.objectives.nce import both_ways, mean_by_blocks, sigmoid_nce, softmax_nce
from openimp.parallel.distributed import all_gather, world_size
from openimp.recipe.registry import modality_class
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Task

MAX_VALUES = 32
"""Of a list, `positives_in` compares at most this many values with texts."""
NOBODY_OF_FIRST = -1
"""The id of the first modality's embeddings that are 0. Other ids are numbers of rows, or hashes of 64 bits."""
NOBODY_OF_SECOND = -2
"""The same for the second modality. The ids differ, so that two embeddings that are 0 are not positives."""
DUPLICATE_TEXT_WARNING = 0.1
"""Share of duplicate texts in a batch above which `positives_by` is suggested."""


PairOfModalities = Annotated[list[str], Field(min_length=2, max_length=2)]


class Contrastive(Objective):
    """Symmetric contrastive loss between pairs of the task's modalities.

    A pair has the same heads and the same temperature in all tasks. Within a task, only one objective may compare it.
    """

    removed = {"same": (None,)}

    type: Literal["contrastive"]
    """The kind of objective."""
    pairs: Annotated[list[PairOfModalities], Field(min_length=1)] | None = None
    """Pairs of modalities. Default: all pairs of the task's modalities."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: InfoNCE, averaged over the positives of an item (SupCon, arXiv 2004.11362).
    sigmoid: SigLIP's loss (arXiv 2303.15343)."""
    positives_by: str | None = None
    """Rows with equal values in this column are the same item, so they are positives of each other. Case and white
    space do not count. A row without a value is an item by itself. Default: each row is an item."""

    positives_in: str | None = None
    """A text that equals a value of this column, such as one of a list of keywords, is a positive of each picture, clip
    or sound whose row has this value. Case and white space do not count. Let templates draw single values:
    `text: {column: [caption, keywords]}`. Of a list, the first 32 values count."""

    def check(self, location: str, task: Task, recipe: Recipe) -> None:
        pairs = self.compared_pairs(task)
        if not pairs:
            raise UserError(f"{location}: a contrastive objective needs two inputs")
        if any(a == b for a, b in pairs):
            raise UserError(f"{location}.pairs: a pair needs two different modalities")
        if len({frozenset(pair) for pair in pairs}) < len(pairs):
            raise UserError(f"{location}.pairs: a pair is listed twice")
        if self.positives_in and not any(_is_text(a) != _is_text(b) for a, b in pairs):
            raise UserError(f"{location}.positives_in: no pair compares texts with something else")

    def compared_pairs(self, task: Task) -> list[tuple[str, str]]:
        return [*combinations(task.inputs, 2)] if self.pairs is None else [(a, b) for a, b in self.pairs]

    def columns(self) -> set[str]:
        return {column for column in (self.positives_by, self.positives_in) if column}

    def read(self, task: Task, row: Row, number: int, sizes: TargetSizes) -> Tensors:
        item = item_id(row[self.positives_by], number) if self.positives_by else number
        targets = {"item": torch.tensor(item)}
        if self.positives_in:
            cell = row[self.positives_in]
            values = cell if isinstance(cell, list) else [cell]
            ids = [value_id(value) for value in values[:MAX_VALUES] if value is not None]
            # Padded with an id that the example has anyway.
            targets["values"] = torch.tensor(ids + [item] * (MAX_VALUES - len(ids)))
        return targets

    def read_texts(self, texts: Mapping[str, list[str]]) -> Tensors:
        if not self.positives_in:
            return {}
        return {_text_key(name): torch.tensor([value_id(text) for text in drawn]) for name, drawn in texts.items()}

    def zeros(self, task: Task, examples: int, sizes: TargetSizes) -> Tensors:
        targets = {"item": torch.zeros(examples, dtype=torch.int64)}
        if self.positives_in:
            targets["values"] = torch.zeros(examples, MAX_VALUES, dtype=torch.int64)
            for name in filter(_is_text, task.inputs):
                targets[_text_key(name)] = torch.zeros(examples, task.inputs[name].draw, dtype=torch.int64)
        return targets

    def losses(self, model: Embedder, task: Task, encoded: EncodedAll, targets: Tensors) -> Tensors:
        """The loss of each pair of modalities, by the name "a-b". Embeddings, similarities and softmax are fp32.

        Each rank compares its own N and M embeddings with those of all ranks, in blocks of rows, so no rank holds all
        similarities. The mean over the ranks is the loss of the global batch.
        """
        all_targets = {name: all_gather(target)[0] for name, target in targets.items()}
        # On the meta device, FLOPs are counted as on one process, so that they do not depend on the number of ranks.
        has_all_embeddings = world_size() == 1 or targets["item"].is_meta
        losses = {}
        for a, b in self.compared_pairs(task):
            # A joint head is applied again for each pair. That is cheap compared with the encoder, which runs once.
            z_NZ = model.project(encoded[a].features, a, b)
            z_MZ = model.project(encoded[b].features, b, a)
            ids_NI = self._ids(a, b, z_NZ, targets, NOBODY_OF_FIRST)
            ids_MJ = self._ids(b, a, z_MZ, targets, NOBODY_OF_SECOND)
            temperature, bias = model.temperature(a, b)()
            with full_precision(z_NZ.device):
                scaled_NZ = 1 / temperature * z_NZ
                if self.loss == "softmax" and has_all_embeddings:
                    loss = both_ways(softmax_nce, scaled_NZ, ids_NI, z_MZ, ids_MJ)
                elif self.loss == "softmax":
                    all_b, all_a = all_gather(z_MZ, z_NZ)
                    all_ids_a = self._ids(a, b, all_a, all_targets, NOBODY_OF_FIRST)
                    all_ids_b = self._ids(b, a, all_b, all_targets, NOBODY_OF_SECOND)
                    loss_a = mean_by_blocks(softmax_nce, scaled_NZ, ids_NI, all_b, all_ids_b)
                    loss_b = mean_by_blocks(softmax_nce, 1 / temperature * z_MZ, ids_MJ, all_a, all_ids_a)
                    loss = (loss_a + loss_b) / 2
                else:
                    (all_b,) = all_gather(z_MZ)
                    all_ids_b = self._ids(b, a, all_b, all_targets, NOBODY_OF_SECOND)
                    loss = mean_by_blocks(partial(sigmoid_nce, bias=bias), scaled_NZ, ids_NI, all_b, all_ids_b)
                losses[f"{a}-{b}"] = loss
        return losses

    def _ids(self, modality: str, other: str, z_NZ: Tensor, targets: Tensors, nobody: int) -> Tensor:
        """The ids (N, I) of the embeddings of a modality, for the comparison with another one.

        Embeddings that share an id are positives. The first id is that of the item. With `positives_in`, a text also
        has the id of its whole string, and media those of their row's values. A shared value does not make two media
        positives.

        An embedding that is 0, as of a text without a known word, has only the id `nobody`. If it were a positive of
        its picture, the loss would only push the picture away from all other texts.
        """
        draws = len(z_NZ) // len(targets["item"])
        ids = [targets["item"].repeat_interleave(draws)[:, None]]
        if self.positives_in and _is_text(modality) != _is_text(other):
            if _is_text(modality):
                ids.append(targets[_text_key(modality)].reshape(-1, 1))
            else:
                ids.append(targets["values"].repeat_interleave(draws, dim=0))
        return torch.where((z_NZ != 0).any(1, keepdim=True), torch.cat(ids, dim=1), nobody)

    def loss_sizes(self, task: Task, examples: int) -> LossSizes:
        """The sigmoid loss uses each pair of items once, and gathers the vectors of one modality."""
        pairs = self.compared_pairs(task)
        heads = 2 * len(pairs)  # one per modality of a pair
        sizes = [(examples * task.inputs[a].draw, examples * task.inputs[b].draw) for a, b in pairs]
        # A vector counts twice, with its gradient. Softmax needs the similarities once per direction.
        if self.loss == "softmax":
            vectors = sum(2 * (n + m) for n, m in sizes)
            similarities = sum(2 * n * m for n, m in sizes)
        else:
            vectors = sum(2 * m for _, m in sizes)
            similarities = sum(n * m for n, m in sizes)
        return LossSizes(heads, vectors, similarities)

    def warning(self, task: Task, tokens: Mapping[str, Tokens], targets: Tensors) -> str | None:
        """Suggests `positives_by` if the loss separates many texts of the global batch that are equal.

        With `positives_by` or `positives_in`, the recipe says itself which texts are the same.
        """
        if self.positives_by or self.positives_in:
            return None
        shares = [0.0]
        (row_B,) = all_gather(targets["item"])
        for name in dict.fromkeys(self.modalities(task)):
            if tokens[name].mask is not None:  # A text, and not the vector of a tower.
                (ids_NL,) = all_gather(tokens[name].values)
                _, text_N = ids_NL.unique(dim=0, return_inverse=True)  # equal texts have equal numbers
                row_N = row_B.repeat_interleave(len(text_N) // len(row_B))
                # For each text, the number of different rows that have it.
                rows_with_text = torch.stack([text_N, row_N]).unique(dim=1)[0].bincount()
                shares.append(float((rows_with_text[text_N] > 1).float().mean()))
        duplicate_share = max(shares)
        if duplicate_share <= DUPLICATE_TEXT_WARNING:
            return None
        return (
            f"{duplicate_share:.0%} of a batch's texts belong to other examples too, and the loss pushes these apart; "
            "with `positives_by: COLUMN`, a contrastive objective treats rows with equal values as one item"
        )


def _is_text(modality: str) -> bool:
    return modality_class(modality).reads_text


def _text_key(modality: str) -> str:
    """The name of the target with the ids of the texts that were drawn for a modality."""
    return f"text:{modality}"
