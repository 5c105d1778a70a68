"""Where a result comes from: two equal evaluations write equal results, and two different ones show the difference."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch

from openimp.common.cache import stable_hash
from openimp.common.modality import Modalities
from openimp.common.protocols import learned_files
from openimp.common.versions import library_version, openimp_version
from openimp.data.sources import open_source
from openimp.data.tables import Table
from openimp.evaluation.evaluator import MAX_NAMED_ROWS, ReadableRows
from openimp.model.embedder import Embedder
from openimp.parallel.layout import weights_hash
from openimp.recipe.evaluation import EvaluationSet, ZeroShot
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Source


def checkpoint_fields(model: Embedder, modalities: Modalities) -> dict[str, Any]:
    """A hash of the model's weights and of what its modalities learned, and the version of openimp."""
    total = weights_hash(model)
    for modality in modalities.values():
        total.update(repr(sorted(learned_files([modality]).items())).encode())
    return {"checkpoint": total.hexdigest()[:16], "openimp": openimp_version()}


def data_fields(recipe: Recipe, table: Table, readable: ReadableRows) -> dict[str, Any]:
    """Which rows were evaluated, and which could not be read.

    The source's fingerprint does not cover the files that a manifest names; `data_hash` covers all that was read.
    """
    source = recipe.sources[table.name]
    return {
        "skipped": len(readable.skipped),
        "skipped_rows": readable.skipped[:MAX_NAMED_ROWS],
        "source": table.name,
        "split": source.split if source.hub else None,
        "where": source.where,
        "fingerprint": table.fingerprint,
        "data_hash": readable.content,
    }


def trained_field(
    training_sources: Mapping[str, Source], recipe: Recipe, table: Table, readable: ReadableRows
) -> dict[str, int]:
    """How many of the evaluated rows are rows of training.

    Empty if that is unknown: a source of training is a stream of the same data, or it has the same name but other data,
    perhaps because the data has moved.
    """
    source = recipe.sources[table.name]
    of_equal_data = {name: trained for name, trained in training_sources.items() if trained.data == source.data}
    if any(trained.selection == source.selection for trained in of_equal_data.values()):
        return {"trained": len(readable.row)}
    may_have_moved = table.name in training_sources and table.name not in of_equal_data
    if may_have_moved or any(trained.stream for trained in of_equal_data.values()):
        return {}
    evaluated_rows = table.stored_rows(readable.row)
    is_trained = np.zeros(len(evaluated_rows), dtype=bool)
    for name, trained in of_equal_data.items():
        if trained.part and source.part and trained.part.is_disjoint(source.part):
            continue  # Without this, each evaluation of a held-out part would open the source of training again.
        training_table = cast(Table, open_source(name, trained))
        is_trained |= np.isin(evaluated_rows, training_table.stored_rows(np.arange(len(training_table))))
    return {"trained": int(is_trained.sum())}


def how_fields(recipe: Recipe, modalities: Modalities, options: EvaluationSet, precision: str) -> dict[str, Any]:
    """Views, prompts, precision, and the libraries that decoded the media.

    `prompts_version` is a hash of everything that decides on the texts: templates, prompts and class names.
    """
    views = {name: options.view[name] for name in options.inputs}
    wording: list[Any] = [spec.columns for name, spec in options.inputs.items() if modalities[name].reads_text]
    prompts = None
    if isinstance(options, ZeroShot):
        views[options.reader] = recipe.inference_view(options.reader)
        prompts = options.prompts
        wording += [prompts, options.classes, *(["words"] if options.words else [])]
    return {
        "prompts": prompts,
        "prompts_version": stable_hash(wording)[:8] if wording else None,
        "view": {name: view.model_dump(mode="json") for name, view in views.items()},
        "precision": precision,
        **software_fields(modalities, views),
    }


def software_fields(modalities: Modalities, used: Iterable[str]) -> dict[str, Any]:
    """The versions of torch, and of the libraries that decode the `used` modalities."""
    decoders = [library for name in used for library in modalities[name].decoders]
    # A library that is not installed is null: a modality from another package may name any.
    return {"torch": torch.__version__, "decoders": {library: library_version(library) for library in decoders}}
