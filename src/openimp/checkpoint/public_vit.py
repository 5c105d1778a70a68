"""Vision Transformers of timm and open_clip, from which IMP's encoder can start: `train.init: timm:NAME`.

Only a ViT that IMP's encoder computes exactly is accepted. Otherwise the error lists what IMP's encoder lacks.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openimp.checkpoint.fold import RGB, encoder_weights, stem_weights
from openimp.common.errors import UserError, one_line
from openimp.common.modality import Modalities, StemSpec
from openimp.common.names import OPEN_CLIP, TIMM, Name
from openimp.common.progress import no_log_output
from openimp.common.safe_files import refuse_links
from openimp.parallel.distributed import run_first_on_node
from openimp.parallel.layout import fill_shard

LIBRARIES = (TIMM, OPEN_CLIP)
"""How the names of public ViTs begin."""
PREFERRED = {TIMM: "model.safetensors", OPEN_CLIP: "open_clip_model.safetensors"}
"""The file that each library prefers to all others in a folder."""
EPS = 1e-6
"""Epsilon of the norms of IMP's encoder."""


class PublicViT(NamedTuple):
    """A ViT and the normalization of its pixels, which are in 0..1 before it."""

    trunk: Any  # timm's `VisionTransformer`
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def pixels(self) -> tuple[int, ...]:
        """Height and width of the pictures for which the ViT has positions."""
        embed = self.trunk.patch_embed
        return tuple(patches * side for patches, side in zip(embed.grid_size, embed.patch_size))

    def model_options(self) -> dict[str, Any]:
        """The values that a recipe's `model` must have."""
        block = self.trunk.blocks[0]
        return {
            "width": self.trunk.embed_dim,
            "layers": len(self.trunk.blocks),
            "heads": block.attn.num_heads,
            "mlp_dim": block.mlp.fc1.out_features,
            "bias": True,
            "gelu": _gelu(block.mlp.act),
            "qk_norm": False,
            "modality_specific_layers": 0,
        }

    def stem_options(self, config: Any) -> dict[str, Any]:
        """The values that the options of the stem of pictures must have. The number of frames stays as in `config`."""
        embed = self.trunk.patch_embed
        options: dict[str, Any] = {
            "patch": [config.patch[0], *embed.patch_size],
            "positions": "grid",
            "tables": [config.tables[0], *embed.grid_size],
        }
        if config.conv_channels:  # Otherwise the error would ask for a default.
            options["conv_channels"] = 0
        return options


class ViTWeights:
    """The weights of a public ViT, for the encoder and for stems of patches of its height and width."""

    def __init__(self, name: str, modalities: Modalities) -> None:
        self.name = name
        self.vit = open_vit(name, weights=False)
        specs = {modality.stem: modality.stem_spec() for modality in modalities.values()}
        sides = tuple(self.vit.trunk.patch_embed.patch_size)
        # A stem with other patches, or with a convolution, is not loaded. For the stem of pictures, `stem_options`
        # makes that an error.
        self.stems = {
            stem: spec
            for stem, spec in specs.items()
            if spec.patch and spec.patch[1:3] == sides and not spec.conv_channels
        }
        self.shapes = {name: tensor.shape for name, tensor in _tensors(self.vit, self.stems)}

    def __str__(self) -> str:
        height, width = self.vit.pixels
        return f"{self.name} (pictures of {height} x {width} pixels have its features)"

    def may_lack(self, name: str) -> bool:
        return name.startswith(tuple(f"stems.{stem}.position" for stem in self.stems))

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        vit = run_first_on_node(lambda: open_vit(self.name, weights=True))
        for name, tensor in _tensors(vit, self.stems):
            if name in tensors:
                fill_shard(tensors[name], tensor)


def _tensors(vit: PublicViT, stems: Mapping[str, StemSpec]) -> Iterator[tuple[str, Tensor]]:
    """IMP's tensors by name, one at a time."""
    state = vit.trunk.state_dict()
    yield from encoder_weights(state, len(vit.trunk.blocks))
    for name, spec in stems.items():
        yield from stem_weights(name, spec, state, vit.mean, vit.std)


def open_vit(name: str, weights: bool) -> PublicViT:
    """Opens `timm:NAME`, or the vision tower of `open_clip:NAME/TAG`. Each NAME may also be `local-dir:FOLDER`.

    Without `weights`, the ViT is on the meta device, and nothing but its configuration is downloaded.
    """
    library, model = Name.parse(name)
    with library_opens(name):
        vit = (_open_timm if library == TIMM else _open_clip)(model, weights)
    if reasons := obstacles(vit.trunk):
        raise UserError(f"{name}: cannot become IMP's encoder without approximation: {'; '.join(reasons)}")
    return vit


@contextmanager
def library_opens(name: str) -> Iterator[None]:
    """The block opens a model of timm or open_clip. What the library raises becomes a UserError.

    The random numbers of the training stay as they are: the libraries initialize all weights at random.
    """
    parsed = Name.parse(name)
    library = str(parsed.scheme)
    if parsed.folder is not None:
        _check_folder(library, Path(parsed.folder))
    try:
        with torch.random.fork_rng(devices=[]), no_log_output():
            yield
    except ImportError:
        raise UserError(f"{name}: {library} is missing: pip install 'openimp[peers]'") from None
    except Exception as error:  # Both libraries raise many kinds.
        raise UserError(f"{name}: {library} cannot open it: {one_line(error)}") from None


