"""What a result says of how it came about: two results of the same thing are equal, and of two others one sees why."""

import hashlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from openimp.common.modality import Modality
from openimp.common.versions import openimp_version
from openimp.data.files import stable_hash
from openimp.data.tables import Table
from openimp.evaluation.figures import Readable
from openimp.model.embedder import Embedder
from openimp.recipe.schema import Recipe


def checkpoint_fields(model: Embedder, modalities: dict[str, Modality]) -> dict[str, Any]:
    """What was measured, by what: a name of 16 digits for the model's tensors and for what its modalities learned, and
    the version of openimp."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).cpu().numpy())
    for modality in modalities.values():
        total.update(repr(sorted(modality.state().items())).encode())
    return {"checkpoint": total.hexdigest()[:16], "openimp": openimp_version()}


def data_fields(recipe: Recipe, table: Table, counted: Readable) -> dict[str, Any]:
    """Which rows were measured: the source, what the recipe takes of it, its fingerprint, and the name of their values.

    The fingerprint is quick and leaves out what a manifest's files hold; `measured` is made of all that was read.
    """
    source = recipe.sources[table.name]
    return {
        "source": table.name,
        "split": source.split if source.hub else None,
        "where": source.where,
        "fingerprint": table.fingerprint,
        "measured": counted.content,
    }


def how_fields(
    views: dict[str, Any],
    modalities: dict[str, Modality],
    prompts: list[str] | None,
    wording: list[Any],
    precision: str,
) -> dict[str, Any]:
    """How it was seen: views, the libraries that decoded it, prompts, and the precision of the forward pass.

    Args:
        views: by modality, all that took part.
        modalities: by name.
        prompts: of zero-shot classification.
        wording: whatever decides on the texts: prompts, names of classes, templates; empty if there are none.
        precision: that was computed in, "bf16" or "fp32".
    """
    return {
        "prompts": prompts,
        "prompts_version": stable_hash(wording)[:8] if wording else None,
        "view": {name: view.model_dump(mode="json") for name, view in views.items()},
        "precision": precision,
        "torch": torch.__version__,
        "decoders": _versions(library for name in views for library in modalities[name].decoders),
    }


def _versions(libraries: Iterable[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # a modality from outside may name anything
            found[library] = None
    return found
