"""A trained model in use: `openimp.load` and what it gives.

Shape suffixes: B inputs, Z features of the common space.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openimp.checkpoint.folder import download, load_model, model_folder, save_model
from openimp.common.device import Precision, pick_device
from openimp.common.errors import UserError, nearest
from openimp.common.modality import BadMedia, Modality
from openimp.encoding.items import embed, embed_tokens, first_view, require_pair
from openimp.model.imp import IMP
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Contrastive, pairs_of


def load(path: str | Path, device: str | torch.device | None = None, precision: Precision = "auto") -> "Model":
    """Opens a trained model.

    Args:
        path: a run (its newest checkpoint is taken), a checkpoint, a folder that `Model.save` wrote, or a model of the
            Hugging Face hub: OWNER/NAME, or OWNER/NAME@REVISION with a commit, tag or branch.
        device: where it computes; left out: the GPU where there is one.
        precision: "auto" is bf16 where it is faster; in "fp32" an embedding is the same, to 1e-5, in any batch.

    Raises:
        UserError: there is no model, or it is damaged.
    """
    folder = model_folder(Path(path)) if Path(path).exists() else download(str(path))
    imp, recipe, modalities, classes = load_model(folder)
    return Model(imp, recipe, modalities, classes, precision).to(device or pick_device()).eval()


class Model(nn.Module):
    """A model with a method `encode_<name>` for each of its modalities; see `encode` for what they take and give.

    Each modality is seen in the first view of the first task that has it, as in evaluation: no augmentation, no dropped
    tokens, and the clips of a long item averaged. `views` may be changed; `preprocess` and `tokenizer` follow.

    Attributes:
        imp: the network.
        recipe: what it was trained with.
        modalities: by name.
        classes: the classes of each classification head.
        views: by modality, how it is seen.
        precision: of the forward pass.
    """

    def __init__(
        self,
        imp: IMP,
        recipe: Recipe,
        modalities: dict[str, Modality],
        classes: dict[str, list[Any]],
        precision: Precision = "auto",
    ) -> None:
        super().__init__()
        self.imp = imp
        self.recipe = recipe
        self.modalities = modalities
        self.classes = classes
        self.precision = precision
        self.views = {name: first_view(recipe, name) for name in modalities}
        self._pictures = next((name for name, m in modalities.items() if hasattr(m, "preprocess")), None)
        self._reader = next((name for name, m in modalities.items() if hasattr(m, "tokenize")), None)

    def encode(
        self, modality: str, inputs: Any, normalize: bool = False, towards: str | None = None, batch_size: int = 64
    ) -> Tensor:
        """Inputs of one modality to vectors of the space that it shares with another.

        Args:
            modality: what the inputs are.
            inputs: one, or a list of: file path, bytes, numpy array or Pillow picture, as the modality's `decode` takes
                them; a text is a string. Or a batch as a tensor, as the modality's `from_tensor` takes it: float
                (B, 3, H, W) of `preprocess` for pictures, ids (B, L) of `tokenizer` for texts. It is differentiable.
            normalize: give unit vectors.
            towards: the other modality of the pair. Left out: see `partner`. In a model with a joint space it changes
                nothing; in one with disjoint spaces, only vectors of the same pair can be compared.
            batch_size: clips or items that are encoded at once.

        Returns:
            (B, Z) fp32, on the model's device.

        Raises:
            UserError: an input cannot be read, the modality's view does not fit the model, or the two modalities were
                not trained together.
            TypeError, ValueError: a tensor is none that the modality's `from_tensor` takes.
        """
        item = self._modality(modality)
        towards = self.partner(modality) if towards is None else towards
        require_pair(self.imp, modality, towards, f"encode_{modality}")
        if isinstance(inputs, Tensor):
            parts = (item.from_tensor(part) for part in inputs.to(self.device).split(batch_size))
            vectors = [embed_tokens(self.imp, modality, part, towards, self.precision, normalize) for part in parts]
            return torch.cat(vectors)
        try:
            item.check(self.views[modality])
        except ValueError as error:
            raise UserError(f"views[{modality!r}]: {error}") from None
        inputs = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        items = self._read(item, inputs)
        return embed(self.imp, item, self.views[modality], items, towards, batch_size, self.precision, normalize)

    def partner(self, modality: str) -> str:
        """The modality towards which `modality` is encoded unless told otherwise.

        Among those that it was trained with, in the recipe's order, or else those whose heads it shares: the first that
        reads text; for one that reads text itself that of pictures, as users of open_clip expect; else the first.

        Raises:
            UserError: it was trained with none.
        """
        self._modality(modality)
        partners = list(self._partners(modality)) or [
            name for name in self.modalities if name != modality and self.imp.share_a_space(modality, name)
        ]
        if not partners:
            raise UserError(f"{modality} was trained with no other modality, so it has no embedding")
        if self._modality(modality).reads_text:
            wanted = [name for name in partners if name == self._pictures]
        else:
            wanted = [name for name in partners if self.modalities[name].reads_text]
        return (wanted or partners)[0]

    def save(self, folder: str | Path) -> None:
        """Writes the model to a new folder that `load` opens.

        Raises:
            UserError: the folder holds something already.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: expected a new folder, but something is there")
        folder.mkdir(parents=True, exist_ok=True)
        save_model(folder, self.imp, self.recipe, self.modalities, self.classes)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.imp.parameters()).device

    @property
    def preprocess(self) -> Callable[[Any], Tensor] | None:
        """As open_clip's, a Pillow picture to a tensor (3, H, W) for `encode`; None if the model takes no pictures."""
        if self._pictures is None:
            return None
        pictures: Any = self.modalities[self._pictures]
        return partial(pictures.preprocess, view=self.views[self._pictures])

    @property
    def tokenizer(self) -> Callable[[str | list[str]], Tensor] | None:
        """As open_clip's, texts to ids (B, L) for `encode`; None if the model reads no texts."""
        if self._reader is None:
            return None
        reader: Any = self.modalities[self._reader]
        return partial(reader.tokenize, length=self.views[self._reader].length)

    @property
    def logit_scale(self) -> Tensor:
        """As in open_clip, the logarithm of the scale of the similarities of pictures and texts."""
        if self._pictures is None:
            raise UserError("this model takes no pictures; see imp.temperature for the scale of another pair")
        return self.imp.temperature(self._pictures, self.partner(self._pictures)).scale.log()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("encode_") and name.removeprefix("encode_") in self.__dict__.get("modalities", ()):
            return partial(self.encode, name.removeprefix("encode_"))
        return super().__getattr__(name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(f"encode_{name}" for name in self.modalities)]

    def _modality(self, name: str) -> Modality:
        if name not in self.modalities:
            raise UserError(f"the model has no modality {name!r}{nearest(name, self.modalities)}")
        return self.modalities[name]

    def _partners(self, modality: str) -> Iterator[str]:
        for task in self.recipe.tasks.values():
            for objective in task.objectives:
                if isinstance(objective, Contrastive):
                    for pair in pairs_of(objective, task.inputs):
                        if modality in pair:
                            yield pair[1] if pair[0] == modality else pair[0]

    def _read(self, modality: Modality, inputs: list[Any]) -> Iterator[Any]:
        view = self.views[modality.name]
        for i, value in enumerate(inputs):
            try:
                item = modality.encode_input(value, view)
                if not modality.knows(value, view):
                    told = f"{value!r} has no word that the model knows, and is read as an empty text"
                    warnings.warn(told, stacklevel=2)
                yield item
            except BadMedia as error:
                is_path = isinstance(value, Path) or (isinstance(value, str) and not modality.reads_text)
                name = str(value) if is_path else f"input {i}"
                raise UserError(f"{name}: cannot be read as {modality.name}: {error}") from None
