"""The command line: a function a command, no logic. A docstring is its help."""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from openimp.common.errors import UserError, printable

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe's YAML file, or a bundled one's name.")]
RunArgument = Annotated[Path, typer.Argument(help="A run, a checkpoint, or a folder with a model.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key of the recipe: KEY=VALUE, such as train.steps=100.")
]
RunOption = Annotated[
    Path | None, typer.Option("--run", "--run-dir", help="Where to write. [default: runs/NAME of the recipe]")
]

AllowSourcesOption = Annotated[
    bool, typer.Option("--allow-sources", help="Let the recipe of a model that you did not train here read any source.")
]


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
    """One sparse Transformer encoder for image, video, audio and text, trained by alternating gradient descent."""


@app.command()
def demo(set_: SetOption = None, run: RunOption = None) -> None:
    """Train and evaluate recipes/demo.yaml on the bundled data: about five minutes on two cores."""
    from openimp.commands import run_demo

    run_demo(set_ or [], run)


@app.command()
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run: RunOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[auto]",
            help="Go on from a run's newest intact checkpoint; on the CPU, bit for bit. auto: start it if it has none.",
        ),
    ] = None,
    allow_changed_data: Annotated[
        bool, typer.Option("--allow-changed-data", help="Resume even if a source is not what it was.")
    ] = False,
) -> None:
    """Train a recipe, evaluate it, and write the run: checkpoints, metrics, results."""
    from openimp.commands import run_train

    run_train(recipe, set_ or [], run, resume, allow_changed_data)


@app.command()
def eval(
    run: RunArgument,
    sets: Annotated[list[str] | None, typer.Argument(help="Evaluation sets of the recipe. [default: all]")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Take sources and sets from this recipe, not the run's.")
    ] = None,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Append the results here too, as JSON lines.")] = None,
    allow_sources: AllowSourcesOption = False,
) -> None:
    """Measure a trained model: zero-shot classification, class heads, retrieval and probes, beside chance."""
    from openimp.commands import run_eval

    run_eval(run, sets, recipe, out, set_, allow_sources)


@app.command()
def embed(
    run: RunArgument,
    files: Annotated[list[Path], typer.Argument(help="Files, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", help="The Parquet file to write.")] = Path("embeddings.parquet"),
    modality: Annotated[str | None, typer.Option(help="What the files are. [default: told by their endings]")] = None,
    towards: Annotated[str | None, typer.Option(help="The modality to compare with, in a disjoint space.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Files encoded at once.")] = 64,
) -> None:
    """Write the embeddings of files, with their paths, to a Parquet file."""
    from openimp.inference.embed import embed as embed_files

    embed_files(run, files, out, modality=modality, towards=towards, batch_size=batch_size)


@app.command()
def report(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file. [default: RUN/report.html, or CHECKPOINT.html]")
    ] = None,
    allow_sources: AllowSourcesOption = False,
) -> None:
    """Write one HTML page about a run: its curves, experts, results beside chance, and answers to look at."""
    from openimp.commands import run_report

    run_report(run, out, allow_sources)


@app.command()
def info(
    what: Annotated[str, typer.Argument(help="A run, a model's folder, or a recipe.")], set_: SetOption = None
) -> None:
    """Show a model's parameters and a recipe's mixture; of a run, also what it has spent and its results."""
    from openimp.commands import run_info

    run_info(what, set_ or [])


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpus: Annotated[int, typer.Option("--gpus", help="How many share each batch.")] = 256,
    gpu: Annotated[str, typer.Option("--gpu", help="Of which kind, such as a100, h100, h200.")] = "h100",
    mfu: Annotated[float, typer.Option("--mfu", help="Share of its bf16 peak that training reaches.")] = 0.4,
) -> None:
    """Say what a training would need, without any GPU: parameters, memory, FLOPs, communication, days."""
    from openimp.commands import run_plan

    run_plan(recipe, set_ or [], gpus, gpu, mfu)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="A study's YAML file, or a bundled one's name.")],
    smoke: Annotated[
        bool, typer.Option("--smoke", help="One seed and a few steps, to see that all of it works.")
    ] = False,
    runs: Annotated[Path, typer.Option("--runs", help="Where the trainings are kept.")] = Path("runs/studies"),
    out: Annotated[Path, typer.Option("--out", help="Where the table and the plot go.")] = Path("docs/results"),
) -> None:
    """Compare variants of a recipe at equal FLOPs, over seeds; started again, it goes on where it stopped."""
    from openimp.study.run import run_study

    run_study(name, runs, out, smoke)


def main() -> None:
    """Runs a command; what the user can mend, files that cannot be used too, is told in one line, with exit code 2."""
    # Threads of torch's that wait for one another would keep the cores busy for milliseconds that the loader's workers
    # could use; on two cores with one worker they cost the demo's steps time. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app(_with_values(sys.argv[1:]))
    except UserError as error:
        print(f"openimp: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # A write to a full disk does not say where.
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(printable(f"openimp: {where}{error.strerror}"), file=sys.stderr)
        sys.exit(2)


def _with_values(arguments: list[str]) -> list[str]:
    """A bare --resume gets an empty value, for typer has no options whose value may be left out: what click has for
    that, flag_value, it does not pass on."""
    following = [*arguments[1:], ""]
    return [f"{it}=" if it == "--resume" and after != "auto" else it for it, after in zip(arguments, following)]


if __name__ == "__main__":
    main()
