"""The commands: the glue between the command line and the library, and their printed output."""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import yaml

from openimp.checkpoint.folder import CONFIG, RECIPE, describe_model, saved_step
from openimp.checkpoint.resume import common_checkpoints
from openimp.common.errors import UserError, escaped
from openimp.common.json_lines import append
from openimp.common.names import HUB, TIMM, Name, has_scheme, is_bundled, is_url
from openimp.common.objective import head_key
from openimp.common.progress import clock, console, notice, number_table, track
from openimp.common.safe_files import refuse_links
from openimp.data.sources import open_source
from openimp.data.targets import classes_of
from openimp.drafting.assembling import source_name
from openimp.drafting.draft import draft_recipe, is_data
from openimp.encoding.find import find_model, is_public
from openimp.evaluation.baseline import comparison
from openimp.evaluation.evaluate import NotMeasured
from openimp.evaluation.results import latest, read_results, table
from openimp.inference.evaluate import evaluate
from openimp.inference.model import load
from openimp.parallel import distributed
from openimp.planning.plan import plans
from openimp.planning.tables import print_costs, print_model, print_plan
from openimp.recipe.file import RecipeLoader, override
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Source
from openimp.search.build import build_and_open
from openimp.search.folder import METADATA, own_index
from openimp.search.index import open_index
from openimp.search.query import By, Like, Query
from openimp.training.metrics_file import read_metrics
from openimp.training.trainer import train

RESUME: dict[str | None, bool | Literal["auto"]] = {None: False, "": True, "auto": "auto"}
"""The argument of `train` for a value of --resume."""
MAX_TEXT = 100
"""Maximum number of characters of an item's text in a list of results."""


def run_demo(overrides: list[str], run: Path | None) -> None:
    """Trains the bundled recipe, or resumes its training, and says what to do next."""
    recipe = Recipe.load("demo", overrides, Path.cwd())
    run = run or Path("runs") / recipe.name
    if not train(recipe, run, resume="auto"):
        return
    console.print(
        f"\nThe run is in {run}: results.jsonl, metrics.jsonl, tensorboard/, checkpoints/.\n"
        f"Next:  search the data in the browser: pip install 'openimp[search]' && openimp serve {run}\n"
        f"       openimp report {run}   |   openimp info {run}   |   openimp embed {run} PICTURES...\n"
        f"       tensorboard --logdir {run}"
    )


def run_train(
    name: str,
    overrides: list[str],
    run: Path | None,
    resume: str | None,
    allow_changed_data: bool,
    towers: list[str],
) -> None:
    """Trains a recipe, or data, into `run` or into runs/NAME. `resume` is the value of --resume: "" or auto."""
    if resume not in RESUME:
        raise UserError(f"--resume: expected auto or nothing, found {resume}")
    drafts = is_data(name)
    if towers and not drafts:
        raise UserError("--tower: is for data; a recipe names its towers in `modalities` (docs/fine-tuning.md)")
    recipe = _recipe_for(name, overrides, run, resume, towers) if drafts else Recipe.load(name, overrides, Path.cwd())
    run = run or Path("runs") / recipe.name
    is_complete = train(recipe, run, RESUME[resume], allow_changed_data=allow_changed_data)
    if drafts and is_complete and int(os.environ.get("RANK", 0)) == 0:
        results = latest(read_results(run / "results.jsonl"))
        for line in chain.from_iterable(comparison(recipe, results, task) for task in recipe.tasks):
            console.print(line, soft_wrap=True)
        has_classes = any(task.class_columns for task in recipe.tasks.values())
        commands = [f"openimp classify {run} FILES..."] if has_classes else []
        if recipe.to_config({}).pairs:
            commands.append(f"openimp serve {run}")
        console.print(f"Next:  {'   |   '.join([*commands, f'openimp report {run}'])}", soft_wrap=True)


@distributed.leave_after_errors()
def _recipe_for(data: str, overrides: list[str], run: Path | None, resume: str | None, towers: list[str]) -> Recipe:
    """The recipe that `init` writes for data. A run with a checkpoint keeps its own, because a draft depends on the
    machine."""
    changes: dict[str, Any] = {"name": source_name(data), "train": {}}
    for text in overrides:
        if text.startswith(("name=", "train.init=")):
            override(changes, text)
    run = run or Path("runs") / str(changes["name"])
    distributed.start()
    if resume is not None and common_checkpoints(run):
        refuse_links(run)
        saved_recipe = Recipe.load(run / RECIPE, overrides, Path.cwd())
        if not any(_is_in(source, data) for source in saved_recipe.sources.values()):
            command = (
                f"openimp train {shlex.quote(str(run / 'recipe.yaml'))} --run-dir {shlex.quote(str(run))} --resume"
            )
            raise UserError(
                f"{run}: holds a run on other data than {data}; name another directory with --run-dir, or resume that "
                f"run with {command}"
            )
        return saved_recipe
    init = changes["train"].get("init")
    if init is not None and Name.parse(str(init)).scheme == TIMM:
        init = None  # A public ViT has no recipe to draft from. `open_warm_start` names the keys that the recipe needs.
    drafted = distributed.run_on_rank_zero(lambda: draft_recipe([data], towers=towers, init=init))
    if distributed.rank() == 0:
        for note in drafted.notes:
            notice(note)
        arguments = shlex.join([data, *chain.from_iterable(("--tower", tower) for tower in towers)])
        to_change = f"to change it: openimp init {arguments} > mine.yaml"
        notice(f"the recipe goes into {run / 'recipe.yaml'}; {to_change}")
    recipe = {"name": source_name(data), **yaml.load(drafted.text, RecipeLoader)}
    for text in overrides:
        override(recipe, text, Path.cwd())
    return Recipe.build(recipe, Path.cwd(), f"recipe for {data}")


