"""A model for studies to compare with: open_clip's two towers, unchanged, in openimp's training loop.

    train(recipe, run, variant=TWO_TOWERS)

The recipe has one task of two modalities, one of them text. The towers have the recipe's sizes. They get its examples
in its order, with its augmentation and tokenizer, and its optimizers update them. Initialization, pooling and patch
dropout are open_clip's, and so is the loss, which equals openimp's loss without `positives_by`. It needs `pip install
openimp[peers]`. These towers are trained; those of `encoding.tower` are frozen.

Shape suffixes: B examples, T frames, P values per token, Z features of the shared embedding space.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openimp.common.errors import UserError
from openimp.common.modality import Modalities, Modality, Tokens
from openimp.common.protocols import Framed
from openimp.encoding.libraries import import_open_clip
from openimp.modalities.text import END, PAD
from openimp.model.embedder import Embedder, Encoded, EncodedAll
from openimp.model.heads import Temperature
from openimp.objectives.contrastive import Contrastive
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Task
from openimp.training.setup import Variant

MAX_LOG_LOGIT_SCALE = math.log(100)
"""Upper bound of the logarithm of open_clip's logit scale."""


class TwoTowers(Embedder):
    """`open_clip.CLIP`: a vision transformer and a text transformer.

    A sound is its log-mel spectrogram: one image of frames x bins, with the channel repeated three times.

    The text tower uses the recipe's tokenizer. A small corpus has only few of the 49,408 tokens of open_clip's
    tokenizer, and tokens that occur only in held-out texts would keep their random embeddings.
    """

    def __init__(self, recipe: Recipe, modalities: Modalities) -> None:
        """Initializes the towers for the recipe's only task. The modalities are `unpatched_modalities`, fitted."""
        from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg

        task, media_name, text_name = _pair(recipe)
        model = recipe.model
        media = modalities[media_name]
        assert isinstance(media, Framed)  # `unpatched_modalities` checks it.
        view = task.views[0][media_name]
        shape = media.shape(view)
        common: Any = {"width": model.width, "layers": model.layers, "qk_norm": model.qk_norm}
        common["mlp_ratio"] = model.mlp_dim / model.width
        vision = CLIPVisionCfg(
            **common,
            head_width=model.width // model.heads,
            image_size=shape[1:3],
            patch_size=recipe.modalities[media.stem].patch[-2:],
            patch_dropout=view.drop_tokens,
        )
        text = CLIPTextCfg(
            **common,
            heads=model.heads,
            vocab_size=modalities[text_name].stem_spec().values,
            context_length=max(used.length for used in _views(recipe, text_name)),
            pool_type="eos",
            eos_id=END,
            pad_id=PAD,
        )
        super().__init__()
        clip: Any = CLIP(model.embed_dim, vision, text)
        clip.logit_scale = None  # `scale` instead, whose parameters stay fp32.
        clip.set_grad_checkpointing(recipe.memory.activation_checkpointing)
        self.encoder = clip
        self.scale = LogitScale(model.init_temperature)
        # The towers give vectors of the shared space, without further heads.
        self.config = model.model_copy(update={"width": model.embed_dim, "space": "joint"})
        self.classifiers = nn.ModuleDict()
        self.pairs = [(min(media_name, text_name), max(media_name, text_name))]
        self.text_name = text_name
        self.shape = shape
        self.context_length = clip.context_length

    def encode_all(self, inputs: Mapping[str, Tokens]) -> EncodedAll:
        return {name: Encoded(self._vectors(name, tokens), []) for name, tokens in inputs.items()}

    def _vectors(self, name: str, tokens: Tokens) -> Tensor:
        """The vectors (B, Z) of the tokens of a modality. That of a clip is the mean of its frames' unit vectors."""
        if name == self.text_name:
            return self.encoder.encode_text(self._ids(tokens))
        images_BTCHW = self._images(tokens)
        batch, frames = images_BTCHW.shape[:2]
        z_BZ = self.encoder.encode_image(images_BTCHW.flatten(0, 1))
        return z_BZ if frames == 1 else F.normalize(z_BZ, dim=-1).unflatten(0, (batch, frames)).mean(1)

    def _images(self, tokens: Tokens) -> Tensor:
        """The frames (B, T, 3, H, W) in the tokens of media."""
        values_B1P = tokens.values
        if values_B1P.dtype == torch.uint8:
            values_B1P = values_B1P.float() / 127.5 - 1
        return values_B1P.view(-1, *self.shape).movedim(-1, 2).expand(-1, -1, 3, -1, -1)

    def _ids(self, tokens: Tokens) -> Tensor:
        """The ids (B, L) of texts, padded to the length that the text tower takes."""
        return F.pad(tokens.values, (0, self.context_length - tokens.values.shape[1]), value=PAD)

    def project(self, features_BD: Tensor, modality: str, other: str, normalize: bool = True) -> Tensor:
        return F.normalize(features_BD.float(), dim=-1) if normalize else features_BD.float()

    def share_a_space(self, a: str, b: str) -> bool:
        return {a, b} <= {*self.pairs[0]}

    def head_name(self, modality: str, other: str) -> str:
        return modality

    def temperature(self, a: str, b: str) -> Temperature:
        return self.scale

    def fp32_modules(self) -> list[Temperature]:
        return [self.scale]

    def hidden_matrices(self) -> dict[Tensor, int]:
        """The weights of attention and linear layers, and the projections of both towers."""
        stacks: dict[Tensor, int] = {self.encoder.visual.proj: 1, self.encoder.text_projection: 1}
        for module in self.encoder.modules():
            if isinstance(module, nn.MultiheadAttention):
                stacks[cast(Tensor, module.in_proj_weight)] = 3
            elif isinstance(module, nn.Linear):
                stacks[module.weight] = 1
        return stacks

    def depths(self) -> dict[Tensor, int]:
        raise UserError("optimizer.layer_decay: is for openimp's own encoder, not for open_clip's towers")

    def blocks(self) -> list[nn.Module]:
        return self.blocks_of(self.pairs[0])

    def blocks_of(self, modalities: Iterable[str]) -> list[nn.Module]:
        towers = [self.encoder if name == self.text_name else self.encoder.visual for name in modalities]
        return [block for tower in towers for block in tower.transformer.resblocks]


