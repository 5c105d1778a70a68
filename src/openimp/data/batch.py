"""The examples of one step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from openimp.common.modality import Tokens
from openimp.common.objective import Tensors


class Batch(NamedTuple):
    """The examples of one step."""

    tokens: dict[str, Tokens]  # by modality; one with `draw: k` has k consecutive rows per example
    targets: list[Tensors]  # of each objective of the task, in order: (B, ...) by name

    @classmethod
    def cat(cls, parts: "Sequence[Batch]") -> "Batch":
        """Parts of a batch, one after the other. All parts have a mask of a modality, or none has."""
        if len(parts) == 1:
            return parts[0]
        return tree_map(lambda *tensors: None if tensors[0] is None else torch.cat(tensors), *parts)

    def to(self, device: torch.device | str) -> "Batch":
        return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), self)

    def pin_memory(self) -> "Batch":
        return tree_map_only(Tensor, Tensor.pin_memory, self)

    def share_memory(self) -> "Batch":
        """Moves the tensors to memory that other processes can read. RuntimeError if there is not enough of it."""
        return tree_map_only(Tensor, Tensor.share_memory_, self)