def _is_in(source: Source, data: str) -> bool:
    """Whether a recipe's source is `data`, or lies in the folder `data`."""
    if has_scheme(data) or is_url(data):
        return data in (source.path, f"{HUB}:{source.hub}", f"{HUB}:{source.hub}@{source.revision}")
    places = (os.path.abspath(data), os.path.realpath(data))
    paths = [Path(path) for path in (source.path, source.root) if path]
    return any(path.is_relative_to(place) for path in paths for place in places)


def run_eval(
    path: Path,
    sets: list[str] | None,
    other: str | None,
    out: Path | None,
    overrides: list[str] | None = None,
    allow_sources: bool = False,
    mteb: list[str] | None = None,
) -> None:
    """Measures a model on evaluation sets of its own recipe or of the recipe `other`, or on tasks of mteb, and
    prints the results.

    If sets cannot be measured, the results of the others are printed and written before NotMeasured is raised.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{path}: openimp eval runs in one process; start it without torchrun")
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"{out}: --out needs a file, in a directory that is there")
    if mteb:
        if sets or other or overrides or allow_sources:
            raise UserError("--mteb takes no evaluation sets, --recipe, --set or --allow-sources")
        return _run_benchmarks(path, mteb, out)
    try:
        _write_results(evaluate(path, sets or None, other, overrides or (), allow_sources, progress=track), out)
    except NotMeasured as error:
        _write_results(error.results, out)
        raise


def _write_results(results: list[dict[str, Any]], out: Path | None) -> None:
    if results:
        console.print(table(results))
    if out:
        for result in results:
            append(out, result)


def _run_benchmarks(path: Path, tasks: list[str], out: Path | None) -> None:
    """Measures a model on tasks and benchmarks of mteb, and prints the results. Each is written to `out` at once.

    If benchmarks cannot be measured, the results of the others are printed before NotMeasured is raised.
    """
    try:
        from openimp.inference import mteb_tasks
    except ImportError as error:
        advice = "pip install 'openimp[eval]', with Python 3.11 or newer"
        raise UserError(f"mteb cannot be imported ({error}): {advice}") from None
    folder = find_model(str(path))
    model = load(folder)
    model.precision = model.config.precision
    mteb_task_list, left_out = mteb_tasks.find_tasks(tasks, model.modalities)
    for sentence in left_out:
        console.print(sentence, soft_wrap=True)
    results = []
    try:
        for result in mteb_tasks.measure(model, saved_step(folder), mteb_task_list):
            results.append(result)
            if out:
                append(out, result)
    finally:
        if results:
            console.print(table(results))


def run_search(
    path: Path,
    texts: list[str],
    minus: list[str],
    queries: dict[str, list[str] | None],  # files, or texts, by modality
    modalities: list[str] | None,
    under: Path | None,
    k: int,
    min_score: float | None,
    by: By,
    since: str | None,
    until: str | None,
    as_json: bool,
) -> None:
    """Searches an index and prints the results."""
    for text in texts:
        if os.path.isfile(os.path.join(text, METADATA)):  # False for a long text, where Path raises OSError.
            raise UserError(f"{text}: is an index; name it before the query")
    index = open_index(path)
    if texts and by == "both" and not index.has_words:
        notice(f"{path}: words are not searched; run openimp index again or make a new index")
    for text in texts:
        if "." in text and os.path.isfile(text):
            raise UserError(f"{text}: is a file; --image, --video or --audio searches with it")
    parts: list[str | Query | Like] = list(texts)
    parts += [Query(name, value) for name, values in queries.items() for value in values or ()]
    parts += [index.text_query(text, -1.0) for text in minus]
    if under and not index.count(modalities, under):
        raise UserError(f"--under {under}: nothing is indexed there")
    hits = index.search(
        parts, k, modalities=modalities, under=under, min_score=min_score, by=by, since=since, until=until
    )
    if as_json:
        for hit in hits:
            print(json.dumps(asdict(hit)))  # Escapes control characters in names.
        return
    width = max((len(hit.modality) for hit in hits), default=0)
    for hit in hits:
        time = "" if hit.start is None or hit.end is None else f"  {clock(hit.start)} to {clock(hit.end)}"
        # The text of a file without a caption is a part of its path.
        is_in_path = hit.text is not None and os.path.splitext(hit.path)[0].endswith(hit.text)
        text = f"  {' '.join(hit.text.split())[:MAX_TEXT]}" if hit.text and not is_in_path else ""
        score = " " * 6 if hit.score is None else f"{hit.score:6.3f}"
        console.print(f"{score}  {hit.modality:{width}}  {escaped(hit.path)}{time}{text}", soft_wrap=True)
    if not hits:
        console.print("nothing is indexed that matches the query and its filters")


def run_serve(
    what: Path,
    host: str,
    port: int,
    names: Sequence[str] = (),
    allow_sources: bool = False,
    media: Sequence[Path] = (),
) -> None:
    """Serves the search page of an index, or of the media of a run's recipe."""
    for folder in media:
        if not folder.exists():
            raise UserError(f"--media {folder}: no such folder")
    if (has_scheme(what) and not is_bundled(what)) or (what / CONFIG).exists():
        raise UserError(f"{what}: comes without media; index some first: openimp index {what} FOLDER --out my.index")
    if not is_bundled(what) and not what.exists():
        raise UserError(f"{what}: no such index or run; openimp index makes an index")
    try:
        from openimp.search.server import serve
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}: pip install 'openimp[search]'") from None
    if not (what / METADATA).exists():
        if own_index(str(what)) is None:
            advice = f"make an index first: openimp index MODEL {what} --out {what}.index"
            raise UserError(f"{what}: is neither an index nor a run with a checkpoint; {advice}")
        try:
            index = build_and_open(what, allow_sources, media)
        except UserError as error:  # The run's data may have moved.
            index_folder = own_index(str(what))
            if index_folder is None or not (index_folder / METADATA).exists():
                raise
            notice(f"{error}; the index is served as it was")
            index = open_index(index_folder, allow_sources=allow_sources, media=media)
    else:
        index = open_index(what, allow_sources=allow_sources, media=media)
    if index.shows_no_files:
        notice(
            f"{index.folder}: you did not make this index on this machine, or openimp's cache was deleted, so only "
            "texts and scores are shown; --media FOLDER also shows the files below a folder"
        )
    serve(index, host, port, names)


