"""`openimp report`: writes the page about a run or a model."""

import os
import platform
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openimp.checkpoint.folder import MANIFEST, RECIPE, checkpoints, load_model, read_config, saved_step
from openimp.common.device import pick_device
from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Modalities
from openimp.common.names import PUBLIC, Name, has_scheme
from openimp.common.progress import Progress, notice
from openimp.common.protocols import Pictured
from openimp.common.safe_files import refuse_links, write_text
from openimp.common.versions import openimp_version
from openimp.data.tables import Table
from openimp.data.trust import check_sources
from openimp.encoding.find import find_model
from openimp.encoding.items import raw_value
from openimp.evaluation.classification import Classified
from openimp.evaluation.evaluate import measure
from openimp.evaluation.evaluator import Evaluator
from openimp.evaluation.results import latest, read_results
from openimp.evaluation.retrieval import RetrievalResult
from openimp.planning.plan import parameter_count
from openimp.recipe.evaluation import EvaluationSet
from openimp.recipe.schema import Recipe
from openimp.report import results, training
from openimp.report.page import TEMPLATES
from openimp.training.metrics_file import read_metrics

PICTURE_SIDE = 128
"""Maximum width and height of a picture on the page, in pixels."""


def write_report(
    run: Path, out: Path | None = None, progress: Progress | None = None, allow_sources: bool = False
) -> Path:
    """Writes the page about a run, a checkpoint or a model's folder, completely or not at all, and returns its path.

    The curves come from a run's metrics.jsonl. The evaluation sets are measured again with the newest checkpoint,
    because results.jsonl does not say which answers were given. If a set cannot be measured, the page shows its results
    in results.jsonl. `allow_sources` reads sources that `check_sources` would refuse.

    The default of `out` is `report.html` in `run`, CHECKPOINT.html beside a checkpoint, or a file in the current
    directory for a model of the Hub.
    """
    if has_scheme(run):
        if Name.parse(run).scheme in PUBLIC:
            raise UserError(f"{run}: a public model has no training to report on")
        run = find_model(run)
        out = out or Path(f"{read_config(run)[0].name}.html")
    if not run.is_dir():
        raise UserError(f"{run}: no such folder")
    refuse_links(run)
    metrics = read_metrics(run / "metrics.jsonl")
    has_model = (run / "config.json").exists() or bool(checkpoints(run))
    if not has_model and not metrics:
        raise UserError(f"{run}: nothing to report on: no checkpoint, and no line in metrics.jsonl")
    if out is None:
        folder = Path(os.path.abspath(run))  # "." has no name.
        # A checkpoint may hold only the files in its manifest.
        out = folder.with_name(f"{folder.name}.html") if (run / MANIFEST).exists() else run / "report.html"
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out}: --out must be a file in an existing folder")
    recorded = read_results(run / "results.jsonl")
    if has_model:
        facts, sections = _measure(run, recorded, progress, allow_sources)
    else:
        facts = {"recipe": Recipe.load(run / RECIPE), "parameters": None, "step": metrics[-1].step}
        notes = ["There is no checkpoint to measure."] if recorded else []
        sections = {"Results": results.section(latest(recorded), recorded, notes)}
    sections = {"Results": sections["Results"], **training.sections(metrics), **sections}
    newest_file = run / "metrics.jsonl" if metrics else find_model(run) / "config.json"
    page = TEMPLATES.get_template("page.html").render(
        sections={title: data for title, data in sections.items() if data},
        **facts,
        metrics=metrics,
        written=datetime.fromtimestamp(newest_file.stat().st_mtime, timezone.utc),
        made=datetime.now(timezone.utc),
        versions={"openimp": openimp_version(), "torch": version("torch"), "Python": platform.python_version()},
    )
    write_text(out, page, errors="replace")  # File names may hold lone surrogates, which UTF-8 cannot encode.
    return out


def _measure(
    run: Path, recorded: list[dict[str, Any]], progress: Progress | None, allow_sources: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measures the model on its evaluation sets, and returns facts about the model, and the sections of the page."""
    folder = find_model(run)
    model, (config, modalities, saved_recipe) = load_model(folder)
    recipe = saved_recipe.validated()
    step = saved_step(folder)
    facts = {"recipe": recipe, "parameters": parameter_count(model), "step": step}
    evaluator = Evaluator(model.to(pick_device()), recipe, modalities, config.classes, progress)
    shown = []
    notes = []
    confusions = []
    retrievals = []
    for name, options in recipe.evaluation.sets.items():
        try:
            if not allow_sources:
                check_sources(run, folder, recipe, [name])
            measured, answered = measure(evaluator, name, step)
        except UserError as error:
            note = f"{name} is not measured again. Its recorded results, if any, are shown. {error}"
            notice(note)
            notes.append(note)
            shown += latest([result for result in recorded if result["set"] == name])
            continue
        shown += measured
        source = evaluator.tables[options.source]
        for answers in answered:
            if isinstance(answers, Classified):
                confusions.append(results.confusion(name, answers))
            elif isinstance(answers, RetrievalResult):
                show = partial(_show, modalities, options, source)
                retrievals.append(results.retrieval(name, answers, source, show))
    # Results of published benchmarks, which only `openimp eval` measures.
    shown += latest([result for result in recorded if "library" in result])
    table = results.section(shown, recorded, notes)
    return facts, {"Results": table, "Confusions": confusions, "Retrieval": retrievals}


def _show(modalities: Modalities, options: EvaluationSet, source: Table, name: str, row: int) -> Any:
    """What the page shows of a modality's value in a row; see `results.Show`."""
    modality = modalities[name]
    try:
        raw = raw_value(source, modality, options.inputs[name], row)
        if isinstance(modality, Pictured):
            return modality.thumbnail(raw, options.view[name], PICTURE_SIDE)
        return str(raw) if modality.reads_text else modality.encode_input(raw, options.view[name])[0]
    except BadMedia as error:
        return f"cannot be shown: {error}"
