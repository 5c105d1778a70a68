"""Published benchmarks, measured by their own libraries: mteb and CLIP_benchmark."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from openimp.common.device import precision_of
from openimp.common.errors import UserError
from openimp.evaluation.evaluate import NotMeasured
from openimp.evaluation.provenance import checkpoint_fields, software_fields
from openimp.inference.model import Model

Benchmark = Callable[[], list[dict[str, Any]]]
"""Measures the model and returns results without the fields that `measure` adds."""


def find_benchmarks(model: Model, tasks: Sequence[str], folders: Sequence[str]) -> tuple[list[Benchmark], list[str]]:
    """The benchmarks of mteb and of CLIP_benchmark with these names, and sentences about those that are left out.

    `tasks` are tasks or benchmarks of mteb. `folders` are folders in CLIP_benchmark's layout, or names on the Hugging
    Face Hub. The libraries are imported only if they are needed. Unknown names are UserErrors.
    """
    found: list[Benchmark] = []
    left_out: list[str] = []
    if tasks:
        _require("mteb", "mteb")
        from openimp.inference import mteb_tasks
        from openimp.inference.mteb import MTEBEncoder

        chosen, left_out = mteb_tasks.find_tasks(tasks, model.modalities)
        encoder = MTEBEncoder(model)
        found += [partial(mteb_tasks.measure, encoder, task) for task in chosen]
    if folders:
        _require("clip_benchmark", "clip-benchmark")
        from openimp.inference import clip_benchmark
        from openimp.inference.clip_folder import open_folder

        seen, read = clip_benchmark.pictures_and_texts(model)
        found += [partial(clip_benchmark.measure, model, open_folder(name), seen, read) for name in folders]
    return found, left_out


def measure(model: Model, step: int | None, benchmarks: Iterable[Benchmark]) -> Iterator[dict[str, Any]]:
    """Yields results in the format of `evaluate`, each as soon as it is known, because a benchmark can take hours.

    Benchmarks that cannot be measured are named in one NotMeasured after the results of the others.
    """
    about = {
        "view": {name: view.model_dump(mode="json") for name, view in model.views.items()},
        "precision": precision_of(model.device, model.precision),
        **software_fields(model.modalities, model.modalities),
        **checkpoint_fields(model.imp, model.modalities),
    }
    reasons = []
    for run in benchmarks:
        try:
            results = run()
        except UserError as error:
            reasons.append(str(error))
            continue
        yield from (
            {"set": result["set"], "type": result["type"], "step": step, **result, **about} for result in results
        )
    if reasons:
        raise NotMeasured(reasons, [])


def _require(module: str, package: str) -> None:
    try:
        __import__(module)
    except ImportError as error:
        raise UserError(f"{package} cannot be imported ({error}): pip install 'openimp[eval]'") from None
