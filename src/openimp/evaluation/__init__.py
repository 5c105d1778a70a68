"""Evaluation: zero-shot classification and retrieval, as a recipe's `evaluation.sets` ask for them."""

from collections.abc import Iterable
from typing import Any

from openimp.data.sources import Table, open_source
from openimp.errors import UserError, nearest
from openimp.evaluation import retrieval, zero_shot
from openimp.evaluation.encoding import Progress, first_view
from openimp.evaluation.figures import skipped_fields, table
from openimp.modalities import Modality
from openimp.model.embedder import Embedder
from openimp.recipe import Recipe, Retrieval, ZeroShot


def evaluate(
    model: Embedder,
    recipe: Recipe,
    modalities: dict[str, Modality],
    sets: Iterable[str] | None = None,
    step: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measures the model on evaluation sets of the recipe; the same model and data give the same figures.

    It computes where the model is, in the precision of training, and leaves the model in the mode it was in.

    Args:
        model: any state; averaged weights are the caller's to put in.
        recipe: what to measure, and in which views.
        modalities: an instance for each modality of the recipe, fitted.
        sets: names of `recipe.evaluation.sets`; left out: all of them.
        step: the training step, to be recorded.
        progress: wraps an iterable to show its progress, `progress(iterable, description)`.

    Returns:
        One flat dict of JSON values for each figure direction: a retrieval set has two, a zero-shot set one. Shares are
        between 0 and 1. Rows that cannot be read are left out, counted in `skipped` and named in `skipped_rows`.

    Raises:
        UserError: an unknown set, a source or column that is not there, a class without text, or a pair of
            modalities that was never trained together.
    """
    tables = open_sets(model, recipe, modalities, sets)
    training = model.training
    model.eval()
    try:
        results = []
        for name, source in tables.items():
            shown = None if progress is None else _labelled(progress, name)
            results += _measure(model, recipe, modalities, name, source, step, shown)
        return results
    finally:
        model.train(training)


def open_sets(
    model: Embedder, recipe: Recipe, modalities: dict[str, Modality], sets: Iterable[str] | None = None
) -> dict[str, Table]:
    """Opens the sources of evaluation sets, and finds what would stop `evaluate`: before a training, not after it.

    Raises:
        UserError: as `evaluate`.
    """
    tables = {}
    for name in recipe.evaluation.sets if sets is None else sets:
        if name not in recipe.evaluation.sets:
            raise UserError(f"no evaluation set is called {name!r}{nearest(name, recipe.evaluation.sets)}")
        options, where = recipe.evaluation.sets[name], f"evaluation.sets.{name}"
        tables[name] = source = _open(recipe, name)
        if isinstance(options, ZeroShot):
            zero_shot.check(model, modalities, options, where, source)
        else:
            retrieval.check(model, modalities, options, where, source)
    return tables


def _measure(
    model: Embedder,
    recipe: Recipe,
    modalities: dict[str, Modality],
    name: str,
    source: Table,
    step: int | None,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """The results of one set."""
    options = recipe.evaluation.sets[name]
    views = {side: options.view[side] for side in options.inputs}
    if isinstance(options, ZeroShot):
        classified, skipped = zero_shot.classify(model, recipe, modalities, name, source, progress)
        (seen,) = options.inputs
        views[options.reader] = first_view(recipe, options.reader)
        figures = [{"task": f"{seen} -> {options.label}", **classified.figures(), "prompts": options.prompts}]
    else:
        found, skipped = retrieval.retrieve(model, recipe, modalities, name, source, progress)
        figures = [{"task": f"{item.query} -> {item.target}", **item.figures(), "prompts": None} for item in found]
    return [
        {
            "set": name,
            "type": options.type,
            "step": step,
            **figure,
            **skipped_fields(skipped),
            "source": options.source,
            "fingerprint": source.fingerprint,
            "view": {side: view.model_dump(mode="json") for side, view in views.items()},
        }
        for figure in figures
    ]


def _open(recipe: Recipe, name: str) -> Table:
    options: Retrieval | ZeroShot = recipe.evaluation.sets[name]
    source = open_source(options.source, recipe.sources[options.source])
    if not isinstance(source, Table):
        raise UserError(
            f"evaluation.sets.{name}: source {options.source} is streamed, but evaluation reads all of it; drop stream"
        )
    return source


def _labelled(progress: Progress, name: str) -> Progress:
    return lambda items, description: progress(items, f"{name}: {description}")


__all__ = ["evaluate", "open_sets", "table"]
