"""Writes the models and the index in tests/fixtures, which show that files of earlier versions are still read.

    python -m tools.write_fixtures

It trains tests/fixtures/recipe.yaml and writes `checkpoint`, `pushed`, `index` and `format-N`, a model in the present
format N. Commit them after a change of a format, and keep the `format-N` of earlier formats as they are. `format-6` is
what `openimp.load(RUN).save` wrote at commit 27e5665.
"""

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import openimp
from openimp.checkpoint.folder import CONFIG, checkpoints
from openimp.inference.publish import push
from openimp.recipe.schema import Recipe
from openimp.search.build import build_index
from openimp.search.folder import METADATA, read_metadata
from openimp.training.trainer import train

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures"


def main() -> None:
    recipe = Recipe.load(FIXTURES / "recipe.yaml")
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        train(recipe, Path("run"))
        shutil.move(checkpoints(Path("run"))[-1], "checkpoint")
        push(Path("checkpoint"), "me/fixture", Path("pushed"), license="mit")
        openimp.load("checkpoint").save("saved")
        build_index("checkpoint", None, "index")
        about = read_metadata(Path("index"))
        assert about is not None
        # Relative to the current folder, because the fixtures are nobody's absolute path.
        text = about.model_copy(update={"model": "checkpoint"}).model_dump_json()
        Path("index", METADATA).write_text(text, encoding="utf-8")
        version = json.loads(Path("saved", CONFIG).read_text(encoding="utf-8"))["format"]
        for name, target in {
            **{name: name for name in ("checkpoint", "pushed", "index")},
            "saved": f"format-{version}",
        }.items():
            shutil.rmtree(FIXTURES / target, ignore_errors=True)
            shutil.copytree(name, FIXTURES / target)


if __name__ == "__main__":
    main()
