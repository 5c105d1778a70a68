"""The weights of a public vision Transformer (ViT) as weights of IMP, which then compute the same features.

The names and the layout of the ViT are those of timm's `VisionTransformer`. IMP has no place for the biases of the
norms in its blocks, for LayerScale, and for the normalization of pixels. Linear layers take them in:

    W (gamma n + beta) + b = (W gamma) n + (b + W beta), for a norm before the layer
    s (W x + b) = (s W) x + s b, for LayerScale after the layer
    W (x - mean) / std + b, for pixels x in 0..1, which are in -1..1 here

All of this is computed in fp64.

Shape suffixes: D width, C channels, H and W height and width of a patch, P values of a patch, N places of the grid.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from openimp.common.modality import StemSpec
from openimp.model.embedding import embedding_scale

ViT = Mapping[str, Tensor]
"""The state of timm's `VisionTransformer`."""
NamedTensors = Iterator[tuple[str, Tensor]]
"""Tensors of IMP by name, in fp32."""
RGB = 3


def encoder_weights(vit: ViT, layers: int) -> NamedTensors:
    """The dense encoder: its blocks and the final norm, which has a bias in IMP as well."""
    for i in range(layers):
        theirs = f"blocks.{i}"
        ours = f"encoder.blocks.{i}"
        yield f"{ours}.norm1.weight", vit[f"{theirs}.norm1.weight"].float()
        yield from _linear(f"{ours}.attention.qkv", vit, f"{theirs}.attn.qkv", norm=f"{theirs}.norm1")
        yield from _linear(f"{ours}.attention.out", vit, f"{theirs}.attn.proj", scale=f"{theirs}.ls1")
        yield f"{ours}.norm2.weight", vit[f"{theirs}.norm2.weight"].float()
        yield from _linear(f"{ours}.mlp.up", vit, f"{theirs}.mlp.fc1", norm=f"{theirs}.norm2")
        yield from _linear(f"{ours}.mlp.down", vit, f"{theirs}.mlp.fc2", scale=f"{theirs}.ls2")
    yield "encoder.norm.weight", vit["norm.weight"].float()
    yield "encoder.norm.bias", _bias(vit, "norm", vit["norm.weight"]).float()


def stem_weights(name: str, spec: StemSpec, vit: ViT, mean: Sequence[float], std: Sequence[float]) -> NamedTensors:
    """A stem whose patches have the height and width of the ViT's.

    The kernel is divided among the frames of a patch, so a clip of equal frames has the features of the picture. Its
    channels are summed for a stem with one channel (AST, arXiv 2104.01778). Only pictures have the ViT's positions.
    Positions over time are zero.
    """
    assert spec.patch is not None
    frames, *_, channels = spec.patch
    kernel_DCHW = vit["patch_embed.proj.weight"].double()
    width = len(kernel_DCHW)
    mean_C11, std_C11 = (kernel_DCHW.new_tensor(values)[:, None, None] for values in (mean, std))
    bias_D = _bias(vit, "patch_embed.proj", kernel_DCHW)
    bias_D = bias_D + (kernel_DCHW * (0.5 - mean_C11) / std_C11).sum((1, 2, 3))
    kernel_DHWC = (kernel_DCHW * 0.5 / std_C11).movedim(1, -1)
    if channels == 1:
        kernel_DHWC = kernel_DHWC.sum(-1, keepdim=True)
    kernel_DP = kernel_DHWC.flatten(1).repeat(1, frames) / (frames * embedding_scale(spec, width))
    yield f"stems.{name}.embed.weight", kernel_DP.float()
    yield f"stems.{name}.embed.bias", bias_D.float()
    for layer in ("before", "after"):
        yield f"stems.{name}.{layer}.weight", torch.eye(width, device=bias_D.device)
        yield f"stems.{name}.{layer}.bias", torch.zeros(width, device=bias_D.device)
    if channels == RGB:
        yield f"stems.{name}.positions.0.weight", torch.zeros(spec.axes[0], width, device=bias_D.device)
        yield f"stems.{name}.positions.1.weight", vit["pos_embed"][0].float()


def _linear(ours: str, vit: ViT, theirs: str, norm: str = "", scale: str = "") -> NamedTensors:
    """A linear layer that takes in the bias of the norm before it, or the LayerScale after it."""
    weight = vit[f"{theirs}.weight"].double()
    bias = _bias(vit, theirs, weight)
    if norm:
        bias = bias + weight @ _bias(vit, norm, weight.T)
    if f"{scale}.gamma" in vit:
        gamma_D = vit[f"{scale}.gamma"].double()
        weight = gamma_D[:, None] * weight
        bias = gamma_D * bias
    yield f"{ours}.weight", weight.float()
    yield f"{ours}.bias", bias.float()


def _bias(vit: ViT, name: str, weight: Tensor) -> Tensor:
    """The bias of a layer in fp64; zeros, one for each row of `weight`, if it has none."""
    if f"{name}.bias" in vit:
        return vit[f"{name}.bias"].double()
    return weight.new_zeros(len(weight)).double()
