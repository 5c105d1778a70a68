"""Evaluates a model on the evaluation sets of a recipe."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from openimp.common.device import precision_of
from openimp.common.errors import UserError, nearest
from openimp.common.modality import Classes, Modalities
from openimp.common.progress import Progress
from openimp.data.readable import require_readable
from openimp.data.sources import open_source
from openimp.data.tables import Table
from openimp.encoding.items import require_columns, require_pair
from openimp.evaluation import classification, probe, retrieval
from openimp.evaluation.evaluator import Evaluator, Predicted
from openimp.evaluation.provenance import checkpoint_fields, data_fields, how_fields, trained_field
from openimp.model.embedder import Embedder
from openimp.parallel.distributed import run_on_all_ranks, run_on_rank_zero
from openimp.recipe.evaluation import EvaluationSet, Probe, Retrieval
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Source


class NotMeasured(UserError):
    """Some evaluation sets could not be measured. There is one sentence per set. `results` has the other sets."""

    def __init__(self, reasons: list[str], results: list[dict[str, Any]]) -> None:
        super().__init__("\n".join(reasons))
        self.results = results


def evaluate(
    model: Embedder,
    recipe: Recipe,
    modalities: Modalities,
    sets: Iterable[str] | None = None,
    step: int | None = None,
    progress: Progress | None = None,
    classes: Classes | None = None,
    watch: Progress | None = None,
    tables: dict[str, Table] | None = None,
    training_sources: Mapping[str, Source] | None = None,
) -> list[dict[str, Any]]:
    """Measures a model on evaluation sets of a recipe. The same model and data give the same results.

    All ranks call this together and get the same results.

    Args:
        model, recipe, modalities, classes, progress, watch, tables, training_sources: see `Evaluator`.
        sets: names of evaluation sets. None: all of them.
        step: the training step, for the results.

    Returns:
        A dict of JSON values for each direction of a retrieval set, each classifier of a probe, and each other set.
        Shares are between 0 and 1. Rows that cannot be read are left out; `skipped` lists them.

    Raises:
        UserError: there is no evaluation set of such a name.
        NotMeasured: a set cannot be measured. The others are measured before.
    """
    evaluator = Evaluator(
        model,
        recipe,
        modalities,
        classes or {},
        progress=progress,
        watch=watch,
        tables=tables or {},
        training_sources=training_sources,
    )
    names = list(recipe.evaluation.sets if sets is None else sets)
    check_names(names, recipe.evaluation.sets)
    reasons = []
    results = []
    for name in names:
        try:
            results += measure(evaluator, name, step)[0]
        except UserError as error:
            error_prefix = f"evaluation.sets.{name}"
            reasons.append(str(error) if error_prefix in str(error) else f"{error_prefix}: {error}")
    provenance = checkpoint_fields(model, modalities)
    results = [result | provenance for result in results]
    if reasons:
        raise NotMeasured(reasons, results)
    return results


def check_names(names: Iterable[str], known: Collection[str]) -> None:
    """Raises UserError for a name that none of the `known` evaluation sets has."""
    for name in names:
        if name not in known:
            raise UserError(f"no evaluation set is called {name!r}{nearest(name, known)}")


def check_sets(model: Embedder, recipe: Recipe, modalities: Modalities, classes: Classes) -> dict[str, Table]:
    """Raises the UserError that would stop an evaluation set, before training instead of after it.

    Returns the opened sources. Opening a table of a million rows again for each evaluation would take seconds.
    """
    evaluator = Evaluator(model, recipe, modalities, classes)
    for name, options in recipe.evaluation.sets.items():
        _open_set(evaluator, name)
        for source in _sources(options):
            table = evaluator.tables[source]
            for modality, spec in options.inputs.items():
                require_readable(table, modalities[modality], spec, options.view[modality], f"evaluation.sets.{name}")
    return evaluator.tables


def _open_set(evaluator: Evaluator, name: str) -> None:
    """Opens the sources of an evaluation set into `evaluator.tables`, and checks them."""
    error_prefix = f"evaluation.sets.{name}"
    options = evaluator.recipe.evaluation.sets[name]
    tables = evaluator.tables
    for source in _sources(options):
        if source not in tables:
            table = open_source(source, evaluator.recipe.sources[source])
            if not isinstance(table, Table):
                raise UserError(f"{error_prefix}: source {source} is streamed, but evaluation needs a table; name one")
            tables[source] = table
        for modality, spec in options.inputs.items():
            require_columns(tables[source], evaluator.modalities[modality], spec, error_prefix)
    if isinstance(options, Probe):
        probe.check(options, error_prefix, tables)
    elif isinstance(options, Retrieval):
        a, b = options.inputs
        require_pair(evaluator.model, a, b, error_prefix)
    else:
        classification.read_labels(evaluator, options, error_prefix, tables[options.source])


def _sources(options: EvaluationSet) -> list[str]:
    return [options.source, options.train] if isinstance(options, Probe) else [options.source]


def measure(
    evaluator: Evaluator, name: str, step: int | None = None
) -> tuple[list[dict[str, Any]], Sequence[Predicted]]:
    """Measures the model on an evaluation set, in the precision of training. `evaluator.tables` gets its sources.

    Returns the results, and what they were computed from: both directions of retrieval, both classifiers of a probe, or
    the predictions of another set. If too few rows can be read, that is a UserError.
    """
    run_on_all_ranks(lambda: _open_set(evaluator, name))
    recipe = evaluator.recipe
    model = evaluator.model
    tables = evaluator.tables
    error_prefix = f"evaluation.sets.{name}"
    options = recipe.evaluation.sets[name]
    table = tables[options.source]
    train_fields = {}
    predictions: Sequence[Predicted]
    if (progress := evaluator.progress) is not None:
        evaluator = replace(evaluator, progress=lambda items, description: progress(items, f"{name}: {description}"))
    was_training = model.training
    model.eval()
    try:
        if isinstance(options, Probe):
            predictions, readable, train_rows = probe.probe(evaluator, options, error_prefix)
            fields = data_fields(recipe, tables[options.train], train_rows)
            train_fields = {"train": {"n": len(train_rows.row), **fields}}
        elif isinstance(options, Retrieval):
            predictions, readable = retrieval.retrieve(evaluator, options, error_prefix, table)
        else:
            classified, readable = classification.classify(evaluator, options, error_prefix, table)
            predictions = [classified]
    finally:
        model.train(was_training)
    precision = precision_of(next(model.parameters()).device, recipe.train.precision)
    about = data_fields(recipe, table, readable) | train_fields
    about |= how_fields(recipe, evaluator.modalities, options, precision)
    training_sources = recipe.training_sources if evaluator.training_sources is None else evaluator.training_sources
    about |= run_on_rank_zero(lambda: trained_field(training_sources, recipe, table, readable))
    kind = {"set": name, "type": options.type, "step": step}
    return [{**kind, "task": predicted.task, **predicted.metrics(), **about} for predicted in predictions], predictions
