"""The peer of studies: open_clip's two towers, unchanged, in openimp's training loop.

    train(recipe, run, trainer=TwoTowerTrainer)

The recipe has one task of two modalities, one of them text. The towers have the recipe's sizes. They get its examples
in its order, with its augmentation and tokenizer, and its optimizers update them. Loss, initialization, pooling and
patch dropout are open_clip's. It needs `pip install openimp[peers]`.

Shape suffixes: B examples, T frames, C channels, H height, W width, L tokens, P values per token, Z features of the
shared embedding space.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.checkpoint.folder import load_weights, model_folder, read_config
from openimp.common.device import full_precision, pick_device
from openimp.common.errors import UserError
from openimp.common.modality import Modalities, Modality, Tokens
from openimp.data.batch import Batch
from openimp.modalities.text import END, PAD
from openimp.model.embedder import Embedder, EncodeAll, Encoded
from openimp.objectives import Losses
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Contrastive, Task
from openimp.training.trainer import Trainer

MAX_LOGIT_SCALE = math.log(100)
"""open_clip's upper limit on the logarithm of the logit scale; its lower limit is 0."""


class TwoTowers(Embedder):
    """`open_clip.CLIP`: a vision transformer and a text transformer.

    A clip is a batch of frames, and its embedding is the mean of the frames' unit vectors (CLIP4Clip's mean pooling,
    arXiv 2104.08860). A sound is its log-mel spectrogram: one image of frames x bins, with the channel repeated three
    times.

    The text tower uses the recipe's tokenizer instead of open_clip's. A small corpus has only few of the latter's
    49,408 tokens, and tokens that occur only in held-out texts would keep their random embeddings.

    `preprocess`, `tokenizer`, `encode_image` and `encode_text` are called like open_clip's. `preprocess` returns values
    in -1..1. It is None if the media are not images.
    """

    def __init__(self, recipe: Recipe, modalities: Modalities) -> None:
        """Initializes the towers for the recipe's only task. The modalities are `unpatched_modalities`, fitted."""
        from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg

        super().__init__()
        task, self.media, self.text = _pair(recipe)
        self.config = model = recipe.model
        self.pairs = [(min(self.media, self.text), max(self.media, self.text))]
        self.modalities = dict(modalities)
        media, texts = cast(Any, modalities[self.media]), cast(Any, modalities[self.text])
        view = task.views[0][self.media]
        self.shape = media.shape(view)
        common: Any = {"width": model.width, "layers": model.layers, "qk_norm": model.qk_norm}
        common["mlp_ratio"] = model.mlp_dim / model.width
        vision = CLIPVisionCfg(
            **common,
            head_width=model.width // model.heads,
            image_size=self.shape[1:3],
            patch_size=recipe.modalities[media.stem].patch[-2:],
            patch_dropout=view.drop_tokens,
        )
        text = CLIPTextCfg(
            **common,
            heads=model.heads,
            vocab_size=texts.stem_spec().values,
            context_length=max(used.length for used in _views(recipe, self.text)),
            pool_type="eos",
            eos_id=END,
            pad_id=PAD,
        )
        self.clip = CLIP(model.embed_dim, vision, text, init_logit_scale=-math.log(model.init_temperature))
        self.encode_image, self.encode_text = self.clip.encode_image, self.clip.encode_text
        self.preprocess = partial(media.preprocess, view=view) if hasattr(media, "preprocess") else None
        self.tokenizer = partial(texts.tokenize, length=self.clip.context_length)

    def encode(self, inputs: Mapping[str, Tokens]) -> Encoded:
        """Encodes the tokens of one of the two modalities to features (B, Z)."""
        ((name, tokens),) = inputs.items()
        if name == self.text:
            ids_BL = F.pad(tokens.values, (0, self.clip.context_length - tokens.values.shape[1]), value=PAD)
            return Encoded(self.encode_text(ids_BL), [])
        values_B1P = tokens.values
        if values_B1P.dtype == torch.uint8:
            values_B1P = values_B1P.float() / 127.5 - 1
        images_BTCHW = values_B1P.view(-1, *self.shape).movedim(-1, 2).expand(-1, -1, 3, -1, -1)
        z_BTZ = self.encode_image(images_BTCHW.flatten(0, 1)).unflatten(0, (-1, self.shape[0]))
        return Encoded(F.normalize(z_BTZ, dim=-1).mean(1), [])

    def project(self, features_BD: Tensor, source: str, target: str, normalize: bool = True) -> Tensor:
        return F.normalize(features_BD.float(), dim=-1) if normalize else features_BD.float()

    def share_a_space(self, a: str, b: str) -> bool:
        return {a, b} == {self.media, self.text}

    def hidden_matrices(self) -> dict[Tensor, int]:
        """The weight matrices of the blocks, and the projections."""
        return {
            parameter: 3 if name.endswith("in_proj_weight") else 1
            for name, parameter in self.clip.named_parameters()
            if parameter.ndim == 2 and ("resblocks" in name or name in ("visual.proj", "text_projection"))
        }

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        self.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


