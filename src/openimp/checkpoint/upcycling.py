"""Sources of initial weights, and upcycling: a dense encoder's weights as those of a sparse one (arXiv 2212.05055)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from openimp.checkpoint import dcp
from openimp.checkpoint.folder import weights_folder
from openimp.parallel.layout import fill_shard

MLP = re.compile(r"(encoder\..+\.mlp)\.(up|down)\.(weight|bias)")
"""Names of the parameters of an MLP."""
EXPERTS = {"up.weight": "up_EDF", "down.weight": "down_EFD", "up.bias": "up_bias_EF", "down.bias": "down_bias_ED"}
"""The same parameters in `Experts`. Its weights are transposed."""


class Weights(Protocol):
    """Weights that a model can start from, by the names that they have in it."""

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]:
        """The shape of each tensor."""
        ...

    def leaves_new(self, name: str) -> bool:
        """Whether a tensor of a part that is loaded may be missing. It then keeps its initial values."""
        ...

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills tensors in place; of a DTensor, this rank's shard. Every rank must call this."""
        ...


class SavedWeights:
    """The EMA in a checkpoint if it has one, else the weights. Each rank reads only its shards."""

    def __init__(self, folder: Path, name: str) -> None:
        """`name` is for messages."""
        self.folder, self.name = folder, name
        self.shapes = {name: about.size for name, about in dcp.metadata(weights_folder(folder)).items()}

    def __str__(self) -> str:
        return self.name

    def leaves_new(self, name: str) -> bool:
        return False

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        dcp.fill(weights_folder(self.folder), tensors)


@dataclass(frozen=True)
class Upcycled:
    """Each expert is a copy of the MLP that it replaces. The routers are new."""

    dense: Weights
    experts: int

    def __str__(self) -> str:
        return f"{self.dense}, whose MLPs are copied into {self.experts} experts each"

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]:
        shapes = self.dense.shapes
        return {**shapes, **{name: (self.experts, *shapes[mlp][::-1]) for name, mlp in self._copies().items()}}

    def leaves_new(self, name: str) -> bool:
        router = re.search(r"\.mlp\.(router\.weight_ED|slot_SD|scale)$", name)
        return router is not None or self.dense.leaves_new(name)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Needs memory for the dense MLPs of the sparse layers, and for the experts of one layer, besides `tensors`."""
        copies = {name: mlp for name, mlp in self._copies().items() if name in tensors}
        mlps = {mlp: torch.empty(tuple(self.dense.shapes[mlp])) for mlp in copies.values()}
        self.dense.fill({name: tensor for name, tensor in tensors.items() if name not in copies} | mlps)
        for name, mlp in copies.items():
            full = mlps.pop(mlp)
            full = full.T if full.ndim == 2 else full
            fill_shard(tensors[name], full.expand(self.experts, *full.shape))

    def _copies(self) -> dict[str, str]:
        """The names of experts' parameters, and of those of the MLPs that they are copies of."""
        found = [match for match in map(MLP.fullmatch, self.dense.shapes) if match]
        return {f"{match[1]}.experts.{EXPERTS[f'{match[2]}.{match[3]}']}": match[0] for match in found}
