"""Inference with a trained model: `openimp.load` and the `Model` that it returns.

Shape suffixes: B inputs, Z features of the shared embedding space.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from openimp.checkpoint.folder import CONFIG, NO_RECIPE, SavedRecipe, load_model, save_model
from openimp.common.device import Precision, pick_device, precision_of
from openimp.common.errors import UserError, counted, nearest, one_line
from openimp.common.folders import require_empty
from openimp.common.modality import BadMedia, Modalities, Modality
from openimp.common.names import HUB, HubName, Name
from openimp.common.progress import notice
from openimp.common.protocols import PictureReader, TensorReader, TextReader, is_known
from openimp.common.schema import checked
from openimp.data.trust import record_training, trained_here
from openimp.encoding.engine import ItemEncoder
from openimp.encoding.find import find_model
from openimp.encoding.items import require_pair
from openimp.model.embedder import Embedder
from openimp.recipe.model_config import ModelConfig
from openimp.recipe.schema import Recipe

if TYPE_CHECKING:
    from openimp.inference.classify import Predictions

METHODS = ("encode", "classify")
"""Methods of `Model` that exist for each modality."""


class Bound(partial[Any]):
    """A method with some of its arguments. `help` and `repr` show the method's docstring and the other arguments."""

    def __init__(self, method: Callable[..., Any], *args: Any, **options: Any) -> None:
        self.__doc__ = method.__doc__

    def __repr__(self) -> str:
        return f"{self.func.__name__}{signature(self)}"


class UnknownModality(UserError, AttributeError):
    """The model lacks a modality. It is an AttributeError, too, so that `hasattr` finds only methods that exist."""


def load(path: str | Path, device: str | torch.device | None = None, precision: Precision = "auto") -> "Model":
    """Opens a trained model.

    Args:
        path: a run, whose newest checkpoint is opened; a checkpoint; a folder that `Model.save` wrote; openimp:base,
            which comes with openimp; a model on the Hugging Face Hub, hub:OWNER/NAME or hub:OWNER/NAME@REVISION; or a
            public model, open_clip:NAME/TAG or conse:CLASSIFIER+TEXTS. docs/names.md lists all names.
        device: where the model computes. None: on the GPU if there is one, else on the CPU.
        precision: "auto", "bf16" or "fp32". "auto" is bf16 if that is faster on the device. In fp32, an embedding is
            the same in any batch, up to 1e-5.

    Raises:
        UserError: there is no model, it is damaged, or there is no such device or precision.
    """
    device = pick_device(device)
    precision_of(device, precision)  # An unknown precision is an error before the model is read.
    folder = find_model(path)
    imp, saved = load_model(folder)
    model = Model(imp, saved.config, saved.modalities, precision, saved_recipe=saved.recipe, folder=folder)
    return model.to(device).eval()


