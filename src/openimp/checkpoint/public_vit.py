"""Vision Transformers of timm, from which IMP's encoder can start: `train.init: timm:NAME`.

Only a ViT that IMP's encoder computes exactly is accepted. Otherwise the error lists what IMP's encoder lacks.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from openimp.checkpoint.fold import RGB, encoder_weights, stem_weights
from openimp.common.errors import UserError, library_errors
from openimp.common.modality import Modalities
from openimp.common.names import LOCAL, Name
from openimp.common.progress import quiet_libraries
from openimp.common.safe_files import local_folder, require_safetensors
from openimp.common.versions import require_library
from openimp.parallel.distributed import run_first_on_node

PREFERRED = ("model.safetensors",)
"""The file that timm prefers if a folder has several files of weights."""
EPS = 1e-6
"""Epsilon of the norms of IMP's encoder."""
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The linear layers of a block."""
CONVERTED = {
    "pos_embed",
    "patch_embed.proj.weight",
    "norm.weight",
    *(f"blocks.*.{layer}.weight" for layer in ("norm1", "norm2", *LAYERS)),
}
"""Parameters that become weights of IMP's encoder, which needs all of them; * is the number of a block."""
FOLDED = {
    "patch_embed.proj.bias",
    "norm.bias",
    "blocks.*.ls1.gamma",
    "blocks.*.ls2.gamma",
    *(f"blocks.*.{layer}.bias" for layer in ("norm1", "norm2", *LAYERS)),
}
"""Parameters that a ViT may lack, and that become part of the others."""
POOLING = ("attn_pool.", "fc_norm.", "head.")
"""Beginnings of the names of parameters behind the encoder."""


class ViTWeights:
    """The weights of a public ViT, for the encoder, and for stems whose patches are as high and wide as the ViT's."""

    def __init__(self, name: str, modalities: Modalities) -> None:
        self.name = name
        self.vit = open_vit(name, weights=False)
        specs = {modality.stem: modality.stem_spec() for modality in modalities.values()}
        sides = tuple(self.vit.patch_embed.patch_size)
        # A stem with other patches, or with a convolution, is not loaded. For the stem of pictures, `stem_options`
        # makes that an error.
        self.stems = {
            stem: spec
            for stem, spec in specs.items()
            if spec.patch and spec.patch[1:3] == sides and not spec.conv_channels
        }
        self.shapes = {name: tensor.shape for name, tensor in self._tensors(self.vit)}

    def __str__(self) -> str:
        embed = self.vit.patch_embed
        height, width = (patches * side for patches, side in zip(embed.grid_size, embed.patch_size))
        return f"{self.name} (pictures of {height} x {width} pixels have its features)"

    def model_options(self) -> dict[str, Any]:
        """The values that a recipe's `model` must have."""
        block = self.vit.blocks[0]
        return {
            "width": self.vit.embed_dim,
            "layers": len(self.vit.blocks),
            "heads": block.attn.num_heads,
            "mlp_dim": block.mlp.fc1.out_features,
            "bias": True,
            "gelu": _gelu(block.mlp.act),
            "qk_norm": False,
            "modality_specific_layers": 0,
        }

    def stem_options(self, config: Any) -> dict[str, Any]:
        """The values that the options of the stem of pictures must have. The number of frames stays as in `config`."""
        embed = self.vit.patch_embed
        return {
            "patch": [config.patch[0], *embed.patch_size],
            "positions": "grid",
            "tables": [config.tables[0], *embed.grid_size],
            "conv_channels": 0,
        }

    def may_lack(self, name: str) -> bool:
        """Whether the tensor `name` of the new model keeps its initial values if these weights lack it."""
        return name.startswith(tuple(f"stems.{stem}.position" for stem in self.stems))

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills tensors in place. Every rank must call this."""
        vit = run_first_on_node(lambda: open_vit(self.name, weights=True))
        for name, tensor in self._tensors(vit):
            if name in tensors:
                tensors[name].copy_(tensor)

    def _tensors(self, vit: Any) -> Iterator[tuple[str, Tensor]]:
        """IMP's tensors by name, one at a time. The pixels of `vit` are normalized from 0..1."""
        state = vit.state_dict()
        yield from encoder_weights(state, len(vit.blocks))
        for name, spec in self.stems.items():
            yield from stem_weights(name, spec, state, vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"])


def open_vit(name: str, weights: bool) -> Any:
    """timm's `VisionTransformer` of the name `timm:NAME` or `timm:FOLDER`.

    Without `weights`, it is on the meta device, and nothing but its configuration is downloaded.
    """
    with opening_timm(name) as identifier:
        import timm

        with torch.device("cpu" if weights else "meta"):
            vit = timm.create_model(identifier, pretrained=weights)
    if reasons := obstacles(vit):
        raise UserError(f"{name}: cannot become IMP's encoder without approximation: {'; '.join(reasons)}")
    return vit


@contextmanager
def opening_timm(name: str) -> Iterator[str]:
    """The block opens a model of timm by its name in timm. What the library raises becomes a UserError.

    The random numbers of the training stay as they are: timm initializes all weights at random.
    """
    identifier = Name.parse(name).rest
    if (folder := local_folder(name)) is not None:
        require_safetensors(folder, PREFERRED)
        identifier = f"{LOCAL}{folder}"
    require_library("timm", "peers")
    with torch.random.fork_rng(devices=[]), quiet_libraries(name), library_errors(f"{name}: timm cannot open it"):
        yield identifier


def obstacles(vit: Any) -> list[str]:
    """What the ViT has and IMP's encoder lacks, and what IMP's encoder needs and the ViT lacks."""
    from timm.layers import GELU, Attention, GELUTanh, LayerNorm, Mlp, PatchEmbed
    from timm.models.vision_transformer import Block, LayerScale, VisionTransformer

    kind = type(vit)
    if kind is not VisionTransformer:
        return [f"it is {kind.__module__}.{kind.__qualname__}, not timm's VisionTransformer"]
    known = {PatchEmbed, Block, Attention, Mlp, LayerScale, LayerNorm, nn.LayerNorm, nn.GELU, GELU, GELUTanh}
    known |= {nn.Conv2d, nn.Linear, nn.Sequential, nn.Dropout, nn.Identity}
    modules = [*vit.patch_embed.modules(), *vit.blocks.modules(), *vit.norm.modules()]
    encoder_names = [name for name, _ in vit.named_parameters() if not name.startswith(POOLING)]
    names = {re.sub(r"\d+", "*", name, count=1) for name in encoder_names}
    other_parts = {type(module).__name__ for module in modules if type(module) not in known}
    other_parts |= {re.sub(r"\.(weight|bias)$", "", name) for name in names - CONVERTED - FOLDED}
    reasons = [f"it has {part}" for part in sorted(other_parts)]
    reasons += [f"it lacks {name}" for name in sorted(CONVERTED - names)]
    other_epsilons = {module.eps for module in modules if isinstance(module, nn.LayerNorm)} - {EPS}
    if other_epsilons:
        reasons.append(f"the epsilon of its norms is {min(other_epsilons):g}, not {EPS:g}")
    if vit.in_chans != RGB:
        reasons.append(f"its pictures have {vit.in_chans} channels, not {RGB}")
    return reasons


def _gelu(activation: nn.Module) -> str:
    """The value of `model.gelu`."""
    from timm.layers import GELUTanh

    is_tanh = isinstance(activation, GELUTanh) or getattr(activation, "approximate", "none") == "tanh"
    return "tanh" if is_tanh else "erf"
