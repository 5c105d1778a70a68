"""Tokens to vectors: the few parameters that belong to one modality.

Shape suffixes: B examples, L tokens, P values a token, A axes, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openimp.common.modality import StemSpec, Tokens
from openimp.model.init import lecun_normal_, linear


class Stem(nn.Module):
    """Embeds one modality's tokens and reads them out again (arXiv 2305.06324).

    It holds one linear patch embedding (a table for ids), one position table an axis, summed and normalised, and one
    linear before and one after the shared encoder. Positions are looked up by coordinate, so any resolution and any
    subset of an example's tokens uses the same tables.

    Tokens that hold r times fewer values than the embedding was made for count as repeated r times: a still in a stem
    for clips. That equals summing the kernel over its r parts, so nothing is copied.

    Embedding weights start at std D^-0.5, and their output is scaled to unit variance (for tables as in arXiv
    1706.03762, section 3.4). An adaptive optimiser moves every weight by about the learning rate; unscaled, a patch of
    thousands of values would then move far too fast, and a table's rows hardly at all.
    """

    def __init__(self, spec: StemSpec, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(spec.values, width) if spec.table else nn.Linear(spec.values, width)
        self.scale = (width if spec.table else width / spec.values) ** 0.5
        lecun_normal_(self.embed.weight, width)
        if isinstance(self.embed, nn.Linear):
            nn.init.zeros_(self.embed.bias)
        tables = [nn.Embedding(rows, width) for rows in spec.axes]
        for table in tables:
            nn.init.normal_(table.weight, std=width**-0.5)
        self.positions = nn.ModuleList(tables)
        self.position_norm = nn.LayerNorm(width, eps=1e-6)
        self.before = linear(width, width)
        self.after = linear(width, width)

    def forward(self, tokens: Tokens) -> Tensor:
        """(B, L, P) values, or (B, L) ids, to (B, L, D)."""
        if isinstance(self.embed, nn.Embedding):
            x_BLD = self.embed(tokens.values) * self.scale
        else:
            x_BLD = _embed_patches(self.embed, tokens.values, self.scale)
        where = sum(table(index) for table, index in zip(self.positions, tokens.coords.unbind(-1)))
        return self.before(x_BLD + self.position_norm(where))


def _embed_patches(embed: nn.Linear, values_BLP: Tensor, scale: float) -> Tensor:
    if values_BLP.dtype == torch.uint8:
        values_BLP = values_BLP.float() / 127.5 - 1
    repeats, rest = divmod(embed.in_features, values_BLP.shape[-1])
    if rest:
        raise ValueError(f"tokens of {values_BLP.shape[-1]} values do not divide the stem's {embed.in_features}")
    weight = embed.weight
    if repeats > 1:
        weight = weight.unflatten(1, (repeats, -1)).sum(1)
    return F.linear(values_BLP, weight * scale, embed.bias)
