"""Tokens to vectors: the few parameters that belong to one modality.

Shape suffixes: B examples, L tokens, P values a token, A axes, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openimp.modalities import StemSpec, Tokens


class Stem(nn.Module):
    """Embeds one modality's tokens and reads them out again (arXiv 2305.06324, section 3.1).

    It holds one linear patch embedding (a table for ids), one position table an axis, summed and normalised, and one
    linear before and one after the shared encoder. Positions are looked up by coordinate, so any resolution and any
    subset of an example's tokens uses the same tables.

    Tokens that hold r times fewer values than the embedding was made for count as repeated r times: a still in a stem
    for clips. That equals summing the kernel over its r parts, so nothing is copied.
    """

    def __init__(self, spec: StemSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        if spec.table:
            # The usual 0.02 would drown a token in its position, which is normalised to one.
            self.embed: nn.Module = nn.Embedding(spec.values, width)
            nn.init.normal_(self.embed.weight, std=1.0)
        else:
            self.embed = nn.Linear(spec.values, width)
            nn.init.trunc_normal_(self.embed.weight, std=spec.values**-0.5)
            nn.init.zeros_(self.embed.bias)
        self.positions = nn.ModuleList(nn.Embedding(rows, width) for rows in spec.axes)
        for table in self.positions:
            nn.init.normal_(table.weight, std=0.02)
        self.position_norm = nn.LayerNorm(width, eps=1e-6)
        self.before = _linear(width)
        self.after = _linear(width)

    def forward(self, tokens: Tokens) -> Tensor:
        """(B, L, P) values, or (B, L) ids, to (B, L, D)."""
        x_BLD = self.embed(tokens.values) if self.spec.table else self._patches(tokens.values)
        where = sum(table(index) for table, index in zip(self.positions, tokens.coords.unbind(-1)))
        return self.before(x_BLD + self.position_norm(where))

    def _patches(self, values_BLP: Tensor) -> Tensor:
        if values_BLP.dtype == torch.uint8:
            values_BLP = values_BLP.float() / 127.5 - 1
        repeats, rest = divmod(self.spec.values, values_BLP.shape[-1])
        if rest:
            raise ValueError(f"tokens of {values_BLP.shape[-1]} values do not divide the stem's {self.spec.values}")
        weight = self.embed.weight
        if repeats > 1:
            weight = weight.unflatten(1, (repeats, -1)).sum(1)
        return F.linear(values_BLP, weight, self.embed.bias)


def _linear(width: int) -> nn.Linear:
    layer = nn.Linear(width, width)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
