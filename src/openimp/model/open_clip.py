"""A model of open_clip, wrapped: the library's own code computes, and openimp trains, evaluates and serves it.

Shape suffixes: B examples, T frames, C channels, H height, W width, P values per token, Z features of the shared
embedding space.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from openimp.common.errors import UserError, library_errors
from openimp.common.modality import Modalities, Tokens
from openimp.common.progress import no_log_output
from openimp.modalities.open_clip import (
    Pictures,
    import_open_clip,
    normalized,
    reader_of,
    unpacked,
)
from openimp.model.embedder import Embedder, Encoded, EncodedAll
from openimp.model.heads import MAX_LOG_LOGIT_SCALE, LogitScale, Temperature
from openimp.model.init import SkipInit, linear
from openimp.recipe.model_config import ModelConfig

BLOCKS = ("resblocks", "blocks", "layer", "layers", "block")
"""Names of the lists of blocks in the towers of open_clip, timm and transformers."""
PROJECTIONS = ("text_projection", "visual.proj", "text.proj", "text.text_projection")
"""Names of the projections of both towers that are no linear layers."""
STACKED = {"qkv": 3, "kv": 2}
"""The number of matrices that linear layers with these names stack."""


class OpenCLIP(Embedder):
    """A model of two towers: `encoder`, which open_clip has built, and its temperature, which is a separate module.

    All modalities share one space. The features of a picture and of a text are the library's, before they are
    normalized. Those of a clip are the mean of its frames' unit vectors (CLIP4Clip's mean pooling, arXiv 2104.08860).

    Statistics of batch norms stay as they are in training, because an embedding must not depend on its batch.
    """

    cast_inputs = True
    reads_values = True  # by the towers of the library transformers
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        config: ModelConfig,
        modalities: Modalities,
        encoder: nn.Module,
        embed_dim: int,
    ) -> None:
        """Wraps the library's model.

        Args:
            config: the configuration of the model.
            modalities: its modalities; those of a wrapped model have the library's files as their state.
            encoder: an instance of a model class of open_clip.
            embed_dim: Z.
        """
        super().__init__()
        self.pairs = [pair.modalities for pair in config.pairs]
        self.readers = {name: modality.reads_text for name, modality in modalities.items()}
        for modality in modalities.values():
            if isinstance(modality, Pictures):
                self.size = modality.size
                for name, values in zip(("mean", "std"), modality.statistics):
                    self.register_buffer(name, values, persistent=False)
        library = cast(Any, encoder)
        is_siglip = library.logit_bias is not None
        limit = math.inf if is_siglip else MAX_LOG_LOGIT_SCALE  # SigLIP's scales are larger than CLIP's limit.
        self.scale = LogitScale(library.logit_scale, library.logit_bias, limit)
        library.logit_scale = library.logit_bias = None
        for module in encoder.modules():
            if isinstance(module, _BatchNorm):
                counts: Any = module  # As floats, because the EMA averages them, too.
                counts.num_batches_tracked = counts.num_batches_tracked.float()
        self.encoder = encoder
        sizes = {"width": embed_dim, "embed_dim": embed_dim, "space": "joint"}
        self.config = config.model.model_copy(update=sizes)
        self.classifiers = nn.ModuleDict(
            {name: linear(embed_dim, len(classes)) for name, classes in config.classes.items()}
        )

    @classmethod
    def from_config(cls, config: ModelConfig, modalities: Modalities) -> "OpenCLIP":
        """Builds the model without the values of its weights, which are then loaded."""
        # On the CPU, so that buffers which are computed have their values.
        with torch.device("cpu"):
            reader = reader_of(modalities)
            model = cls(config, modalities, build(reader.files), reader.embed_dim)
        return model.to("meta") if torch.get_default_device().type == "meta" else model

    def checkpoint_activations(self) -> None:
        cast(Any, self.encoder).set_grad_checkpointing(True)

    def _encode(self, inputs: Mapping[str, Tokens]) -> EncodedAll:
        return {name: Encoded(self._features(name, tokens), []) for name, tokens in inputs.items()}

    def _features(self, name: str, tokens: Tokens) -> Tensor:
        """The features (B, Z) of the tokens of a modality."""
        library = cast(Any, self.encoder)
        if self.readers[name]:
            return library.encode_text(self.ids(tokens), normalize=False)
        images_BTCHW = self.images(tokens)
        batch, frames = images_BTCHW.shape[:2]
        # FSDP2 may have gathered the weights in bf16.
        dtype = next(library.visual.parameters()).dtype
        z_BZ = library.encode_image(images_BTCHW.flatten(0, 1).to(dtype), normalize=False)
        return z_BZ if frames == 1 else F.normalize(z_BZ, dim=-1).unflatten(0, (batch, frames)).mean(1)

    def images(self, tokens: Tokens) -> Tensor:
        """The frames (B, T, 3, H, W) in the tokens of pictures or clips, as the library's model takes them."""
        pixels = tokens.values.flatten(0, 1).unflatten(-1, (*self.size, 3))
        if pixels.dtype == torch.uint8:
            images = normalized(pixels, self.mean, self.std)
        else:
            images = pixels.movedim(-1, 1).contiguous()
        return images.unflatten(0, tokens.values.shape[:2])

    def ids(self, tokens: Tokens) -> Tensor:
        """The ids (B, L) in the tokens of texts, as the library's model takes them."""
        return tokens.values

    def project(self, features_BD: Tensor, modality: str, other: str, normalize: bool = True) -> Tensor:
        return F.normalize(features_BD.float(), dim=-1) if normalize else features_BD.float()

    def share_a_space(self, a: str, b: str) -> bool:
        return {a, b} <= self.readers.keys()

    def head_name(self, modality: str, other: str) -> str:
        """The name of a modality's space, which is one for all targets."""
        return modality

    def temperature(self, a: str, b: str) -> LogitScale:
        """The temperature, which is one for all pairs."""
        return self.scale

    def hidden_matrices(self) -> dict[Tensor, int]:
        """The weights of all linear layers but classifiers, and the projections of both towers."""
        stacks: dict[Tensor, int] = {}
        for name, module in self.encoder.named_modules():
            if isinstance(weight := getattr(module, "in_proj_weight", None), nn.Parameter):
                stacks[weight] = 3
            if isinstance(module, nn.Linear):
                stacks[module.weight] = STACKED.get(name.rpartition(".")[2], 1)
        parameters = dict(self.encoder.named_parameters())
        projections = [parameters[name] for name in PROJECTIONS if name in parameters]
        stacks.update((weight, 1) for weight in projections if weight.ndim == 2)
        return stacks

    def depths(self) -> dict[Tensor, int]:
        raise UserError(
            "optimizer.layer_decay: is for openimp's own encoder; use lr_scale for parts of a wrapped model"
        )

    def _named_blocks(self) -> list[tuple[str, nn.Module]]:
        """The outermost blocks, in order, each with the name of its list."""
        blocks = []
        for name, module in self.encoder.named_modules():
            if name.rpartition(".")[2] in BLOCKS and isinstance(module, nn.ModuleList | nn.Sequential):
                blocks += [(name, block) for block in module]
        inner = {id(module) for _, block in blocks for module in block.modules() if module is not block}
        return [(name, block) for name, block in blocks if id(block) not in inner]

    def blocks(self) -> list[nn.Module]:
        return [block for _, block in self._named_blocks()]

    def blocks_of(self, modalities: Iterable[str]) -> list[nn.Module]:
        """The blocks of the towers. CoCa's decoder, which writes captions, is in neither."""
        named = [(name, block) for name, block in self._named_blocks() if not name.startswith("text_decoder.")]
        return [
            block
            for modality in modalities
            for name, block in named
            if name.startswith("visual.") != self.readers[modality]
        ]

    def fp32_modules(self) -> list[Temperature | LogitScale]:
        return [self.scale]

    def train(self, mode: bool = True) -> "OpenCLIP":
        super().train(mode)
        for module in self.encoder.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


def build(files: Mapping[str, str]) -> nn.Module:
    """The library's model, without the values of its weights. `files` are those of `modalities.open_clip`."""
    library = import_open_clip()
    with unpacked(files) as name, SkipInit(), no_log_output(), library_errors("open_clip cannot build the model"):
        model = library.create_model(name, load_weights=False, pretrained_text=False)
    return model
