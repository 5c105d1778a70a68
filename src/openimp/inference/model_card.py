"""The model card that `openimp push` writes: the model, its training data, its results and its limits."""

from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from openimp.checkpoint.folder import CHECKPOINTS, read_state, saved_step
from openimp.common.errors import UserError
from openimp.common.modality import Modality
from openimp.common.names import HUB, Name, is_bundled, is_url
from openimp.common.versions import openimp_version
from openimp.data.files import BUNDLED_LICENSES
from openimp.data.sources import open_source
from openimp.data.trust import trained_here
from openimp.evaluation.provenance import checkpoint_fields
from openimp.evaluation.results import main_metric, percent, read_results
from openimp.inference.classify import class_heads
from openimp.inference.model import Model
from openimp.inference.public_recipe import public_path
from openimp.planning.costs import short
from openimp.planning.plan import parameter_count
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Source

METRICS = {"r1": "R@1", "top1": "top-1", "map": "mAP"}
"""Names of the main metrics. A result of another library names its own score."""
MARKUP = {ord(character): f"&#{ord(character)};" for character in "\\`*|[]<>"}
"""Characters that have a meaning in Markdown, and what shows them as they are."""


def plain_text(value: Any) -> str:
    """A value as plain text in a cell of a Markdown table. Names come from data, so they must not add markup."""
    return " ".join(str(value).split()).translate(MARKUP)


TEMPLATES = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
TEMPLATES.loader = PackageLoader("openimp.inference")
TEMPLATES.filters.update(public=public_path, text=plain_text, percent=percent, commas="{:,}".format, short=short)


def model_card(model: Model, folder: Path, name: str, license: str | None) -> str:
    """The card in Markdown, with the Hub's metadata at its head.

    `folder` is the checkpoint or the model's folder. `name` is OWNER/NAME, or the name of a bundled model. `license` is
    that of the model, if known.
    """
    recipe = model.recipe
    step = saved_step(folder)
    totals = {} if step is None else read_state(folder)["totals"]  # what training has used, by task
    names = list(model.modalities)
    pairs = [pair for pair in combinations(names, 2) if model.imp.share_a_space(*pair)]
    embedded = [name for name in names if any(model.imp.share_a_space(name, other) for other in names)]
    tags = ["openimp", "multimodal", *names, "arxiv:2305.06324"]
    if recipe.model.moe:
        tags.append("mixture-of-experts")
    hub_names = (source.hub for source in recipe.training_sources.values())  # `hub` may also name a local folder.
    metadata = ModelCardData(
        library_name="openimp",
        pipeline_tag="feature-extraction",
        license=license,
        datasets=[hub_name for hub_name in hub_names if hub_name and not Path(hub_name).is_dir()] or None,
        tags=tags,
    )
    return TEMPLATES.get_template("model-card.md").render(
        metadata=metadata.to_yaml(),
        name=name,
        load_name=name if Name.parse(name).scheme else f"{HUB}:{name}",
        modalities=names,
        parameters=parameter_count(model),
        config=model.imp.config,
        recipe=recipe,
        pairs=pairs,
        embedded=embedded,
        examples={name: _example(model.modalities[name]) for name in embedded},
        # `classify` needs no `head` if there is only one.
        classified={name: _example(model.modalities[name]) for name in names if len(class_heads(recipe, name)) == 1},
        sources=_sources(recipe, totals, trained_here(folder)),
        teachers=sorted({teacher.model for task in recipe.tasks.values() for teacher in task.teachers}),
        results=_results(model, folder),
        license=license,
        step=step,
        flops=sum(used["flops"] for used in totals.values()),
        openimp=openimp_version(),
        torch=torch.__version__,
    )


def _example(modality: Modality) -> str:
    """An input for the code on the card."""
    return "a red bicycle" if modality.reads_text else "FILE" + "".join(modality.extensions[:1])


def _sources(recipe: Recipe, totals: dict[str, dict[str, int]], is_trusted: bool) -> list[dict[str, Any]]:
    """The values that the card shows of each training source. Those of a model from elsewhere are not
    opened, unless they come with openimp."""
    examples_seen = Counter[str]()  # with repetitions
    for task, used in totals.items():
        examples_seen[recipe.tasks[task].source] += used["examples"]
    return [
        {
            "name": name,
            "data": public_path(source.hub or str(source.path)),
            "bundled": is_bundled(str(source.path)),
            "rows": _rows(source) if is_trusted or is_bundled(str(source.path)) else None,
            "examples": examples_seen.get(name),
            "license": source.license or BUNDLED_LICENSES.get(Name.parse(str(source.path)).rest),
        }
        for name, source in recipe.training_sources.items()
    ]


def _rows(source: Source) -> int | None:
    """The number of rows, if they can be counted without a download."""
    if source.hub or source.stream or is_url(str(source.path)):
        return None
    try:
        return len(open_source("rows", source))  # type: ignore[arg-type]  # It is no stream.
    except UserError:  # For example, the data was deleted.
        return None


def _results(model: Model, folder: Path) -> list[dict[str, Any]]:
    """The results in the run's results.jsonl that were measured on exactly these weights."""
    run = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder
    lines = read_results(run / "results.jsonl")
    if not lines:
        return []
    checkpoint = checkpoint_fields(model.imp, model.modalities)["checkpoint"]
    latest = {(line["set"], line["task"]): line for line in lines if line.get("checkpoint") == checkpoint}
    return [
        {
            **line,
            "main": main_metric(line),
            "metric": next((METRICS[key] for key in METRICS if key in line), line.get("metric", "score")),
            "trained": line.get("trained", line.get("source") in model.recipe.training_sources),
        }
        for line in latest.values()
    ]
