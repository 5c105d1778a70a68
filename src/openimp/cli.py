"""The command line: one function per command, whose docstring is its help. `commands` has what takes more lines."""

import inspect
import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Literal

import typer

from openimp.common.errors import UserError, printable

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe's YAML file, or the name of a bundled recipe.")]
MANY_CORES = 8
"""With this many cores, `init` drafts several processes that read data."""
MODEL = "a run, a checkpoint, a folder with a model, openimp:base, hub:OWNER/NAME, or a public model (docs/names.md)."
RunArgument = Annotated[Path, typer.Argument(help=f"A model: {MODEL}")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key of the recipe: KEY=VALUE, such as train.steps=100. Can be repeated."),
]
RunOption = Annotated[
    Path | None,
    typer.Option("--run", "--run-dir", help="Directory to write to.", show_default="runs/NAME-OF-THE-RECIPE"),
]
TowerOption = Annotated[
    list[str] | None,
    typer.Option(
        help="For data: a model that embeds the media and texts once, before training: a run, open_clip:NAME/TAG, "
        "sentence_transformers:OWNER/NAME, ... Can be repeated."
    ),
]
AllowSourcesOption = Annotated[
    bool, typer.Option("--allow-sources", help="Let the recipe of a model that was not trained here read any source.")
]
ModalityOption = Annotated[str | None, typer.Option(help="Modality of the files.", show_default="by their extensions")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Files per batch.")]


def _print_version(requested: bool) -> None:
    if requested:
        from openimp.common.versions import openimp_version

        print(f"openimp {openimp_version()}")
        raise typer.Exit


@app.callback()
def openimp(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and commit.")
    ] = False,
) -> None:
    """One Transformer encoder for image, video, audio and text, trained by alternating gradient descent."""


@app.command()
def demo(set_: SetOption = None, run: RunOption = None) -> None:
    """Train and evaluate recipes/demo.yaml on the bundled data: 5 to 7 minutes on two cores.

    A training that was interrupted resumes."""
    from openimp.commands import run_demo

    run_demo(set_ or [], run)


@app.command()
def init(
    paths: Annotated[
        list[str],
        typer.Argument(help="Folders, data files, patterns such as 'x-*.parquet', or hub:OWNER/NAME for a data set."),
    ],
    text: Annotated[str | None, typer.Option(help="The column with the texts.")] = None,
    label: Annotated[str | None, typer.Option(help="The column with the classes.")] = None,
    tower: TowerOption = None,
    init: Annotated[
        str | None, typer.Option(help="A model of openimp to start from (train.init): a run, openimp:base, ...")
    ] = None,
) -> None:
    """Inspect your data and print a recipe that trains on it: openimp init photos > mine.yaml."""
    from openimp.common.progress import notice
    from openimp.drafting.draft import draft_recipe

    drafted = draft_recipe(paths, text, label, tower or [], init)
    for note in drafted.notes:
        notice(note)
    sys.stdout.buffer.write(drafted.text.encode())
    sys.stdout.flush()


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe's YAML file, the name of a bundled recipe, or data, for which `init` drafts one."
        ),
    ],
    set_: SetOption = None,
    run: RunOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[auto]", help="Resume from the newest intact checkpoint. auto: start if there is no run yet."
        ),
    ] = None,
    allow_changed_data: Annotated[
        bool, typer.Option("--allow-changed-data", help="Resume although a source has changed.")
    ] = False,
    tower: TowerOption = None,
) -> None:
    """Train and evaluate a recipe, and write checkpoints, metrics and results to the run's directory."""
    if _has_workers(recipe, set_ or []):
        spin_briefly()
    from openimp.commands import run_train

    run_train(recipe, set_ or [], run, resume, allow_changed_data, tower or [])


