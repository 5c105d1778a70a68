"""mteb's published tasks, measured by mteb itself.

mteb reports accuracies and scores, not the answers behind them. So intervals and chance are given where they follow
from a score and the numbers of queries and candidates: in zero-shot classification and in retrieval.
"""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import mteb
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval, AbsTaskZeroShotClassification
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.types import PromptType
from scipy.stats import ConstantInputWarning
from sklearn.exceptions import UndefinedMetricWarning

from openimp.common.device import precision_of
from openimp.common.errors import UserError, one_line
from openimp.evaluation.evaluate import NotMeasured
from openimp.evaluation.metrics import share_interval
from openimp.evaluation.provenance import checkpoint_fields, software_fields
from openimp.inference.model import Model
from openimp.inference.mteb import MTEBEncoder

NOTES = {
    "CIFAR100ZeroShot": "one prompt per class",
    "ESC50_Zeroshot": "one prompt per class, and underscores in the names of classes",
    "HMDB51ZeroShot": "one of three test splits, and one prompt per class",
    "Imagenet1kZeroShot": "one prompt per class, with a line break after the name of the class",
    "Kinetics400ZeroShot": "at most 10 clips per class, and one prompt per class",
    "Kinetics600VZeroShot": "about 16 clips per class, and one prompt per class",
    "Kinetics700VZeroShot": "about 16 clips per class, and one prompt per class",
    "UCF101VideoZeroShotClassification": "51 of 101 classes, one of three test splits, and one prompt per class",
    "UCF101ZeroShot": "single frames instead of clips, and one prompt per class",
}
"""How mteb's version of a benchmark in the IMP paper differs from the paper's, according to the tasks in mteb 2.26."""


def find_tasks(names: Sequence[str], modalities: Collection[str]) -> tuple[list[AbsTask], list[str]]:
    """The named tasks and the tasks of the named benchmarks, each once.

    If the model lacks a modality that a task of a benchmark or of an aggregate needs, the task is left out; the second
    value names such tasks in one sentence per name. If no task is left, that is a UserError, and so is an unknown name.
    """
    chosen_tasks: dict[str, AbsTask] = {}
    left_out = []
    for name in names:
        tasks: list[AbsTask] = []
        for task in _tasks_called(name):
            # The tasks of an aggregate replace it, because it reports only their mean.
            tasks += task.tasks if isinstance(task, AbsTaskAggregate) else [task]
        fitting = {task.metadata.name: task for task in tasks if set(task.metadata.modalities) <= set(modalities)}
        if not fitting:
            needed = {modality for task in tasks for modality in task.metadata.modalities}
            missing = ", ".join(sorted(needed - set(modalities)))
            raise UserError(f"{name} needs {missing}, but the model has {', '.join(modalities)}")
        chosen_tasks |= fitting
        other_names = [task.metadata.name for task in tasks if task.metadata.name not in fitting]
        if other_names:
            left_out.append(f"Left out of {name}, because the model lacks a modality: {', '.join(other_names)}")
    return list(chosen_tasks.values()), left_out


def _tasks_called(name: str) -> Iterable[AbsTask]:
    """The tasks of a benchmark, or the task of this name."""
    with suppress(KeyError):
        return mteb.get_benchmark(name).tasks
    try:
        return [mteb.get_task(name)]
    except KeyError as error:
        reason = str(error.args[0]).removeprefix("KeyError: ")
        raise UserError(f"mteb has no benchmark called {name!r}, and no task: {reason}") from None


def measure(model: Model, step: int | None, tasks: Iterable[AbsTask]) -> Iterator[dict[str, Any]]:
    """Yields results in the format of `evaluate`, each as soon as it is known, because a benchmark can take hours.

    Tasks that cannot be measured are named in one NotMeasured after the results of the others.
    """
    encoder = MTEBEncoder(model)
    batch_size = model.recipe.evaluation.batch_size  # Before any data is loaded: without a recipe, a UserError.
    provenance = {
        "view": {name: view.model_dump(mode="json") for name, view in model.views.items()},
        "precision": precision_of(model.device, model.precision),
        **software_fields(model.modalities, model.modalities),
        **checkpoint_fields(model.imp, model.modalities),
    }
    reasons = []
    for task in tasks:
        try:
            results = _measure(encoder, task, batch_size)
        except UserError as error:
            reasons.append(str(error))
            continue
        for result in results:
            yield {"set": result["set"], "type": result["type"], "step": step, **result, **provenance}
    if reasons:
        raise NotMeasured(reasons, [])


