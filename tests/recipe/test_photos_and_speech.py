"""The recipe photos_and_speech on small made data of the layouts that it reads: on the hub, and as local copies."""

import subprocess
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openimp.common.json_lines import read_lines
from openimp.recipe.file import find_file
from openimp.recipe.schema import Recipe
from tests import local_copies
from tests.local_copies import PHOTOS, picture, sound

pytestmark = pytest.mark.slow

QUICK = ["train.steps=4", "train.num_workers=0", "tasks.photos.batch_size=8", "tasks.digits.batch_size=8",
         "tasks.notes.batch_size=8", "sources.notes.limit=16", "sources.notes_test.limit=8"]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub-cache")


def sets_of(run: Path) -> set[str]:
    return {result["set"] for result in read_lines(run / "results.jsonl")}


def changes() -> list[str]:
    return [part for change in QUICK for part in ("--set", change)]


def test_the_layouts_of_the_hub_train_and_are_evaluated(openimp):
    """Pictures with a column of classes, and sounds with the digit as a number; `init` knows both, too."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=PHOTOS)})
    for split, rows in (("train", 24), ("test", 12)):
        Path("cifar10").mkdir(exist_ok=True)
        Path("digits").mkdir(exist_ok=True)
        photos = {"img": [picture(i) for i in range(rows)], "label": [i % 3 for i in range(rows)]}
        datasets.Dataset.from_dict(photos, features=features).to_parquet(f"cifar10/{split}.parquet")
        digits = {"audio": [sound(i) for i in range(rows)], "label": [i % 3 for i in range(rows)]}
        pq.write_table(pa.table(digits), f"digits/{split}.parquet")
    names = {"photos": "cifar10", "digits": "digits"}
    hub = [f"sources.{task}{part}.hub={name}" for task, name in names.items() for part in ("", "_test")]
    flags = [part for change in hub for part in ("--set", change)]
    code, _, err = openimp("train", "photos_and_speech", *changes(), *flags)
    assert code == 0, err
    assert sets_of(Path("runs/photos_and_speech")) == Recipe.load("photos_and_speech").evaluation.sets.keys()
    for name, found in (
        ("cifar10", "image in img, 3 classes in label"),
        ("digits", "audio in audio, 3 classes in label"),
    ):
        code, _, err = openimp("init", f"hub:{name}")
        assert (code, found in err) == (0, True), err


def test_the_command_in_its_comment_reads_local_copies(openimp):
    Path("recipes").mkdir()
    Path("studies").mkdir()
    commands = []
    for folder, kind in (("recipes", "recipe"), ("studies", "study")):
        text = find_file("photos_and_speech", folder, kind).read_text(encoding="utf-8")
        Path(folder, "photos_and_speech.yaml").write_text(text, encoding="utf-8")
        comment = [line.removeprefix("#") for line in text.splitlines() if line[:1] == "#"]
        start = next(i for i, line in enumerate(comment) if line.strip().startswith("sed"))
        commands.append("\n".join(comment[start : start + 3]).partition("&&")[0])
    local_copies.write(Path())
    for command in commands:
        subprocess.run(command, shell=True, check=True)
    code, _, err = openimp("train", "local.yaml", *changes())
    assert code == 0, err
    assert {"photos", "digits_classes", "notes"} < sets_of(Path("runs/photos_and_speech"))
    code, _, err = openimp("study", "study.yaml", "--smoke")
    assert code == 0, err
    page = Path("docs/results/study-smoke.md").read_text(encoding="utf-8")
    assert (
        "| arm | mean | photos | photos classes | digits | digits classes | notes | photos probe | digits probe |"
        in page
    )