@app.command()
def eval(
    run: RunArgument,
    sets: Annotated[list[str] | None, typer.Argument(help="Evaluation sets of the recipe.", show_default="all")] = None,
    recipe: Annotated[str | None, typer.Option(help="Take sources and evaluation sets from this recipe.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a source or an evaluation set: KEY=VALUE, such as sources.photos.limit=100. Can be repeated.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Append the results to this file, as JSON lines.")] = None,
    allow_sources: AllowSourcesOption = False,
    mteb: Annotated[
        list[str] | None,
        typer.Option(help="Evaluate on a task or benchmark of mteb instead of the recipe's sets. Can be repeated."),
    ] = None,
) -> None:
    """Evaluate a model: retrieval, zero-shot classification, trained heads and probes, each compared with chance."""
    from openimp.commands import run_eval

    run_eval(run, sets, recipe, out, overrides=set_, allow_sources=allow_sources, mteb=mteb)


@app.command()
def embed(
    run: RunArgument,
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Files, or folders with files, on disk or at URLs (s3://...).", show_default="see --join"),
    ] = None,
    out: Annotated[str, typer.Option(help="The Parquet file to write.")] = "embeddings.parquet",
    modality: ModalityOption = None,
    towards: Annotated[
        str | None, typer.Option(help="Modality to compare the embeddings with, if spaces are disjoint.")
    ] = None,
    batch_size: BatchSizeOption = 64,
    join: Annotated[
        str | None,
        typer.Option(
            help="Instead of files, embed the rows of a source: a manifest, Parquet files or a folder. They are "
            "written with their columns and one more, --to."
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="With --join: the column or text template that --modality reads.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="With --join: the name of the new column.", show_default="embedding")
    ] = None,
) -> None:
    """Embed files or, with --join, the rows of a source, and write the embeddings to a Parquet file."""
    from openimp.inference.embed import embed as embed_files
    from openimp.inference.join import embed_rows

    if bool(files) == bool(join):
        raise UserError("name either files or folders to embed, or a source with --join")
    if files and (column or to):
        raise UserError("--column and --to are for --join")
    if join is not None:
        embed_rows(run, join, out, modality, column, to=to or "embedding", towards=towards, batch_size=batch_size)
    elif files:
        embed_files(run, files, out, modality, towards, batch_size=batch_size)


@app.command()
def classify(
    run: RunArgument,
    files: Annotated[list[str], typer.Argument(help="Files, or folders with files, on disk or at URLs (s3://...).")],
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            help="The name of a class to choose from. Can be repeated.",
            show_default="the classes of the trained head",
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="A text with {} for the name, such as 'a photo of a {}'. Can be repeated: the vectors are averaged.",
            show_default="{}",
        ),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="The classification head, SOURCE:COLUMN, if the model has several.")
    ] = None,
    modality: ModalityOption = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of classes to print per file.")] = 3,
    batch_size: BatchSizeOption = 64,
) -> None:
    """Print the most probable classes of each file: those of a trained head, or those that you name.

    For example: openimp classify openimp:base drum.ogg --class drum --class flute
    """
    from openimp.inference.classify import classify_files

    classify_files(run, files, names=names, prompts=prompts, head=head, modality=modality, k=k, batch_size=batch_size)


