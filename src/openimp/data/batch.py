"""The examples of one step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from openimp.common.modality import Tokens
from openimp.common.objective import Tensors


@dataclass
class Batch:
    """The examples of one step."""

    tokens: dict[str, Tokens]  # by modality; one with `draw: k` has k consecutive rows per example
    targets: list[Tensors]  # of each objective of the task, in order: (B, ...) by name
    rows: list[int] = field(default_factory=list)  # row numbers in the source, or positions in its stream

    @classmethod
    def cat(cls, parts: "Sequence[Batch]") -> "Batch":
        """Parts of a batch, one after the other."""
        if len(parts) == 1:
            return parts[0]
        tokens = {name: Tokens.cat([part.tokens[name] for part in parts]) for name in parts[0].tokens}
        targets = []
        for targets_of_objective in zip(*(part.targets for part in parts)):
            names = targets_of_objective[0]
            targets.append({name: torch.cat([target[name] for target in targets_of_objective]) for name in names})
        rows = [row for part in parts for row in part.rows]
        return cls(tokens, targets, rows)

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            {name: tokens.to(device) for name, tokens in self.tokens.items()},
            [{name: x.to(device, non_blocking=True) for name, x in target.items()} for target in self.targets],
            self.rows,
        )

    def pin_memory(self) -> "Batch":
        return Batch(
            {name: tokens.pin_memory() for name, tokens in self.tokens.items()},
            [{name: x.pin_memory() for name, x in target.items()} for target in self.targets],
            self.rows,
        )


def head_key(source: str, label: str) -> str:
    """The name of the classification head of a source's column. Module names must not contain a dot."""
    return f"{source}:{label}".replace(".", "/")
