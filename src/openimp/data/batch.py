"""The examples of one step, as the loader makes them and the objectives take them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from openimp.common.modality import Tokens


@dataclass
class Batch:
    """One step's examples.

    Attributes:
        tokens: by modality; a modality drawn k times an example has k rows an example, one after the other.
        item_ids: (B,) int64, equal for examples that are one item; by column, "" being the row of the source itself.
        labels: by column, (B,) int64, or (B, K) float for any number of classes an example.
        rows: the source's rows, to name them in messages.
    """

    tokens: dict[str, Tokens]
    item_ids: dict[str, Tensor]
    labels: dict[str, Tensor] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            {name: tokens.to(device) for name, tokens in self.tokens.items()},
            {name: item.to(device, non_blocking=True) for name, item in self.item_ids.items()},
            {name: label.to(device, non_blocking=True) for name, label in self.labels.items()},
            self.rows,
        )

    def pin_memory(self) -> "Batch":
        return Batch(
            {name: tokens.pin_memory() for name, tokens in self.tokens.items()},
            {name: item.pin_memory() for name, item in self.item_ids.items()},
            {name: label.pin_memory() for name, label in self.labels.items()},
            self.rows,
        )


def head_key(source: str, label: str) -> str:
    """The name of the classification head of a source's column; module names may not hold a dot."""
    return f"{source}:{label}".replace(".", "/")
