"""The examples of one step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openimp.common.modality import Tokens


@dataclass
class Batch:
    """The examples of one step. B examples, K classes, Z features of an embedding."""

    tokens: dict[str, Tokens]  # by modality; one with `draw: k` has k consecutive rows per example
    item_ids: dict[str, Tensor]  # (B,) int64 by column, equal for examples of the same item; "" holds the row numbers
    # By column: (B,) int64 classes, (B, K) float for loss sigmoid, or (B, Z) fp32 unit vectors to distill.
    labels: dict[str, Tensor] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)  # row numbers in the source, or positions in its stream

    @classmethod
    def cat(cls, parts: "Sequence[Batch]") -> "Batch":
        """Parts of a batch, one after the other."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        return cls(
            {name: Tokens.cat([part.tokens[name] for part in parts]) for name in first.tokens},
            {name: torch.cat([part.item_ids[name] for part in parts]) for name in first.item_ids},
            {name: torch.cat([part.labels[name] for part in parts]) for name in first.labels},
            [row for part in parts for row in part.rows],
        )

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            {name: tokens.to(device) for name, tokens in self.tokens.items()},
            {name: ids.to(device, non_blocking=True) for name, ids in self.item_ids.items()},
            {name: label.to(device, non_blocking=True) for name, label in self.labels.items()},
            self.rows,
        )

    def pin_memory(self) -> "Batch":
        return Batch(
            {name: tokens.pin_memory() for name, tokens in self.tokens.items()},
            {name: ids.pin_memory() for name, ids in self.item_ids.items()},
            {name: label.pin_memory() for name, label in self.labels.items()},
            self.rows,
        )


def head_key(source: str, label: str) -> str:
    """The name of the classification head of a source's column. Module names must not contain a dot."""
    return f"{source}:{label}".replace(".", "/")
