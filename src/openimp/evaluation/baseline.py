"""Accuracies without an encoder, which show what training gained: chance, the most frequent class, raw features."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from openimp.common.modality import BadMedia
from openimp.common.progress import track
from openimp.common.protocols import Comparable
from openimp.common.schema import as_text
from openimp.data.sources import open_source
from openimp.data.tables import Table, Unreadable
from openimp.encoding.items import raw_values
from openimp.evaluation.probe import nearest_neighbors
from openimp.evaluation.results import main_metric, percent
from openimp.recipe.evaluation import ClassHead, ZeroShot
from openimp.recipe.schema import Recipe

TRAINING_ROWS = 2000
"""Most rows among which neighbors are looked for."""
TEST_ROWS = 1000
"""Most rows that are classified."""
NEIGHBORS = 20
WAYS = {"zero_shot": "by the names of the classes", "classification": "by the classification head"}


class RawRows(NamedTuple):
    """Rows whose media and class could be read."""

    features: np.ndarray  # (N, D)
    features_name: str
    classes: list[str]


def comparison(recipe: Recipe, results: list[dict[str, Any]], task: str) -> list[str]:
    """Two lines about a task of a recipe that `openimp init` wrote: accuracies without an encoder, and after training.

    Only one line if no rows are held out, and none if the task has no classes. `results` are the results of the run.
    """
    sets = {name: recipe.evaluation.sets.get(name) for name in (task, f"{task}_classes")}
    labelled = {name: options for name, options in sets.items() if isinstance(options, ZeroShot | ClassHead)}
    training_source = recipe.tasks[task].source
    if not labelled:
        return []
    if any(options.source == training_source for options in labelled.values()):
        return [f"{task} without an encoder: not measured, because no rows are held out"]
    options = next(iter(labelled.values()))
    known = _read(recipe, training_source, options, TRAINING_ROWS)
    tested = _read(recipe, options.source, options, TEST_ROWS)
    if known is None or tested is None:
        return []
    measured = [result for result in results if result["set"] in labelled]
    # The names of classes are those of the held-out rows. With few rows, they may be fewer than all classes.
    count = max([len({*known.classes, *tested.classes}), *(result["candidates"] for result in measured)])
    trained = []
    for result in measured:
        of_fewer = f" (among {result['candidates']} of them)" if result["candidates"] < count else ""
        trained.append(f"{percent(main_metric(result))} % {WAYS[result['type']]}{of_fewer}")
    baselines = _baselines(known, tested, count)
    return [f"{task} without an encoder: {baselines}", f"{task} trained: {', '.join(trained)}"]


def _baselines(known: RawRows, tested: RawRows, class_count: int) -> str:
    classes = sorted({*known.classes, *tested.classes})
    number_of = {name: number for number, name in enumerate(classes)}
    known_N = np.array([number_of[name] for name in known.classes])
    tested_N = np.array([number_of[name] for name in tested.classes])
    most_frequent = number_of[Counter(known.classes).most_common(1)[0][0]]
    neighbors = min(NEIGHBORS, len(known_N))
    predicted_N = nearest_neighbors(known.features, known_N, tested.features, neighbors)
    shares = {
        "by chance": 1 / class_count,
        "with the most frequent class": np.mean(tested_N == most_frequent),
        f"by the {neighbors} nearest neighbors of {known.features_name}": np.mean(tested_N == predicted_N),
    }
    return ", ".join(f"{percent(float(share))} % {way}" for way, share in shares.items())


def _read(recipe: Recipe, source: str, options: ZeroShot | ClassHead, limit: int) -> RawRows | None:
    """At most `limit` evenly spaced rows of a source. None if none can be read, or its media cannot be compared."""
    ((name, spec),) = options.inputs.items()
    modality = recipe.make_modalities()[name]
    table = open_source(source, recipe.sources[source])
    if not isinstance(modality, Comparable) or not isinstance(table, Table):
        return None
    view = options.view[name]
    count = min(limit, len(table))
    numbers = [number * len(table) // count for number in range(count)]
    labels = table.column(options.label)
    features = []
    classes = []
    values = raw_values(table, modality, spec, numbers, lambda items, _: track(items, f"{source}: raw features"))
    for (_, value), number in zip(values, numbers):
        label = labels[number]
        if isinstance(value, BadMedia) or isinstance(label, Unreadable | list | None):
            continue
        try:
            features.append(modality.raw_features(modality.decode(value, [view]), view))
        except BadMedia:
            continue
        classes.append(as_text(label))
    return RawRows(np.stack(features), modality.raw_features_name, classes) if classes else None