class LogitScale(Temperature):
    """The temperature as open_clip learns it: the parameter is the logarithm of the logit scale, from 0 to log(100)."""

    def __init__(self, temperature: float) -> None:
        nn.Module.__init__(self)  # `Temperature` would make another parameter.
        self.logit_scale = nn.Parameter(torch.full([1], -math.log(temperature)))
        self.bias = nn.Parameter(torch.zeros(1))  # Only the sigmoid loss uses it.

    def forward(self) -> tuple[Tensor, Tensor]:
        return (-self.logit_scale).exp(), self.bias.clone()

    @property
    def scale(self) -> Tensor:
        return self.logit_scale.exp()

    @torch.no_grad()
    def clamp(self) -> None:
        if self.logit_scale.grad is not None:
            self.logit_scale.clamp_(0, MAX_LOG_LOGIT_SCALE)


def unpatched_modalities(recipe: Recipe) -> dict[str, Modality]:
    """The modalities of the recipe's only task, with the media of an example as one token: the towers cut patches
    themselves. What open_clip's towers or loss do not support is a UserError."""
    import_open_clip()
    task, media, _ = _pair(recipe)
    modalities = recipe.make_modalities()
    medium = modalities[media]
    if not isinstance(medium, Framed):
        raise UserError(f"{recipe.name}: open_clip's towers take images, but {media} has no form of pictures")
    shapes = sorted({medium.shape(view) for view in _views(recipe, media)})
    if len(shapes) > 1:
        listed = ", ".join(" x ".join(map(str, shape)) for shape in shapes)
        raise UserError(
            f"{recipe.name}: open_clip's towers take only one shape, but the views of {media} in training and "
            f"evaluation have the shapes {listed}"
        )
    if len({view[media].drop_tokens for view in task.views}) > 1:
        raise UserError(f"{recipe.name}: open_clip's towers have one patch dropout, but the views' drop_tokens differ")
    # The patch becomes the whole example. It has frames, height and width; that of a sound only frames and bins.
    config = medium.config
    patch = shapes[0][3 - len(config.patch) : 3]
    modalities[media] = type(medium)(config.model_copy(update={"patch": patch, "conv_channels": 0}))
    return modalities


TWO_TOWERS = Variant(
    name="TwoTowerTrainer",
    make_modalities=unpatched_modalities,
    build_model=lambda recipe, modalities, _: TwoTowers(recipe, modalities),
    prints_warnings=False,  # They advise `positives_by`, which open_clip's loss does not have.
)
"""Trains the two towers. Its metrics count the media of an example as one token."""


def _pair(recipe: Recipe) -> tuple[Task, str, str]:
    """The recipe's only task, the name of its media modality, and the name of its text modality."""
    if len(recipe.tasks) > 1:
        raise UserError(f"{recipe.name}: two towers take one task, found {', '.join(recipe.tasks)}")
    ((name, task),) = recipe.tasks.items()
    modalities = recipe.make_modalities()
    text = [modality for modality in task.inputs if modalities[modality].reads_text]
    media = [modality for modality in task.inputs if not modalities[modality].reads_text]
    if len(media) != 1 or len(text) != 1:
        raise UserError(f"tasks.{name}: two towers take one modality and its text, found {', '.join(task.inputs)}")
    if task.objectives != [Contrastive(type="contrastive")]:
        change = f"tasks.{name}.objectives=[{{type: contrastive}}]"
        raise UserError(f"tasks.{name}: open_clip's loss is contrastive and has no further options; set {change}")
    if any(spec.draw > 1 for spec in task.inputs.values()):
        raise UserError(f"tasks.{name}: open_clip's loss takes one pair per example; remove draw")
    if recipe.model.moe:
        raise UserError(f"{recipe.name}: open_clip's towers are dense; set model.moe=null")
    return task, media[0], text[0]


def _views(recipe: Recipe, modality: str) -> list[Any]:
    """The views of a modality in training, then those in evaluation."""
    sets = [options.view for options in recipe.evaluation.sets.values() if modality in options.inputs]
    return [view[modality] for task in recipe.tasks.values() for view in [*task.views, *sets]]
