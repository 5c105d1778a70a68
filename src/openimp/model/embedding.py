"""Stems: the layers of one modality (or of several that share them) around the encoder.

Shape suffixes: B examples, L tokens, P values per token, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openimp.common.modality import CONV_KERNEL, CONV_MARGIN, CONV_STRIDE, StemSpec, Tokens
from openimp.model.init import lecun_normal_, linear
from openimp.model.kernels import gelu

GELU_SCALE = 2**0.5
"""Factor of GELU's output. It about restores the variance of GELU's input."""


class Stem(nn.Module):
    """Embeds tokens before the encoder, and transforms the encoder's output (arXiv 2305.06324).

    `forward` is the part before the encoder. `IMP` applies `after` to the mean of the encoder's output.

    A stem has one linear patch embedding (a table for ids), one position table per axis, and one linear layer before
    and one after the encoder. The position embeddings are summed and, unless the spec says otherwise, normalized. They
    are looked up by coordinate, so all resolutions, and all subsets of an example's tokens, use the same tables.

    With `spec.conv_channels`, a `PatchConvolution` replaces the patch embedding.

    If tokens hold r times fewer values than the patch embedding expects, they are treated as if repeated r times; for
    example, a still in a stem for clips. Summing the kernel over its r parts gives the same result without a copy.

    An adaptive optimizer moves every weight by about the learning rate. So all embedding weights start with the same
    standard deviation, D^-0.5, and a fixed factor scales the output to unit variance (for tables as in arXiv
    1706.03762, section 3.4). Without the factor, the embedding of a patch with thousands of values would move far too
    fast, and rows of a table hardly at all.
    """

    def __init__(self, spec: StemSpec, width: int) -> None:
        super().__init__()
        self.scale = embedding_scale(spec, width)
        self.embed: nn.Module
        if spec.table:
            self.embed = nn.Embedding(spec.values, width)
            lecun_normal_(self.embed.weight, width)
        elif spec.conv_channels:
            self.embed = PatchConvolution(spec, width)
        else:
            self.embed = scaled_linear(spec.values, width)
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
        elif isinstance(self.embed, nn.Linear):
            x_BLD = _embed_patches(self.embed, tokens.values, self.scale)
        else:
            x_BLD = self.embed(tokens.values)
        coordinates = tokens.coords.unbind(-1)  # (B, L) per axis
        position_BLD = sum(table(coordinate_BL) for table, coordinate_BL in zip(self.positions, coordinates))
        return self.before(x_BLD + self.position_norm(position_BLD))


class PatchConvolution(nn.Module):
    """Embeds patches by a convolution, GELU and a linear layer (after arXiv 2106.14881).

    Each frame of each patch, with its margin, is convolved by itself. So tokens that are dropped cost nothing, but what
    two neighbors share is computed twice.
    """

    def __init__(self, spec: StemSpec, width: int) -> None:
        super().__init__()
        assert spec.patch is not None
        frames, height, width_of_patch, channels = spec.patch
        self.frame_shape = (height + 2 * CONV_MARGIN, width_of_patch + 2 * CONV_MARGIN, channels)
        self.convolution = scaled_linear(CONV_KERNEL**2 * channels, spec.conv_channels)
        self.scale = (spec.conv_channels / self.convolution.in_features) ** 0.5
        windows_per_frame = (height // CONV_STRIDE + 1) * (width_of_patch // CONV_STRIDE + 1)
        self.out = linear(frames * windows_per_frame * spec.conv_channels, width)

    def forward(self, values_BLP: Tensor) -> Tensor:
        """Embeds values (B, L, P) to (B, L, D)."""
        frames = values_BLP.unflatten(-1, (-1, *self.frame_shape))
        # Windows and a matrix product, because torch's convolutions of many tiny pictures are slow on CPUs.
        windows = frames.unfold(-3, CONV_KERNEL, CONV_STRIDE).unfold(-3, CONV_KERNEL, CONV_STRIDE)
        convolved = gelu(_embed_patches(self.convolution, windows.flatten(-3), self.scale))
        return _embed_patches(self.out, convolved.flatten(2), GELU_SCALE)


class VectorStem(nn.Module):
    """The stem of a modality with a tower in a model without an encoder: one linear layer.

    If the vectors fit into the width, it starts by keeping them and appending zeros, so that vectors of one tower can
    be compared at first as they are.
    """

    def __init__(self, spec: StemSpec, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(spec.values, width)
        if spec.values <= width:
            with torch.no_grad():
                self.embed.weight.zero_().fill_diagonal_(1)
        else:
            lecun_normal_(self.embed.weight, spec.values)
        nn.init.zeros_(self.embed.bias)
        self.after = nn.Identity()

    def forward(self, tokens: Tokens) -> Tensor:
        """Maps vectors (B, 1, P) to (B, 1, D)."""
        return self.embed(tokens.values.to(self.embed.weight.dtype))


def scaled_linear(values: int, width: int) -> nn.Linear:
    """A linear layer for `_embed_patches`. Times its `scale`, the output has unit variance; see `Stem`."""
    layer = nn.Linear(values, width)
    lecun_normal_(layer.weight, width)
    nn.init.zeros_(layer.bias)
    return layer


def embedding_scale(spec: StemSpec, width: int) -> float:
    """The factor of a stem's embeddings, with which their variance is 1 at first."""
    return float((width if spec.table else width / spec.values) ** 0.5)


def _embed_patches(embed: nn.Linear, values: Tensor, scale: float) -> Tensor:
    """Embeds values (..., P). Normalizes uint8 pixels, and sums the kernel if P is a fraction of its inputs."""
    if values.dtype == torch.uint8:
        # (x / 127.5 - 1) w = (x - 127.5) (w / 127.5), with one pass over the pixels instead of three. The difference is
        # exact in bf16 too.
        values = values - embed.weight.new_full((), 127.5)
        scale /= 127.5
    repeats = embed.in_features // values.shape[-1]
    weight = embed.weight
    if repeats > 1:
        weight = weight.unflatten(1, (repeats, -1)).sum(1)
    return F.linear(values.to(weight.dtype), weight * scale, embed.bias)
