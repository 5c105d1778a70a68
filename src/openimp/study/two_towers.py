"""Another library's model in openimp's loop, to compare with: the two towers of open_clip, as they are.

    train(recipe, run, trainer=TwoTowerTrainer)

A recipe with one task of two modalities, one of them text, says all there is to say. The towers have the recipe's
sizes, read its examples in its order, augmented in its way and tokenised by its tokenizer, and are updated by its
optimisers; loss, initial weights, pooling and patch dropout are open_clip's. Needs `pip install openimp[peers]`.

Shape suffixes: B examples, T frames, C channels, H height, W width, L tokens, P values of a token, Z features of the
common space.
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
from openimp.common.modality import Modality, Tokens
from openimp.data.batch import Batch
from openimp.modalities.text import END, PAD
from openimp.model.embedder import Embedder, Encode, Encoded
from openimp.objectives import Losses
from openimp.planning.ledger import costs, mixture
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Contrastive, Task
from openimp.training.trainer import Trainer

MAX_LOGIT_SCALE = math.log(100)
"""Where open_clip's training clamps the logarithm of the scale; its other end is 0."""


class TwoTowers(Embedder):
    """`open_clip.CLIP`: a vision transformer and a text transformer.

    A clip is a batch of frames whose unit vectors are averaged (CLIP4Clip's mean pooling, arXiv 2104.08860). A sound is
    its log-mel spectrogram, one picture of frames x bins whose channel is repeated three times.

    The text tower reads the recipe's tokenizer, not the library's: of its 49,408 tokens a small corpus has few, and
    those that occur only in held-out texts would keep their random vectors.

    Attributes:
        clip: the library's model.
        modalities: as it reads them, of `whole_modalities`.
        preprocess, tokenizer: as open_clip's; `preprocess` is None where it sees no stills.
    """

    def __init__(self, recipe: Recipe, modalities: Mapping[str, Modality]) -> None:
        """The towers that a recipe's only task needs; `modalities` are those of `whole_modalities`, fitted."""
        from open_clip import CLIP

        super().__init__()
        task, self.seen, self.reader = _pair(recipe)
        self.config = model = recipe.model
        self.pairs = [(min(self.seen, self.reader), max(self.seen, self.reader))]
        self.modalities = dict(modalities)
        pictures, texts = cast(Any, modalities[self.seen]), cast(Any, modalities[self.reader])
        view = task.views[0][self.seen]
        self.shape = pictures.shape(view)
        common = {
            "width": model.width,
            "layers": model.layers,
            "mlp_ratio": model.mlp_dim / model.width,
            "qk_norm": model.qk_norm,
        }
        vision = {
            **common,
            "head_width": model.width // model.heads,
            "image_size": self.shape[1:3],
            "patch_size": recipe.modalities[pictures.stem].patch[-2:],
            "patch_dropout": view.drop_tokens,
        }
        text = {
            **common,
            "heads": model.heads,
            "vocab_size": texts.stem_spec().values,
            "context_length": max(seen.length for seen in _views(recipe, self.reader)),
            "pool_type": "eos",
            "eos_id": END,
            "pad_id": PAD,
        }
        self.clip = CLIP(model.embed_dim, vision, text, init_logit_scale=-math.log(model.init_temperature))
        self.preprocess = partial(pictures.preprocess, view=view) if hasattr(pictures, "preprocess") else None
        self.tokenizer = partial(texts.tokenize, length=self.clip.context_length)

    def encode(self, inputs: Mapping[str, Tokens]) -> Encoded:
        """Tokens of one of the two modalities to (B, Z)."""
        ((name, tokens),) = inputs.items()
        if name == self.reader:
            ids_BL = F.pad(tokens.values, (0, self.clip.context_length - tokens.values.shape[1]), value=PAD)
            return Encoded(self.encode_text(ids_BL), [])
        values_B1P = tokens.values
        if values_B1P.dtype == torch.uint8:
            values_B1P = values_B1P.float() / 127.5 - 1
        pictures_BTCHW = values_B1P.view(-1, *self.shape).movedim(-1, 2).expand(-1, -1, 3, -1, -1)
        z_BTZ = self.encode_image(pictures_BTCHW.flatten(0, 1)).unflatten(0, (-1, self.shape[0]))
        return Encoded(F.normalize(z_BTZ, dim=-1).mean(1), [])

    def encode_image(self, pictures_B3HW: Tensor) -> Tensor:
        """Pictures in -1..1, as `preprocess` gives them, to (B, Z)."""
        z_BZ: Tensor = self.clip.encode_image(pictures_B3HW)
        return z_BZ

    def encode_text(self, ids_BL: Tensor) -> Tensor:
        """Ids, as `tokenizer` gives them, to (B, Z)."""
        z_BZ: Tensor = self.clip.encode_text(ids_BL)
        return z_BZ

    def project(self, features_BD: Tensor, source: str, target: str, normalize: bool = True) -> Tensor:
        return F.normalize(features_BD.float(), dim=-1) if normalize else features_BD.float()

    def share_a_space(self, a: str, b: str) -> bool:
        return {a, b} == {self.seen, self.reader}

    def hidden_matrices(self) -> dict[Tensor, None]:
        """Those of the blocks, and the projections."""
        return {
            parameter: None
            for name, parameter in self.clip.named_parameters()
            if parameter.ndim == 2 and ("resblocks" in name or name in ("visual.proj", "text_projection"))
        }

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        self.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