class Model(nn.Module):
    """A trained model with methods `encode_<modality>` and `classify_<modality>` for each of its modalities.

    An input is seen in the recipe's inference view of its modality (`Recipe.inference_view`), as in evaluation: without
    augmentation, with all tokens, and with the embeddings of a long item's clips averaged. You may change `views`;
    `preprocess` and `tokenizer` follow. The other attributes are the network `imp` (an `Embedder`), its `config`, the
    `modalities` by name, the `precision` (see `load`), the `saved_recipe` of its training, and the `folder` that it was
    loaded from.
    """

    def __init__(
        self,
        imp: Embedder,
        config: ModelConfig,
        modalities: Modalities,
        precision: Precision = "auto",
        saved_recipe: SavedRecipe = NO_RECIPE,
        folder: Path | None = None,
    ) -> None:
        super().__init__()
        self.imp = imp
        self.config = config
        self.modalities = modalities
        self.precision = precision
        self.saved_recipe = saved_recipe
        self.folder = folder
        self.views = {name: view.model_copy() for name, view in config.views.items()}

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        revision: str | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "auto",
    ) -> "Model":
        """`load`, as users of Hugging Face call it: OWNER/NAME is a model on the Hub, unless there is such a folder.

        `revision` is a commit, tag or branch on the Hub. A private model needs `hf auth login`, or a token in HF_TOKEN.
        """
        if not Path(name).exists() and HubName.parse(str(name)):
            name = f"{HUB}:{name}"
        if revision is not None and Name.parse(name).scheme != HUB:
            raise UserError(f"{name}: only a model on the Hugging Face Hub has a revision")
        return load(name if revision is None else f"{name}@{revision}", device, precision)

    def encode(
        self, modality: str, inputs: Any, normalize: bool = False, towards: str | None = None, batch_size: int = 64
    ) -> Tensor:
        """Encodes inputs of one modality into the space that it shares with another modality.

        Args:
            modality: the modality of the inputs.
            inputs: an input or a list of inputs, as the modality's `decode` takes them: file paths, bytes, numpy
                arrays, Pillow pictures, or strings for texts. Or a batch as a tensor, as the modality's `from_tensor`
                takes it: float (B, 3, H, W) from `preprocess` for pictures, ids (B, L) from `tokenizer` for texts. The
                result is then differentiable.
            normalize: whether to return unit vectors.
            towards: the modality to compare the vectors with. None: `partner` chooses it. With
                `model.space: disjoint`, only vectors of the same pair of modalities can be compared. With `joint`,
                `towards` changes nothing.
            batch_size: maximum number of clips (or rows of a tensor) per forward pass.

        Returns:
            (B, Z) fp32, on the model's device.
        """
        return self._encode(self.item_encoder(modality, towards, batch_size, f"encode_{modality}", normalize), inputs)

    def classify(
        self,
        modality: str,
        inputs: Any,
        names: Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
        head: str | None = None,
        batch_size: int = 64,
    ) -> "Predictions":
        """Tells the classes of inputs of one modality, by the names of the classes or by a trained head.

        Args:
            modality: the modality of the inputs.
            inputs: what `encode` takes.
            names: the classes to choose from, as texts (zero-shot classification). Their probabilities are the softmax
                of the similarities, scaled as in training. None: the classes of a trained classification head.
            prompts: texts with a place `{}` for the name. A class is the mean of the vectors of its texts. None: the
                name alone.
            head: the classification head, SOURCE:COLUMN, if several were trained on the modality; see `classes`.
            batch_size: maximum number of clips per forward pass.

        Returns:
            The `classes`, their `probabilities` (B, K) in fp32, and the most probable class of each input, `labels`. If
            the head was trained on any number of classes per input, the probabilities are independent.

        Raises:
            UserError: an input cannot be read; there is no such head, or no recipe that says what it was trained on; no
                contrastive objective compared the modality with texts; or the model knows no word of a name.
        """
        from openimp.inference.classify import make_classifier  # That module imports this one.

        classifier = make_classifier(self, modality, names, prompts, head=head, batch_size=batch_size)
        return classifier.predict(self._encode(classifier.encoder, inputs))

    def _encode(self, encoder: ItemEncoder, inputs: Any) -> Tensor:
        """The vectors (B, Z) or (B, D) of inputs; see `encode`."""
        if isinstance(inputs, Tensor):
            return self._encode_tensor(encoder, inputs)
        reader = encoder.modality
        inputs = _as_list(inputs)
        # Two threads cannot load the same Pillow picture at once, so an object that is given twice is read once.
        distinct = {id(value): value for value in inputs}
        vectors = {}
        unknown_texts = []
        for key, vector in encoder.encode((key, partial(encoder.read, value)) for key, value in distinct.items()):
            value = distinct[key]
            if isinstance(vector, BadMedia):
                is_path = isinstance(value, Path) or (isinstance(value, str) and not reader.reads_text)
                number = next(i for i, other in enumerate(inputs) if other is value)
                name = str(value) if is_path and value else f"input {number}"
                hint = "; make one tensor of them with torch.stack" if isinstance(value, Tensor) else ""
                raise UserError(f"{name}: cannot be read as {reader.name}: {vector}{hint}")
            if not is_known(reader, value, encoder.view):
                unknown_texts.append(value)
            vectors[key] = vector
        if unknown_texts:
            texts = counted(len(unknown_texts), "text")
            notice(f"{texts} with no word that the model knows (the vector is 0); the first: {unknown_texts[0]!r:.100}")
        return encoder.stack([vectors[id(value)] for value in inputs])

    def _encode_tensor(self, encoder: ItemEncoder, inputs: Tensor) -> Tensor:
        """The vectors (B, Z) or (B, D) of a batch; see `encode`."""
        reader = encoder.modality
        if not isinstance(reader, TensorReader):
            raise UserError(f"{reader.name} takes raw values, not a tensor")
        if inputs.ndim == 0:
            raise UserError(f"the tensor cannot be read as {reader.name}: it is a single number")
        if len(inputs) == 0:
            return encoder.stack([])
        stem = reader.stem_spec()
        encoded = []
        for part in inputs.to(self.device).split(encoder.batch_size):
            try:
                tokens = reader.from_tensor(part)
                if stem.table and ((tokens.values < 0) | (tokens.values >= stem.values)).any():
                    raise ValueError(f"ids must be at least 0 and below {stem.values}, the size of the vocabulary")
            except (TypeError, ValueError) as error:
                is_one_input = inputs.ndim == len(reader.tensor_input(encoder.view).shape)
                hint = "; give one input as tensor[None]" if is_one_input else ""
                raise UserError(f"the tensor cannot be read as {reader.name}: {one_line(error)}{hint}") from None
            encoded.append(encoder.encode_tokens(tokens))
        return torch.cat(encoded)

    def item_encoder(
        self, modality: str, towards: str | None, batch_size: int, error_prefix: str, normalize: bool = True
    ) -> ItemEncoder:
        """The engine that encodes items of a modality. `error_prefix` begins messages; see `encode` for the other
        arguments.

        Raises:
            UserError: the model cannot compare the two modalities, or the view does not fit.
        """
        encoder = self.feature_encoder(modality, batch_size)
        towards = self.partner(modality) if towards is None else towards
        require_pair(self.imp, modality, towards, error_prefix)
        return replace(encoder, towards=towards, normalize=normalize)

    def feature_encoder(self, modality: str, batch_size: int) -> ItemEncoder:
        """The engine that makes the features (D,) of items, which classification heads read."""
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, found {batch_size}")
        reader = self._modality(modality)
        view = self.checked_view(modality)
        return ItemEncoder(self.imp, reader, view, None, self.precision, batch_size=batch_size, normalize=False)

    def checked_view(self, modality: str) -> Any:
        """The view of a modality, which the user may have changed. UserError if it does not fit."""
        view = checked(type(self.config.views[modality]), self.views[modality], f"views[{modality!r}]")
        try:
            self._modality(modality).check(view)
        except ValueError as error:
            raise UserError(f"views[{modality!r}]: {error}") from None
        return view

    def partner(self, modality: str) -> str:
        """The modality that `encode` compares `modality` with by default.

        The candidates are the modalities that training compared with `modality`, in the recipe's order. If there are
        none, the candidates are all modalities that share a space with `modality`, and last `modality` itself. Texts
        are compared with pictures, as users of open_clip expect, and everything else with texts, if these are among the
        candidates. Otherwise the first candidate is taken.
        """
        reads_text = self._modality(modality).reads_text
        others = [name for name in self.modalities if name != modality]
        candidates = [name for name in others if (min(name, modality), max(name, modality)) in self.imp.pairs]
        if not candidates:
            candidates = [name for name in [*others, modality] if self.imp.share_a_space(modality, name)]
        if not candidates:
            raise UserError(f"no task trains {modality} together with another modality, so it has no embedding")
        if reads_text:
            preferred = [name for name in candidates if name == "image"]
        else:
            preferred = [name for name in candidates if self.modalities[name].reads_text]
        return (preferred or candidates)[0]

    def save(self, folder: str | Path) -> None:
        """Writes the model to a new or empty folder, which `load` opens."""
        folder = Path(folder).expanduser()
        require_empty(folder)
        config = self.config.model_copy(update={"views": {name: self.checked_view(name) for name in self.views}})
        folder.mkdir(parents=True, exist_ok=True)
        recipe = self.saved_recipe.text
        save_model(folder, self.imp, config, self.modalities, recipe)
        if recipe and self.folder and trained_here(self.folder):
            record_training((folder / CONFIG).read_text(encoding="utf-8"), recipe)

    def save_pretrained(self, folder: str | Path) -> None:
        """`save`, as users of Hugging Face call it."""
        self.save(folder)

    def push_to_hub(
        self,
        name: str,
        private: bool = False,
        license: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Uploads the model with a model card to the Hugging Face Hub, as `openimp push` does.

        The card states the training and the results of the folder that the model was loaded from. If you have changed
        the weights since, it has no results; correct the rest before you upload.

        Args:
            name: the repository, OWNER/NAME. It is made if it does not exist.
            private: whether a new repository is private. If the repository exists and is public, nothing is uploaded.
            license: the Hub's identifier of the model's license, such as apache-2.0.
            revision: the branch, which is made if it does not exist. None: the main branch.
            token: a token of the Hub. None: the token of `hf auth login` or of HF_TOKEN.

        Returns:
            The URL of the repository.

        Raises:
            UserError: there is no login, the Hub refuses the upload, or the model was not opened by `load`.
        """
        from openimp.inference.publish import upload  # That module imports this one.

        return upload(self, name, private, license, revision=revision, token=token)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that trained the model. UserError if there is none, or if this version of openimp cannot read
        it."""
        return self.saved_recipe.validated()

    @property
    def classes(self) -> dict[str, list[Any]]:
        """The classes of each classification head."""
        return self.config.classes

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.imp.parameters()).device

    @property
    def preprocess(self) -> Callable[[Any], Tensor] | None:
        """Converts a Pillow picture to a tensor (3, H, W) for `encode`, as in open_clip. None if the model does not
        read pictures, or if a tower does."""
        for name, modality in self.modalities.items():
            if isinstance(modality, PictureReader):
                return Bound(modality.preprocess, view=self.checked_view(name))
        return None

    @property
    def tokenizer(self) -> Callable[[str | list[str]], Tensor] | None:
        """Converts texts to ids (B, L) for `encode`, as in open_clip. None if the model does not read texts, or if a
        tower does."""
        for name, modality in self.modalities.items():
            if isinstance(modality, TextReader):
                return Bound(modality.tokenize, length=self.checked_view(name).length)
        return None

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of the learned scale of the similarities of pictures and texts, as in open_clip."""
        if "image" not in self.modalities:
            raise UserError("the model does not read pictures; for another pair see imp.temperature")
        return self.similarity_scale("image", self.partner("image")).log()

    def similarity_scale(self, modality: str, other: str) -> Tensor:
        """The learned scale of the similarities of two modalities. UserError if no contrastive objective has one."""
        try:
            return self.imp.temperature(modality, other).scale
        except KeyError:
            raise UserError(f"no contrastive objective has learned a scale for {modality} and {other}") from None

    def __getattr__(self, name: str) -> Any:
        method, _, modality = name.partition("_")
        if method in METHODS and modality:
            self._modality(modality)  # An error if there is none.
            return Bound(getattr(self, method), modality)
        return super().__getattr__(name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(f"{method}_{name}" for method in METHODS for name in self.modalities)]

    def _modality(self, name: str) -> Modality:
        if name not in self.modalities:
            raise UnknownModality(f"the model has no modality {name!r}{nearest(name, self.modalities)}")
        return self.modalities[name]


def _as_list(inputs: Any) -> list[Any]:
    """One input or several as a list. Several may be in anything that can be iterated over, such as a pandas column."""
    if hasattr(inputs, "columns") or hasattr(inputs, "column_names"):
        raise UserError("an input is a table; give one of its columns, such as table['image']")
    if isinstance(inputs, np.ndarray):
        are_several = inputs.dtype.kind in "OU" and inputs.ndim > 0  # Numbers are one picture, clip or sound.
    else:
        is_one = isinstance(inputs, str | bytes | bytearray | memoryview | dict) or _is_open_file(inputs)
        are_several = isinstance(inputs, Iterable) and not is_one
    return [_unwrapped(value) for value in (inputs if are_several else [inputs])]


def _is_open_file(value: Any) -> bool:
    """Whether it is a file of bytes. The lines of a file of text are several inputs. A closed file is a UserError."""
    if not hasattr(value, "read"):
        return False
    if getattr(value, "closed", False):
        raise UserError("an input is a closed file; open it again, or give its path")
    return not isinstance(value, io.TextIOBase)


def _unwrapped(value: Any) -> Any:
    """An input without its wrapper: of an open file its bytes, of a pyarrow scalar its Python value, of a dictionary of
    `datasets` its bytes or path."""
    if hasattr(value, "as_py"):
        value = value.as_py()
    if _is_open_file(value):
        with suppress(AttributeError, OSError):  # A pipe, for example, can only be read from where it is.
            value.seek(0)
        return value.read()
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["bytes"] or value["path"] or value
    return value
