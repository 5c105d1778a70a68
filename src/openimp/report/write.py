"""`openimp report`: a run as one HTML page that needs nothing else, to look at and to show to others."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from openimp.checkpoint.folder import MANIFEST, checkpoints, load_model, model_folder, saved_step
from openimp.common.device import pick_device
from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.common.modality import BadMedia, Modality
from openimp.common.safe_files import refuse_links, write_text
from openimp.data.tables import Table
from openimp.data.trust import check_sources
from openimp.encoding.items import Progress, raw_value
from openimp.evaluation.classes import Classified
from openimp.evaluation.evaluate import measure, open_sets
from openimp.evaluation.results import read_results
from openimp.evaluation.retrieval import Retrieved
from openimp.model.imp import IMP
from openimp.recipe.evaluation import EvaluationSet
from openimp.recipe.schema import Recipe
from openimp.report import results, training
from openimp.report.markup import Child, Markup, join, tag
from openimp.report.page import facts, page


def write_report(
    run: Path, out: Path | None = None, progress: Progress | None = None, allow_sources: bool = False
) -> Path:
    """Writes the page, whole or not at all, and gives its place.

    The curves come from the run's metrics.jsonl. The evaluation sets of its newest checkpoint are measured again, for
    their figures do not tell what was taken for what; a set whose data is not there any more keeps its figures of
    results.jsonl.

    Args:
        run: a run, or a folder with a model, which has no curves.
        out: the file; left out: report.html in `run`, or in the run of a checkpoint.
        progress: wraps an iterable to show its progress.
        allow_sources: measure even what reads other sources than `trust.check_sources` allows.

    Raises:
        UserError: there is neither a checkpoint nor a line of metrics, one of them is damaged, or `out` is no place
            for a file.
    """
    refuse_links(run)
    lines = read_lines(run / "metrics.jsonl")
    trained = (run / "config.json").exists() or bool(checkpoints(run))
    if not trained and not lines:
        raise UserError(f"{run}: nothing to report on: no checkpoint, and no line in metrics.jsonl")
    # Not into a checkpoint, which must hold what was saved and nothing else.
    out = out or (run.resolve().parents[1] if (run / MANIFEST).exists() else run) / "report.html"
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out}: --out needs a file, in a directory that is there")
    text = _page(run, lines, trained, progress, allow_sources)
    write_text(out, text, errors="replace")  # Lone surrogates, which file names may hold, are no UTF-8.
    return out


def _page(run: Path, lines: list[dict[str, Any]], trained: bool, progress: Progress | None, allow_sources: bool) -> str:
    recorded = read_results(run / "results.jsonl")
    sections: dict[str, Markup | None] = {"Results": None}
    if lines:
        sections |= {
            "Losses": training.losses(lines),
            "Pace": training.pace(lines),
            "Mixture": training.mixture(lines),
            "Experts": training.experts(lines),
        }
    if trained:
        folder = model_folder(run)
        model, recipe, modalities, classes = load_model(folder)

        def check(name: str) -> None:
            if not allow_sources:
                check_sources(run, folder, recipe, [name])

        step, newest = saved_step(folder), run / "metrics.jsonl" if lines else folder / "config.json"
        parameters = sum(parameter.numel() for parameter in model.parameters())
        sections |= _looks(model.to(pick_device()), recipe, modalities, classes, step, recorded, check, progress)
    else:
        recipe, parameters, newest = Recipe.load(run / "recipe.yaml"), None, run / "metrics.jsonl"
        step = lines[-1]["step"]
        sections["Results"] = _results(
            _latest(recorded), recorded, ["There is no checkpoint to measure."] if recorded else []
        )
    until = datetime.fromtimestamp(newest.stat().st_mtime, UTC)
    return page(recipe.name, facts(recipe, parameters, step, lines, until), sections)


def _looks(
    model: IMP,
    recipe: Recipe,
    modalities: dict[str, Modality],
    classes: dict[str, list[Any]],
    step: int | None,
    recorded: list[dict[str, Any]],
    check: Callable[[str], None],
    progress: Progress | None,
) -> dict[str, Markup | None]:
    """The sections for which the model is measured again, on the sets that pass `check`."""
    told: list[dict[str, Any]] = []
    missing: list[str] = []
    confusions: list[Child] = []
    retrievals: list[Child] = []
    for name, options in recipe.evaluation.sets.items():
        try:
            check(name)
            sources = open_sets(model, recipe, modalities, [name], classes)[name]
            measured = measure(model, recipe, modalities, name, sources, step, progress, classes)
        except UserError as error:
            missing.append(f"{name} is not measured again; its figures are those that were recorded, if any: {error}")
            told += _latest([result for result in recorded if result["set"] == name])
            continue
        told += measured.results
        show = _show(modalities, options, sources[options.source])
        for found in measured.found:
            heading = tag("h3", f"{name}: {found.query} → {found.target}")
            if isinstance(found, Classified):
                confusions += [heading, results.confusion(found)]
            elif isinstance(found, Retrieved):
                retrievals += [heading, results.retrieval(found, sources[options.source], show)]
    return {
        "Results": _results(told, recorded, missing),
        "Confusions": join(confusions) if confusions else None,
        "Retrieval": join(results.LEGEND, retrievals) if retrievals else None,
    }


def _results(told: list[dict[str, Any]], recorded: list[dict[str, Any]], notes: list[str]) -> Markup | None:
    if not told and not notes:
        return None
    said = [tag("p", note, class_="note") for note in notes]
    return join(said, results.figures(told) if told else None, results.history(recorded))


def _latest(recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = max((result["step"] or 0 for result in recorded), default=0)
    return [result for result in recorded if (result["step"] or 0) == last]


def _show(modalities: dict[str, Modality], options: EvaluationSet, source: Table) -> results.Show:
    """What a person sees of a modality in a row of a set's source."""

    def show(name: str, row: int) -> str | bytes | np.ndarray:
        modality = modalities[name]
        try:
            return modality.show(raw_value(source, modality, options.inputs[name], row), options.view[name])
        except BadMedia as error:
            return f"cannot be shown: {error}"

    return show


__all__ = ["write_report"]
