"""Evaluation: zero-shot classification, class heads, retrieval and probes, as a recipe's `evaluation.sets` ask."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from openimp.common.device import precision_of
from openimp.common.errors import UserError, nearest
from openimp.common.modality import Modality
from openimp.data.sources import open_source
from openimp.data.tables import Table
from openimp.encoding.items import Progress, first_view
from openimp.evaluation import class_head, probe, provenance, retrieval, zero_shot
from openimp.evaluation.classes import Classified, MultiLabel
from openimp.evaluation.figures import skipped_fields, table
from openimp.evaluation.probe import Probed
from openimp.evaluation.retrieval import Retrieved
from openimp.model.embedder import Embedder
from openimp.recipe.evaluation import ClassHead, Probe, ZeroShot
from openimp.recipe.schema import Recipe


@dataclass(frozen=True)
class Measured:
    """One evaluation set of a model.

    Attributes:
        results: what `evaluate` tells of it.
        found: what that was computed from: both directions of a retrieval set, the one of a zero-shot set or of a class
            head, or both classifiers of a probe.
    """

    results: list[dict[str, Any]]
    found: list[Retrieved] | list[Classified | MultiLabel] | list[Probed]


def evaluate(
    model: Embedder,
    recipe: Recipe,
    modalities: dict[str, Modality],
    sets: Iterable[str] | None = None,
    step: int | None = None,
    progress: Progress | None = None,
    classes: Mapping[str, list[Any]] | None = None,
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
        classes: of each of the model's class heads.

    Returns:
        One dict of JSON values for each direction of a retrieval set, each classifier of a probe, and each other set.
        Shares are between 0 and 1. Rows that cannot be read are left out, counted in `skipped` and named in
        `skipped_rows`.

    Raises:
        UserError: an unknown set, a source or column that is not there, a class without text, one that a head does not
            know, a pair of modalities that was never trained together, or what a probe cannot be fitted to.
    """
    tables = open_sets(model, recipe, modalities, sets, classes)
    measured = [measure(model, recipe, modalities, name, tables[name], step, progress, classes) for name in tables]
    by = provenance.checkpoint_fields(model, modalities)
    return [result | by for one in measured for result in one.results]


def open_sets(
    model: Embedder,
    recipe: Recipe,
    modalities: dict[str, Modality],
    sets: Iterable[str] | None = None,
    classes: Mapping[str, list[Any]] | None = None,
) -> dict[str, dict[str, Table]]:
    """Opens the sources of evaluation sets, and finds what would stop `evaluate`: before a training, not after it.

    Returns:
        By set, its sources by name.

    Raises:
        UserError: as `evaluate`.
    """
    tables = {}
    for name in recipe.evaluation.sets if sets is None else sets:
        if name not in recipe.evaluation.sets:
            raise UserError(f"no evaluation set is called {name!r}{nearest(name, recipe.evaluation.sets)}")
        options, where = recipe.evaluation.sets[name], f"evaluation.sets.{name}"
        source = _open(recipe, name, options.source)
        tables[name] = {options.source: source}
        if isinstance(options, Probe):
            tables[name][options.train] = train = _open(recipe, name, options.train)
            probe.check(modalities, options, where, source, train)
        elif isinstance(options, ZeroShot):
            zero_shot.check(model, modalities, options, where, source)
        elif isinstance(options, ClassHead):
            class_head.check(recipe, modalities, options, where, source, classes or {})
        else:
            retrieval.check(model, modalities, options, where, source)
    return tables


def measure(
    model: Embedder,
    recipe: Recipe,
    modalities: dict[str, Modality],
    name: str,
    sources: dict[str, Table],
    step: int | None = None,
    progress: Progress | None = None,
    classes: Mapping[str, list[Any]] | None = None,
) -> Measured:
    """Measures the model on one set, whose sources `open_sets` gave; `evaluate` adds what names the model."""
    options = recipe.evaluation.sets[name]
    source = sources[options.source]
    views = {side: options.view[side] for side in options.inputs}
    prompts: list[str] | None = None
    wording: list[Any] = [spec.columns for side, spec in options.inputs.items() if modalities[side].reads_text]
    shown = None if progress is None else _labelled(progress, name)
    more: dict[str, Any] = {}
    found: list[Retrieved] | list[Classified | MultiLabel] | list[Probed]
    training = model.training
    precision = precision_of(next(model.parameters()).device, recipe.train.precision)
    model.eval()
    try:
        if isinstance(options, Probe):
            train = sources[options.train]
            found, counted, learned = probe.probe(model, recipe, modalities, name, source, train, shown)
            read = {"n": len(learned.row), **skipped_fields(learned.skipped)}
            more = {"train": read | provenance.data_fields(recipe, train, learned)}
        elif isinstance(options, ZeroShot):
            classified, counted = zero_shot.classify(model, recipe, modalities, name, source, shown)
            found = [classified]
            views[options.reader] = first_view(recipe, options.reader)
            prompts, wording = options.prompts, [*wording, options.prompts, options.classes]
            wording += ["words"] if options.words else []
        elif isinstance(options, ClassHead):
            classified, counted = class_head.classify(model, recipe, modalities, name, source, classes or {}, shown)
            found = [classified]
        else:
            found, counted = retrieval.retrieve(model, recipe, modalities, name, source, shown)
    finally:
        model.train(training)
    results = [
        {
            "set": name,
            "type": options.type,
            "step": step,
            "task": item.task,
            **item.figures(),
            **skipped_fields(counted.skipped),
            **provenance.data_fields(recipe, source, counted),
            **more,
            **provenance.how_fields(views, modalities, prompts, wording, precision),
        }
        for item in found
    ]
    return Measured(results, found)


def _open(recipe: Recipe, name: str, wanted: str) -> Table:
    source = open_source(wanted, recipe.sources[wanted])
    if not isinstance(source, Table):
        raise UserError(
            f"evaluation.sets.{name}: source {wanted} is streamed, but evaluation reads all of it; drop stream"
        )
    return source


def _labelled(progress: Progress, name: str) -> Progress:
    return lambda items, description: progress(items, f"{name}: {description}")


__all__ = ["Classified", "Measured", "MultiLabel", "Retrieved", "evaluate", "measure", "open_sets", "table"]
