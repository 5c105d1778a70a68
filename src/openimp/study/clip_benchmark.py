"""Retrieval measured by CLIP_benchmark's own code, to compare openimp's evaluation with.

It needs `pip install openimp[peers]`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from openimp.common.errors import UserError, nearest
from openimp.common.modality import BadMedia
from openimp.data.sources import open_source
from openimp.data.tables import Table
from openimp.encoding.items import raw_values
from openimp.recipe.evaluation import Retrieval
from openimp.recipe.registry import modality_class
from openimp.recipe.schema import Recipe


def clip_benchmark_recalls(model: Any, recipe: Recipe, name: str, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recalls from `retrieval_recalls` on a retrieval set of a recipe.

    Equal pictures are one item with several texts, as in openimp. Equal texts stay different items, because
    CLIP_benchmark cannot express that they are one: if two pictures share a text, only one of them is correct for each
    copy of it, so recalls are lower than openimp's. Ties count for the model.

    The model is one of `openimp.load` or `load_two_towers`, and `name` a retrieval set of pictures and texts in the
    recipe.
    """
    from openimp.inference.clip_benchmark import retrieval_recalls  # It imports CLIP_benchmark, which is optional.

    options = require_pictures_and_texts(recipe, name)
    table = open_source(options.source, recipe.sources[options.source])
    sides = {model.modalities[side].reads_text: side for side in options.inputs}
    assert isinstance(table, Table)
    captions: dict[str, list[str]] = {}
    shown: dict[str, Any] = {}
    names = (sides[False], sides[True])
    values = (raw_values(table, model.modalities[side], options.inputs[side], range(len(table))) for side in names)
    for (key, picture), (_, text) in zip(*values):
        if not isinstance(picture, BadMedia) and not isinstance(text, BadMedia):
            shown[key] = picture
            captions.setdefault(key, []).append(str(text))
    fewer = min(len(shown), sum(map(len, captions.values())))
    if fewer < max(ks):
        raise UserError(f"evaluation.sets.{name}: CLIP_benchmark cannot look for {max(ks)} of {fewer}; give smaller ks")

    def batches() -> Iterator[tuple[Tensor, list[list[str]]]]:
        keys = list(shown)
        for start in range(0, len(keys), recipe.evaluation.batch_size):
            some = keys[start : start + recipe.evaluation.batch_size]
            yield torch.stack([model.preprocess(shown[key]) for key in some]), [captions[key] for key in some]

    return retrieval_recalls(model, batches(), ks)


def require_pictures_and_texts(recipe: Recipe, name: str) -> Retrieval:
    """The evaluation set of this name, which must be a retrieval set of pictures and texts."""
    options = recipe.evaluation.sets.get(name)
    if options is None:
        raise UserError(f"no evaluation set is called {name!r}{nearest(name, recipe.evaluation.sets)}")
    sides = {modality_class(side).reads_text: modality_class(side) for side in options.inputs}
    if not isinstance(options, Retrieval) or len(sides) < 2 or not hasattr(sides[False], "preprocess"):
        raise UserError(f"evaluation.sets.{name}: CLIP_benchmark takes pictures and their texts")
    return options
