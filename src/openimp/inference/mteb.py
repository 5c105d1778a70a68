"""openimp's models in mteb (Massive Text Embedding Benchmark, arXiv 2210.07316; image tasks: arXiv 2504.10471)."""

from typing import Any, get_args

import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import Modalities
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from openimp.common.cache import stable_hash
from openimp.evaluation.provenance import checkpoint_fields
from openimp.inference.model import Model
from openimp.planning.plan import parameter_count


class MTEBEncoder(AbsEncoder):
    """Wraps a model for `mteb.evaluate`, for tasks on any modality that mteb and the model both have.

    openimp decodes the media, as in training. The embedding of an input with several modalities is the sum of their
    unit vectors, as for CLIP models in mteb.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        identity = [checkpoint_fields(model.imp, model.modalities), model.views, model.precision]
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"openimp/{model.config.name}",
                # mteb reuses cached results of the same name and revision.
                "revision": stable_hash(identity)[:16],
                "modalities": [name for name in model.modalities if name in get_args(Modalities)],
                "n_parameters": parameter_count(model),
                "embed_dim": model.imp.config.embed_dim,
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

    def encode(
        self, inputs: DataLoader[Any], *, task_metadata: Any, show_progress_bar: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """Encodes batches {modality: values, ...} to (N, Z) in fp32 on the CPU; N inputs, Z features per embedding."""
        batches = tqdm(_undecoded(inputs), disable=not show_progress_bar, desc="Encoding")
        return torch.cat([self._vectors(batch, task_metadata.modalities) for batch in batches]).cpu()

    def _vectors(self, batch: dict[str, Any], compared: list[str]) -> torch.Tensor:
        vectors = []
        for name in self.model.modalities:
            if name in batch:
                values = [_raw(value) for value in batch[name]]
                towards = self._towards(name, compared)
                vectors.append(self.model.encode(name, values, normalize=True, towards=towards))
        return torch.stack(vectors).sum(0)

    def _towards(self, name: str, compared: list[str]) -> str:
        """The modality of the task that `name` is compared with, or the model's default if there is no other."""
        partner = self.model.partner(name)
        others = [other for other in compared if other != name]
        return partner if partner in others or not others else others[0]


def _undecoded(inputs: DataLoader[Any]) -> DataLoader[Any]:
    """Returns a loader of the same batches with media as bytes or paths, because decoding them in `datasets` needs
    torchcodec and FFmpeg's shared libraries."""
    dataset: Any = inputs.dataset
    for column, feature in getattr(dataset, "features", {}).items():
        if hasattr(feature, "decode"):
            dataset = dataset.cast_column(column, type(feature)(decode=False))
    return DataLoader(dataset, batch_size=inputs.batch_size, collate_fn=inputs.collate_fn)


def _raw(value: Any) -> Any:
    if isinstance(value, dict):
        return value.get("bytes") or value.get("path")
    return value
