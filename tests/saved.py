"""Compares tensors and checkpoints in tests."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from openimp.checkpoint.folder import checkpoints


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Both have the same names, and bit for bit the same tensors."""
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]


def hashes(run: Path) -> dict[str, object]:
    """The hashes of all files of the newest checkpoint: equal for equal weights, optimizer state, totals and so on."""
    return json.loads((checkpoints(run)[-1] / "manifest.json").read_text())