class TwoTowerTrainer(Trainer):
    """The loop with the two towers in it. Its metrics count what is seen of an example as one token.

    Raises:
        UserError: as `Trainer`, and as `whole_modalities`.
    """

    suggest_same = False  # open_clip's loss treats each example as an item of its own.

    @staticmethod
    def read(recipe: Recipe) -> dict[str, Modality]:
        return whole_modalities(recipe)

    @staticmethod
    def build(recipe: Recipe, modalities: Mapping[str, Modality], classes: Mapping[str, int]) -> TwoTowers:
        return TwoTowers(recipe, modalities)

    @staticmethod
    def losses(model: Any, task: Task, batch: Batch, encode: Encode | None = None) -> Losses:
        """`open_clip.ClipLoss`; its similarities and softmax are fp32."""
        from open_clip import ClipLoss

        encode = encode or model.encode
        encoded = {name: encode({name: tokens}) for name, tokens in batch.tokens.items()}
        a, b = task.inputs
        z_BZ, other_BZ = model.project(encoded[a].features, a, b), model.project(encoded[b].features, b, a)
        with full_precision(z_BZ.device):
            loss = ClipLoss()(z_BZ, other_BZ, model.clip.logit_scale.exp())
        return Losses(loss, {f"{a}-{b}": loss.detach()}, encoded)


def flops_of_a_step(recipe: Recipe) -> float:
    """FLOPs of the mean step of `TwoTowerTrainer`, forward and backward, counted; see `ledger`.

    Raises:
        UserError: as `whole_modalities`.
    """
    modalities = whole_modalities(recipe)
    ((_, row),) = mixture(recipe, costs(recipe, modalities, {}, TwoTowerTrainer.build, TwoTowerTrainer.losses)).items()
    return row["flops"]


def load_two_towers(run: Path) -> TwoTowers:
    """The newest checkpoint of a run of `TwoTowerTrainer`, in evaluation mode, on the GPU where there is one.

    Raises:
        UserError: there is none, it is damaged, or the run is of another model.
    """
    folder = model_folder(run)
    recipe, _, learned = read_config(folder, TwoTowers)
    modalities = whole_modalities(recipe)
    for modality in modalities.values():
        modality.load_state(learned)
    model = TwoTowers(recipe, modalities)
    load_weights(model, folder)
    return model.to(pick_device()).eval()


def whole_modalities(recipe: Recipe) -> dict[str, Modality]:
    """The modalities of a recipe's only task; of the one that is seen, an example is one token, for the towers cut it
    themselves.

    Raises:
        UserError: open_clip is not installed, or the recipe asks for what its towers and its loss cannot do.
    """
    try:
        import open_clip  # noqa: F401
    except ImportError:
        raise UserError("open_clip is not installed: pip install 'openimp[peers]'") from None
    task, seen, _ = _pair(recipe)
    modalities, views = recipe.make_modalities(), _views(recipe, seen)
    try:
        shapes = sorted({modalities[seen].shape(view) for view in views})
        modalities[seen] = modalities[seen].whole(views[0])
    except TypeError as error:
        raise UserError(f"{recipe.name}: {error}, which open_clip's towers need") from None
    if len(shapes) > 1:
        raise UserError(
            f"{recipe.name}: open_clip's towers see one shape only, but the views of {seen}, in training and in "
            f"evaluation, are {', '.join(' x '.join(map(str, shape)) for shape in shapes)}"
        )
    if len({view[seen].drop_tokens for view in task.views}) > 1:
        raise UserError(
            f"{recipe.name}: open_clip's towers drop one share of the patches, but the views' drop_tokens differ"
        )
    return modalities


def _pair(recipe: Recipe) -> tuple[Task, str, str]:
    """The only task, its modality that is seen, and the one that is read.

    Raises:
        UserError: the task, or the model, is not what open_clip has.
    """
    if len(recipe.tasks) > 1:
        raise UserError(f"{recipe.name}: two towers take one task, found {', '.join(recipe.tasks)}")
    ((name, task),) = recipe.tasks.items()
    modalities = recipe.make_modalities()
    seen, read = ([side for side in task.inputs if modalities[side].reads_text is reads] for reads in (False, True))
    if len(seen) != 1 or len(read) != 1:
        raise UserError(f"tasks.{name}: two towers take one modality and its text, found {', '.join(task.inputs)}")
    if task.objectives != [Contrastive(type="contrastive")]:
        plain = f"tasks.{name}.objectives=[{{type: contrastive}}]"
        raise UserError(f"tasks.{name}: open_clip's loss is contrastive, each example an item; set {plain}")
    if any(spec.draw > 1 for spec in task.inputs.values()):
        raise UserError(f"tasks.{name}: open_clip's loss takes one pair an example; drop draw")
    if recipe.model.moe:
        raise UserError(f"{recipe.name}: open_clip's towers are dense; set model.moe=null")
    return task, seen[0], read[0]


def _views(recipe: Recipe, modality: str) -> list[Any]:
    """How a modality is seen in training, then in evaluation."""
    sets = [options.view for options in recipe.evaluation.sets.values() if modality in options.inputs]
    return [view[modality] for task in recipe.tasks.values() for view in [*task.views, *sets]]