def run_info(what: str, overrides: list[str]) -> None:
    """Describes a recipe, a model, or a run."""
    path = Path(what)
    is_folder = path.is_dir()
    is_name = has_scheme(what)
    if is_name or is_folder:
        if overrides:
            raise UserError(f"{path}: --set changes a recipe, and this is a run or a model")
        folder = find_model(what)
        config, modalities, saved_recipe = describe_model(folder)
        console.print(f"{what if is_name else folder}: a model of recipe {config.name}", soft_wrap=True)
        print_model(config, modalities)
        classes = config.classes
        recipe = None
        try:
            recipe = saved_recipe.validated()
        except UserError as error:
            notice(f"what a step costs is not known: {error}")
    else:
        recipe = Recipe.load(what, overrides, Path.cwd())
        modalities = recipe.make_modalities()
        classes = _classes(recipe)
        print_model(recipe.to_config(classes), modalities)
    if recipe is not None and not is_public(recipe):
        print_costs(recipe, modalities, classes)
    if is_folder:
        _print_run(path)


def _print_run(path: Path) -> None:
    if lines := read_metrics(path / "metrics.jsonl"):
        rows = [
            (task, f"{used.steps:,}", f"{used.examples:,}", f"{used.tokens:,}", f"{used.flops:.4g}")
            for task, used in lines[-1].totals.items()
        ]
        head = ("task", "steps", "examples", "tokens", "FLOPs")
        console.print(number_table(f"spent up to step {lines[-1].step}", head, rows))
    if results := read_results(path / "results.jsonl"):
        console.print(table(latest(results)))


def run_plan(name: str, overrides: list[str], gpus: int | None, gpu: str, mfu: float) -> None:
    """Prints the needs of a run of a recipe, and which layout suits it. By default, as few GPUs as its layout needs."""
    recipe = Recipe.load(name, overrides, Path.cwd())
    if gpus is None:
        gpus = max(recipe.parallel.shard_degree or 1, recipe.parallel.expert_degree)
    modalities = recipe.make_modalities()
    layout_plans = [*plans(recipe, modalities, _classes(recipe), gpus=gpus, gpu=gpu, utilization=mfu)]
    print_plan(recipe, layout_plans, gpu)


def _classes(recipe: Recipe) -> dict[str, list[Any]]:
    """The classes of each head. A head whose classes are neither listed nor in readable data counts as one class."""
    classes = {}
    for name, task in recipe.tasks.items():
        options = recipe.sources[task.source]
        is_remote = is_url(options.path or "") or (options.hub is not None and not Path(options.hub).is_dir())
        for column in task.class_columns:
            head = head_key(task.source, column.name)
            if column.classes:
                classes[head] = list(column.classes)
                continue
            try:
                if is_remote:
                    raise UserError(f"source {task.source} is not downloaded for this; list the classes in the recipe")
                source = open_source(task.source, options)
                classes[head] = classes_of(source, column, f"tasks.{name}")
            except UserError as error:
                classes[head] = [None]
                console.print(f"head {head} counts as one class: {error}", soft_wrap=True)
    return classes
