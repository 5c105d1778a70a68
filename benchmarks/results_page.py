"""What the pages that benchmarks write into docs/results have in common."""

import argparse
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from openimp.common.versions import openimp_version, processor

RESULTS = Path(__file__).parents[1] / "docs" / "results"


class Row(NamedTuple):
    """A measured figure, and a bar that it has to reach."""

    what: str
    figure: str
    bar: str  # in words; empty if there is none
    reached: bool

    def cells(self) -> list[str]:
        verdict = f"{self.bar}: {'reached' if self.reached else 'NOT reached'}" if self.bar else "none"
        return [self.what, self.figure, verdict]


def make_parser(docstring: str | None) -> argparse.ArgumentParser:
    """A parser with the option --write, which shows the docstring of a benchmark as help."""
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="also write the results into docs/results")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line. `--write` needs a checkout without changes, because the page names its commit."""
    args = parser.parse_args()
    # Checked first, because the checkout may change during the measurement. `openimp_version` caches its result.
    if args.write and "-dirty" in openimp_version():
        parser.error("--write: the page names a commit, but the checkout has uncommitted changes; commit them first")
    return args


def head(title: str, *libraries: str) -> str:
    """The beginning of a page: what wrote it, with which versions of the libraries, and where."""
    script = Path(sys.argv[0])
    # Without the folders of data, because a page must not contain paths of a machine.
    arguments = [Path(argument).name if Path(argument).is_file() else argument for argument in sys.argv[1:]]
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in libraries)]
    return f"""# {title}

Written by `benchmarks/{script.name}`; its docstring describes the measurement.

- Command: `{shlex.join(["python", "-m", f"benchmarks.{script.stem}", *arguments])}`
- openimp: {openimp_version()}
- Versions: {", ".join(versions)}
- Hardware: {processor()}, {os.cpu_count()} cores
"""


def publish(text: str, name: str, write: bool) -> None:
    """Prints a page and, if asked to, writes it to docs/results/NAME.md."""
    print(text)
    if write:
        (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")


def table(*rows: list[str]) -> str:
    """A Markdown table; the first of the rows becomes its header."""
    header, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *body))