def _check_folder(library: str, folder: Path) -> None:
    """Refuses a folder from which the library would read weights of another format than safetensors."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    refuse_links(folder)
    safe_files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not safe_files:
        raise UserError(f"{folder}: has no weights in a .safetensors file, the only kind that is read of a folder")
    other_files = sorted(file.name for file in folder.glob("*") if file.suffix in (".bin", ".pth", ".tar"))
    preferred = PREFERRED[library]
    if other_files and preferred not in safe_files:
        safe_file = safe_files[0]
        raise UserError(
            f"{folder}: {library} may prefer {other_files[0]} to {safe_file}; rename {safe_file} to {preferred}"
        )


def _open_timm(model: str, weights: bool) -> PublicViT:
    import timm

    with torch.device("cpu" if weights else "meta"):
        trunk: Any = timm.create_model(model, pretrained=weights)
    return PublicViT(trunk, tuple(trunk.pretrained_cfg["mean"]), tuple(trunk.pretrained_cfg["std"]))


def _open_clip(model: str, weights: bool) -> PublicViT:
    import open_clip

    name, _, tag = (model, "", None) if ":" in model else model.partition("/")
    if tag is None and (text := open_clip.get_model_config(model)["text_cfg"].get("hf_model_name")):
        raise ValueError(f"its text tower {text!r} is of transformers, which may run code that a configuration names")
    if tag is not None and not open_clip.get_pretrained_cfg(name, tag):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise ValueError(f"expected NAME/TAG; the tags of {name!r} are: {known or 'none'}")
    device = "cpu" if weights else "meta"
    with torch.device(device):
        clip = open_clip.create_model(
            name,
            tag if weights else None,  # Otherwise it would be downloaded.
            load_weights=weights,
            require_pretrained=weights,
            pretrained_text=False,
            device=device,
        )
    tower = clip.visual
    trunk = getattr(tower, "trunk", tower)
    return PublicViT(trunk, tuple(tower.preprocess_cfg["mean"]), tuple(tower.preprocess_cfg["std"]))


def obstacles(trunk: Any) -> list[str]:
    """One sentence for each part of the ViT that IMP's encoder does not have."""
    from timm.layers import Attention, Mlp, PatchEmbed
    from timm.models.vision_transformer import Block, VisionTransformer

    kind = type(trunk)
    if kind is not VisionTransformer:
        name = f"{kind.__module__}.{kind.__qualname__}"
        token = ", which has a class token" if hasattr(trunk, "class_embedding") else ""
        return [f"its image tower is {name}{token}, not timm's VisionTransformer"]
    embed = trunk.patch_embed
    blocks = list(trunk.blocks)
    other_classes = {type(block).__name__ for block in blocks if type(block) is not Block}
    if other_classes:
        return [f"its blocks are {', '.join(sorted(other_classes))}, not pre-norm blocks"]
    attentions = [block.attn for block in blocks]
    mlps = [block.mlp for block in blocks]
    other_classes = {type(part).__name__ for part in (*attentions, *mlps) if type(part) not in (Attention, Mlp)}
    if not other_classes and type(embed) is not PatchEmbed:
        other_classes = {type(embed).__name__}
    if other_classes:
        return [f"it has {', '.join(sorted(other_classes))}"]
    norms = [trunk.norm, *(norm for block in blocks for norm in (block.norm1, block.norm2))]
    obstacle_holds = {
        "it has a class token": trunk.cls_token is not None,
        "it has register tokens": trunk.reg_token is not None,
        "it has no learned positions": trunk.pos_embed is None,
        "it has a norm between patch embedding and blocks": _has(trunk.norm_pre) or _has(embed.norm),
        f"its pictures have {trunk.in_chans} channels, not {RGB}": trunk.in_chans != RGB,
        "its final norm follows the pooling, instead of normalizing every token": not _has(trunk.norm),
        "its attention has norms of queries and keys": any(_has(a.q_norm) or _has(a.k_norm) for a in attentions),
        "its attention has a norm or a gate": any(_has(a.norm) or a.gate is not None for a in attentions),
        "its heads do not add up to its width": any(a.attn_dim != trunk.embed_dim for a in attentions),
        "its MLPs have a norm": any(_has(mlp.norm) for mlp in mlps),
        "its activation is not one kind of GELU": len({_gelu(mlp.act) for mlp in mlps} | {None}) != 2,
    }
    obstacle_holds |= {obstacle: True for obstacle in map(_norm_obstacle, norms) if obstacle}
    return [obstacle for obstacle, holds in obstacle_holds.items() if holds]


def _has(part: nn.Module) -> bool:
    return not isinstance(part, nn.Identity)


def _norm_obstacle(norm: Any) -> str | None:
    from timm.layers import LayerNorm

    if not _has(norm):
        return None
    if type(norm) not in (nn.LayerNorm, LayerNorm) or norm.weight is None:
        return f"it has {type(norm).__name__}, not LayerNorm with weights"
    if norm.eps != EPS:
        return f"the epsilon of its norms is {norm.eps:g}, not {EPS:g}"
    return None


def _gelu(activation: nn.Module) -> str | None:
    """The value of `model.gelu`; None for other activations."""
    from timm.layers import GELU, GELUTanh

    if isinstance(activation, nn.GELU):
        return "tanh" if activation.approximate == "tanh" else "erf"
    return {GELU: "erf", GELUTanh: "tanh"}.get(type(activation))