@app.command()
def index(
    model: Annotated[str, typer.Argument(help=f"A model: {MODEL}")],
    paths: Annotated[
        list[str] | None,  # not Path, which would write s3://bucket as s3:/bucket
        typer.Argument(help="Files and folders.", show_default="the media in the sources of the run's recipe"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the index.", show_default="RUN/search.index")] = None,
    forget: Annotated[
        list[Path] | None, typer.Option(help="Remove the items of this file or folder. Can be repeated.")
    ] = None,
    batch_size: BatchSizeOption = 64,
    allow_sources: AllowSourcesOption = False,
) -> None:
    """Embed files into an index for search, or bring an index up to date."""
    from openimp.search import build_index

    build_index(model, paths or None, out, batch_size, allow_sources=allow_sources, forget=forget or ())


def _with_query_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces `**queries` of a command with an option --NAME for each modality that is installed."""
    signature = inspect.signature(command)
    *parameters, _ = signature.parameters.values()
    for name in sorted(point.name for point in entry_points(group="openimp.modalities")):
        option = typer.Option(
            f"--{name}", help="A file to search with or, if the modality reads texts, a text. Can be repeated."
        )
        kind = Annotated[list[str] | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    # typer reads both.
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@app.command()
@_with_query_options
def search(
    index: Annotated[Path, typer.Argument(help="An index, or a run (or openimp:base) after `openimp index RUN`.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to search for. Their vectors are added up.")] = None,
    minus: Annotated[
        list[str] | None, typer.Option(help="Subtract the vector of a text from the query. Can be repeated.")
    ] = None,
    modality: Annotated[list[str] | None, typer.Option(help="Only results of this modality. Can be repeated.")] = None,
    under: Annotated[
        Path | None, typer.Option(help="Only results in this folder or file, or of this source of the recipe.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of results.")] = 10,
    min_score: Annotated[float | None, typer.Option(help="Minimum cosine of a result and the query.")] = None,
    by: Annotated[
        Literal["both", "meaning", "words"],
        typer.Option(help="Find items by the meaning of the query, by its words in their texts, or by both."),
    ] = "both",
    since: Annotated[str | None, typer.Option(help="Only results of this day and later, such as 2026-05-31.")] = None,
    until: Annotated[str | None, typer.Option(help="Only results of this day and earlier.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per result.")] = False,
    **queries: list[str] | None,
) -> None:
    """Search an index with texts, files, or both, and print the best items."""
    from openimp.commands import run_search

    run_search(
        index,
        texts or [],
        minus or [],
        queries,
        modalities=modality,
        under=under,
        k=k,
        min_score=min_score,
        by=by,
        since=since,
        until=until,
        as_json=json,
    )


@app.command()
def serve(
    what: Annotated[Path, typer.Argument(help="An index. Or a run or openimp:base: their data is indexed first.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0: any free port.")] = 8000,
    name: Annotated[
        list[str] | None,
        typer.Option(help="A name of this machine in browsers, such as search.example.org. Can be repeated."),
    ] = None,
    media: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="Also show files below this folder, if you did not index it on this machine. Can be repeated.",
        ),
    ] = None,
    allow_sources: AllowSourcesOption = False,
) -> None:
    """Serve a web page to search an index with texts, files and recordings."""
    from openimp.commands import run_serve

    run_serve(what, host, port, name or [], allow_sources, media or [])


@app.command()
def push(
    run: RunArgument,
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hugging Face Hub.")],
    to: Annotated[
        Path | None, typer.Option(help="Write everything to this new folder instead of uploading it.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    license: Annotated[
        str | None, typer.Option(help="The model's license, by the Hub's identifier, such as apache-2.0.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="State the license of a source: sources.NAME.license=LICENSE. Can be repeated."),
    ] = None,
) -> None:
    """Upload a model with a model card to the Hugging Face Hub, so that openimp.load can open it by name."""
    from openimp.inference.publish import push as push_model

    push_model(run, name, to, private, license, overrides=set_ or [])


@app.command()
def export(
    run: Annotated[
        Path,
        typer.Argument(help="A model: a run, a checkpoint, a folder with a model, openimp:base, or hub:OWNER/NAME."),
    ],
    onnx: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to write to.")],
) -> None:
    """Write one ONNX graph per modality, and graphs.json, which describes their inputs and outputs."""
    from openimp.inference.onnx import export as export_graphs

    export_graphs(run, onnx)


@app.command()
def report(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option(help="HTML file.", show_default="RUN/report.html or CHECKPOINT.html")
    ] = None,
    allow_sources: AllowSourcesOption = False,
) -> None:
    """Write one HTML page about a run: curves, use of experts, results, and queries with their answers."""
    from openimp.common.progress import console, track
    from openimp.report.write import write_report

    file = write_report(run, out, track, allow_sources)
    console.print(f"{file}: {file.stat().st_size / 1e6:.2f} MB", soft_wrap=True)


@app.command()
def info(
    what: Annotated[str, typer.Argument(help=f"A recipe; or a model: {MODEL}")],
    set_: SetOption = None,
) -> None:
    """Show parameters and FLOPs of a model or a recipe, and of a run also the FLOPs spent so far and the results."""
    from openimp.commands import run_info

    run_info(what, set_ or [])


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpus: Annotated[
        int | None, typer.Option(help="Number of GPUs; by default, 1 or as many as share a replica.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Type of GPU, for example a100, h100 or h200.")] = "h100",
    mfu: Annotated[float, typer.Option(help="MFU: the share of the bf16 peak that training reaches.")] = 0.4,
) -> None:
    """Compute what a run needs, without a GPU: parameters, memory, FLOPs, communication, days."""
    from openimp.commands import run_plan

    run_plan(recipe, set_ or [], gpus, gpu, mfu)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="A study's YAML file, or the name of a bundled study.")],
    smoke: Annotated[
        bool, typer.Option("--smoke", help="One seed and a few steps, to check that everything works.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/studies"),
    out: Annotated[Path, typer.Option(help="Folder for the page with its plots.")] = Path("docs/results"),
) -> None:
    """Compare variants of a recipe at equal FLOPs, over several seeds. A study that was stopped resumes."""
    # Otherwise torch's profiler, which measures the peak memory, warns of blocks that existed before it.
    # Torch reads the variable when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from openimp.study.run import run_study

    run_study(name, runs, out, smoke)


def _has_workers(name: str, overrides: list[str]) -> bool:
    """Whether `train` starts processes that read data; a guess if the recipe is still to be drafted."""
    from openimp.common.threads import core_count
    from openimp.recipe.file import read_recipe

    has_many_cores = core_count() >= MANY_CORES
    if Path(name).exists() and Path(name).suffix not in (".yaml", ".yml"):
        return has_many_cores
    try:
        recipe, _ = read_recipe(name, overrides)
    except UserError:  # Data that is not on disk, or a mistake that `run_train` names.
        return has_many_cores
    train = recipe.get("train")
    return not isinstance(train, dict) or train.get("num_workers") != 0


def spin_briefly() -> None:
    """Leaves cores to processes that read data while torch's threads wait for each other.

    Otherwise the threads spin for milliseconds. Without such processes, spinning is better: on two cores, a step of a
    small model takes a quarter less time. The variable is read when torch is imported.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main() -> None:
    """Runs a command. Errors that the user can fix are printed in one line, with exit code 2."""
    if sys.argv[1:2] != ["train"]:  # `train` decides by its recipe.
        spin_briefly()
    try:
        app(_with_values([_expanded(argument) for argument in sys.argv[1:]]))
    except UserError as error:
        print(f"openimp: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        from openimp.common.cache import FULL

        # If the disk is full, the error has no file name.
        if error.filename is None and error.errno not in FULL:
            raise
        print(printable(f"openimp: {error.filename or 'disk'}: {error.strerror}"), file=sys.stderr)
        sys.exit(2)


def _expanded(argument: str) -> str:
    """Expands ~ where a shell does not: in quotes, and after --NAME=."""
    option, equals, value = argument.partition("=")
    if option.startswith("--") and value.startswith("~/"):
        return option + equals + os.path.expanduser(value)
    return os.path.expanduser(argument) if argument.startswith("~/") else argument


def _with_values(arguments: list[str]) -> list[str]:
    """Gives a bare --resume an empty value, because typer does not support options with an optional value."""
    with_values = []
    for argument, next_argument in zip(arguments, [*arguments[1:], ""]):
        is_bare = argument == "--resume" and next_argument != "auto"
        with_values.append("--resume=" if is_bare else argument)
    return with_values