class TwoTowerTrainer(Trainer):
    """Trains the two towers. Its metrics count the media of an example as one token."""

    suggest_same = False  # open_clip's loss cannot treat several examples as one item.

    @staticmethod
    def make_modalities(recipe: Recipe) -> dict[str, Modality]:
        return unpatched_modalities(recipe)

    @staticmethod
    def build(recipe: Recipe, modalities: Modalities, classes: Mapping[str, int]) -> TwoTowers:
        return TwoTowers(recipe, modalities)

    @staticmethod
    def losses(model: Any, task: Task, batch: Batch, encode_all: EncodeAll | None = None) -> Losses:
        """`open_clip.ClipLoss`, with similarities and softmax in fp32."""
        from open_clip import ClipLoss

        encoded = (encode_all or model.encode_all)(batch.tokens)
        a, b = task.inputs
        z_BZ, other_BZ = model.project(encoded[a].features, a, b), model.project(encoded[b].features, b, a)
        with full_precision(z_BZ.device):
            loss = ClipLoss()(z_BZ, other_BZ, model.clip.logit_scale.exp())
        return Losses(loss, {f"{a}-{b}": loss.detach()}, {})


def load_two_towers(run: Path) -> TwoTowers:
    """Loads the newest checkpoint of a run of `TwoTowerTrainer` in evaluation mode, onto the GPU if there is one."""
    folder = model_folder(run)
    recipe, _, learned = read_config(folder, TwoTowers)
    modalities = unpatched_modalities(recipe)
    for modality in modalities.values():
        modality.load_state(learned)
    model = TwoTowers(recipe, modalities)
    load_weights(model, folder)
    return model.to(pick_device()).eval()


def unpatched_modalities(recipe: Recipe) -> dict[str, Modality]:
    """The modalities of the recipe's only task, with the media of an example as one token: the towers cut patches
    themselves. What open_clip's towers or loss do not support is a UserError."""
    try:
        import open_clip  # noqa: F401
    except ImportError:
        raise UserError("open_clip is not installed: pip install 'openimp[peers]'") from None
    task, media, _ = _pair(recipe)
    modalities, views = recipe.make_modalities(), _views(recipe, media)
    try:
        shapes = sorted({modalities[media].shape(view) for view in views})
    except TypeError as error:
        raise UserError(f"{recipe.name}: open_clip's towers take images, but {error}") from None
    if len(shapes) > 1:
        raise UserError(
            f"{recipe.name}: open_clip's towers take only one shape, but the views of {media} in training and "
            f"evaluation have the shapes {', '.join(' x '.join(map(str, shape)) for shape in shapes)}"
        )
    if len({view[media].drop_tokens for view in task.views}) > 1:
        raise UserError(f"{recipe.name}: open_clip's towers have one patch dropout, but the views' drop_tokens differ")
    # The patch becomes the whole example. That of a sound has two axes, frames and bins.
    config = modalities[media].config
    if not isinstance(getattr(config, "patch", None), tuple):
        raise UserError(f"{recipe.name}: open_clip's towers take images, but {media} has no patch with several axes")
    patch = shapes[0][3 - len(config.patch) : 3]
    modalities[media] = type(modalities[media])(config.model_copy(update={"patch": patch}))
    return modalities


def _pair(recipe: Recipe) -> tuple[Task, str, str]:
    """The recipe's only task, the name of its media modality, and the name of its text modality."""
    if len(recipe.tasks) > 1:
        raise UserError(f"{recipe.name}: two towers take one task, found {', '.join(recipe.tasks)}")
    ((name, task),) = recipe.tasks.items()
    modalities = recipe.make_modalities()
    media, text = ([side for side in task.inputs if modalities[side].reads_text is reads] for reads in (False, True))
    if len(media) != 1 or len(text) != 1:
        raise UserError(f"tasks.{name}: two towers take one modality and its text, found {', '.join(task.inputs)}")
    if task.objectives != [Contrastive(type="contrastive")]:
        plain = f"tasks.{name}.objectives=[{{type: contrastive}}]"
        raise UserError(f"tasks.{name}: open_clip's loss is contrastive and has no further options; set {plain}")
    if any(spec.draw > 1 for spec in task.inputs.values()):
        raise UserError(f"tasks.{name}: open_clip's loss takes one pair per example; remove draw")
    if recipe.model.moe:
        raise UserError(f"{recipe.name}: open_clip's towers are dense; set model.moe=null")
    return task, media[0], text[0]


def _views(recipe: Recipe, modality: str) -> list[Any]:
    """The views of a modality in training, then those in evaluation."""
    sets = [options.view for options in recipe.evaluation.sets.values() if modality in options.inputs]
    return [view[modality] for task in recipe.tasks.values() for view in [*task.views, *sets]]