def _measure(encoder: MTEBEncoder, task: AbsTask, batch_size: int) -> list[dict[str, Any]]:
    """Loads a task's data, evaluates the model, and returns a result per test split and subset (mostly a language).

    An error of mteb, `datasets` or the hub becomes a UserError, so that one task does not end a benchmark of a hundred.
    """
    metadata = task.metadata
    try:
        task.load_data()
    except Exception as error:  # `datasets` and its hub client raise about twenty unrelated types.
        dataset = metadata.dataset["path"]
        raise UserError(f"{metadata.name}: {dataset} cannot be loaded: {one_line(error.__cause__ or error)}") from error
    evaluate: Any = mteb.evaluate  # Its types demand arguments that our encoder does not use.
    try:
        with warnings.catch_warnings():
            # mteb also computes precision and F1, which are undefined for a class that is never predicted. If all
            # similarities are equal, a correlation is NaN, which raises below.
            for category in (UndefinedMetricWarning, ConstantInputWarning):
                warnings.simplefilter("ignore", category)
            measured = evaluate(encoder, task, cache=None, co2_tracker=False, encode_kwargs={"batch_size": batch_size})
        scores_by_split = measured.task_results[0].scores
        scores = [(split, subset) for split, subsets in scores_by_split.items() for subset in subsets]
        if not all(abs(subset["main_score"]) <= 1 for _, subset in scores):  # also if a score is NaN
            raise ValueError(f"{metadata.main_score} is not between -1 and 1")
        return [_result(task, split, subset, names_split=len(scores) > 1) for split, subset in scores]
    except Exception as error:
        raise UserError(f"{metadata.name}: mteb cannot measure it: {one_line(error.__cause__ or error)}") from error
    finally:
        task.unload_data()


def _result(task: AbsTask, split: str, scores: Mapping[str, Any], names_split: bool) -> dict[str, Any]:
    """The result of one split and subset. With `names_split`, its field "task" names both."""
    metadata = task.metadata
    subset = scores["hf_subset"]
    data: Any = task.dataset
    data = data[split] if subset == "default" and subset not in data else data[subset][split]
    if isinstance(task, AbsTaskZeroShotClassification):
        kind = "zero_shot"
        name = f"{_names(modality for modality in metadata.modalities if modality != 'text')} -> text"
        figures = _zero_shot(task, data, scores)
    elif isinstance(task, AbsTaskRetrieval) and "hit_rate_at_1" in scores:
        kind = "retrieval"
        query = _names(metadata.get_modalities(PromptType.query))
        target = _names(metadata.get_modalities(PromptType.document))
        name = f"{query} -> {target}"
        figures = _retrieval(data, scores)
    else:
        kind = metadata.type
        name = f"{_names(metadata.modalities)} ({metadata.main_score})"
        n = len(data) if isinstance(data, Dataset) else None
        figures = {"n": n, "candidates": None, "interval": None, "chance": None}
    result = {
        "set": metadata.name,
        "type": kind,
        "task": f"{name} [{split}, {subset}]" if names_split else name,
        **figures,
        "score": float(scores["main_score"]),
        "metric": metadata.main_score,
        "skipped": 0,
        "library": f"mteb {version('mteb')}",
        "dataset": f"{metadata.dataset['path']}@{metadata.dataset['revision']}",
        "split": split,
    }
    if metadata.name in NOTES:
        result["note"] = f"not comparable to the paper: {NOTES[metadata.name]}"
    return result


def _names(modalities: Iterable[str]) -> str:
    return " + ".join(modalities)


def _zero_shot(task: AbsTaskZeroShotClassification, data: Any, scores: Mapping[str, Any]) -> dict[str, Any]:
    classes = len(task.get_candidate_labels())
    top1 = float(scores["accuracy"])
    interval = share_interval(top1, len(data))
    return {"n": len(data), "candidates": classes, "top1": top1, "interval": interval, "chance": 1 / classes}


def _retrieval(data: Any, scores: Mapping[str, Any]) -> dict[str, Any]:
    """R@k is mteb's `hit_rate_at_k`. The reciprocal rank of a query whose answer is not among the first 1,000 is 0."""
    n = len(data["queries"])
    candidates = None if data["top_ranked"] else len(data["corpus"])  # Reranking has few candidates for each query.
    relevant_documents = data["relevant_docs"].values()
    correct = sum(score > 0 for documents in relevant_documents for score in documents.values())
    return {
        "n": n,
        "candidates": candidates,
        **{f"r{k}": float(scores[f"hit_rate_at_{k}"]) for k in (1, 5, 10)},
        "mrr": float(scores["mrr_at_1000"]),
        "interval": share_interval(float(scores["hit_rate_at_1"]), n),
        "chance": correct / n / candidates if candidates else None,
    }
