"""openimp's models as SentenceTransformer, the class of the library sentence-transformers.

Shape suffixes: B inputs, Z features of the shared embedding space.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from openimp.common.device import Precision
from openimp.common.errors import UserError
from openimp.common.versions import require_library
from openimp.inference.files import modality_by_extension
from openimp.inference.model import Model, load

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def sentence_transformer(
    path: str | Path, device: str | torch.device | None = None, precision: Precision = "auto"
) -> "SentenceTransformer":
    """Opens a trained model as a SentenceTransformer, for libraries that take one.

    Its `encode` takes texts and media, also mixed in one list, and returns the vectors of `Model.encode`. The library's
    rules decide what an input is. A string is a file if a file of that name exists and has a usual extension of a
    picture, clip or sound, else it is a text. Arrays of 1 or 2 axes are sounds, of 3 axes pictures, of 4 axes clips.
    Besides, it takes `pathlib.Path`, and {MODALITY: value} where the rules would be wrong. It also takes the argument
    `towards` of `Model.encode`. It can neither be trained nor saved; `Model.save` saves the model.

    Args:
        path: a run, a checkpoint, a model's folder or a model on the Hugging Face Hub, as `openimp.load` takes it.
        device: see `openimp.load`.
        precision: see `openimp.load`.

    Raises:
        UserError: sentence-transformers is not installed, or the model cannot be opened.
    """
    require_library("sentence_transformers", "sentence-transformers")
    from sentence_transformers import SentenceTransformer

    model = load(path, device, precision)
    return SentenceTransformer(modules=[AnyModality(model)], device=str(model.device), similarity_fn_name="cosine")


class AnyModality(nn.Module):
    """The only module of the SentenceTransformer: it encodes a batch whose inputs may be of different modalities."""

    forward_kwargs: ClassVar[set[str]] = {"towards"}  # what the library hands from `encode` to `forward`

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        media = {name: modality for name, modality in model.modalities.items() if not modality.reads_text}
        self.modality_of = modality_by_extension(media)

    @property
    def modalities(self) -> list[str]:
        """The modalities of the model, and "message", because otherwise the library refuses mixed batches."""
        return [*self.model.modalities, "message"]

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Raises UserError: the library could not load the module again."""
        raise UserError("a SentenceTransformer cannot save a model of openimp; use openimp.load(...).save(FOLDER)")

    def get_embedding_dimension(self) -> int:
        return self.model.imp.config.embed_dim

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Finds the modality of each input, and puts the prompt before texts."""
        names = []
        values = []
        for value in inputs:
            name, encodable = self._typed(value)
            if prompt and self.model.modalities[name].reads_text:
                encodable = prompt + encodable
            names.append(name)
            values.append(encodable)
        return {"names": names, "values": values}

    def forward(self, features: dict[str, Any], towards: str | None = None) -> dict[str, Any]:
        """Adds `sentence_embedding` (B, Z)."""
        names = features["names"]
        values = features["values"]
        z_BZ = torch.empty(len(names), self.get_embedding_dimension(), device=self.model.device)
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            z_BZ[rows] = self.model.encode(name, [values[row] for row in rows], towards=towards)
        return {**features, "sentence_embedding": z_BZ}

    def _typed(self, value: Any) -> tuple[str, Any]:
        """The name of an input's modality, and the input as `Model.encode` takes it."""
        from sentence_transformers.base.modality import infer_modality

        supported: list[Any] = list(self.model.modalities)
        if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in self.model.modalities:
            ((name, value),) = value.items()
        elif isinstance(value, Path) or (isinstance(value, str) and self._names_file(value)):
            extension = Path(value).suffix.lower()
            if extension not in self.modality_of:
                raise UserError(f"{value}: the model reads no {extension} files; use {{MODALITY: path}}")
            name = self.modality_of[extension]
        else:
            try:
                name = infer_modality(value, supported_modalities=supported)
            except ValueError as error:
                raise UserError(str(error)) from None
        if name not in self.model.modalities:
            kind = " and ".join(name) if isinstance(name, tuple) else name
            raise UserError(f"an input is {kind}, but the model encodes one of {', '.join(self.model.modalities)}")
        if isinstance(value, dict) and "video_metadata" in value:
            value = value["array"]
        if isinstance(value, Tensor):
            value = value.cpu().numpy()
        return name, value

    def _names_file(self, text: str) -> bool:
        """Whether it is a file of media. The library knows fewer extensions, and takes other names for texts."""
        return Path(text).suffix.lower() in self.modality_of and os.path.isfile(text)
