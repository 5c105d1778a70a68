"""Stems: the layers of one modality (or of several that share them) around the encoder.

Shape suffixes: B examples, L tokens, P values per token, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openimp.common.modality import StemSpec, Tokens
from openimp.model.init import identity_, lecun_normal_, linear


class Stem(nn.Module):
    """Embeds tokens before the encoder, and transforms the encoder's output (arXiv 2305.06324).

    `forward` is the part before the encoder. `IMP` applies `after` to the mean of the encoder's output.

    A stem has one linear patch embedding (a table for ids), one position table per axis, and one linear layer before
    and one after the encoder. The position embeddings are summed and, unless the spec says otherwise, normalized. They
    are looked up by coordinate, so all resolutions, and all subsets of an example's tokens, use the same tables.

    If tokens hold r times fewer values than the patch embedding expects, they are treated as if repeated r times; for
    example, a still in a stem for clips. Summing the kernel over its r parts gives the same result without a copy.

    An adaptive optimizer moves every weight by about the learning rate. So all embedding weights start with the same
    standard deviation, D^-0.5, and a fixed factor scales the output to unit variance (for tables as in arXiv
    1706.03762, section 3.4). Without the factor, the embedding of a patch with thousands of values would move far too
    fast, and rows of a table hardly at all.
    """

    def __init__(self, spec: StemSpec, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(spec.values, width) if spec.table else nn.Linear(spec.values, width)
        self.scale = embedding_scale(spec, width)
        lecun_normal_(self.embed.weight, width)
        if isinstance(self.embed, nn.Linear):
            nn.init.zeros_(self.embed.bias)
        tables = [nn.Embedding(rows, width) for rows in spec.axes]
        for table in tables:
            nn.init.normal_(table.weight, std=width**-0.5)
        self.positions = nn.ModuleList(tables)
        self.position_norm = nn.LayerNorm(width, eps=1e-6) if spec.position_norm else nn.Identity()
        self.before = linear(width, width)
        self.after = linear(width, width)

    def forward(self, tokens: Tokens) -> Tensor:
        """Embeds values (B, L, P) or ids (B, L) to (B, L, D)."""
        if isinstance(self.embed, nn.Embedding):
            x_BLD = self.embed(tokens.values) * self.scale
        else:
            x_BLD = _embed_patches(self.embed, tokens.values, self.scale)
        positions = sum(table(index) for table, index in zip(self.positions, tokens.coords.unbind(-1)))
        return self.before(x_BLD + self.position_norm(positions))


class VectorStem(nn.Module):
    """The stem of a modality with a tower in a model without an encoder: one linear layer.

    If the vectors fit into the width, it starts by keeping them and appending zeros, so that vectors of one tower can
    be compared at first as they are.
    """

    def __init__(self, spec: StemSpec, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(spec.values, width)
        if spec.values <= width:
            identity_(self.embed.weight)
        else:
            lecun_normal_(self.embed.weight, spec.values)
        nn.init.zeros_(self.embed.bias)
        self.after = nn.Identity()

    def forward(self, tokens: Tokens) -> Tensor:
        """Maps vectors (B, 1, P) to (B, 1, D)."""
        return self.embed(tokens.values.to(self.embed.weight.dtype))


def embedding_scale(spec: StemSpec, width: int) -> float:
    """The factor of a stem's embeddings, with which their variance is 1 at first."""
    return float((width if spec.table else width / spec.values) ** 0.5)


def _embed_patches(embed: nn.Linear, values_BLP: Tensor, scale: float) -> Tensor:
    """Embeds patches (B, L, P). Normalizes uint8 pixels, and sums the kernel if P is a fraction of its inputs."""
    if values_BLP.dtype == torch.uint8:
        # (x / 127.5 - 1) w = (x - 127.5) (w / 127.5), with one pass over the pixels instead of three. The difference is
        # exact in bf16 too.
        values_BLP = values_BLP - embed.weight.new_full((), 127.5)
        scale /= 127.5
    repeats, remainder = divmod(embed.in_features, values_BLP.shape[-1])
    if remainder:
        raise ValueError(f"tokens of {values_BLP.shape[-1]} values do not divide the stem's {embed.in_features}")
    weight = embed.weight
    if repeats > 1:
        weight = weight.unflatten(1, (repeats, -1)).sum(1)
    return F.linear(values_BLP.to(weight.dtype), weight * scale, embed.bias)
