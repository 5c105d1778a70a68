"""Calling functions of tests on several ranks. torchrun runs this file."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from openimp.parallel import distributed
from tests.processes import run, torchrun

COMMON = ["train.precision=fp32", "tasks.heard.batch_size=8", "tasks.named.views.1.batch_size=8", "train.steps=24"]
"""Overrides with which the small recipe of little.py trains alike on 1, 2 and 4 ranks."""


def on(ranks: int, function: Callable[..., Any], *arguments: Path) -> Any:
    """What a function of a test file returns on the first of several ranks, which must be JSON.

    It is also in the folder that is the last argument; see `facts`.
    """
    run(*torchrun(ranks, __file__, function.__code__.co_filename, function.__name__, *arguments), check=True)
    return facts(arguments[-1])


def facts(folder: Path) -> Any:
    return json.loads((folder / "facts.json").read_text())


def main(file: str, name: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    distributed.start()
    paths = [Path(argument) for argument in arguments]
    returned = runpy.run_path(file)[name](*paths)
    if distributed.rank() == 0:
        (paths[-1] / "facts.json").write_text(json.dumps(returned))
    distributed.shut_down()


if __name__ == "__main__":
    main(*sys.argv[1:])
