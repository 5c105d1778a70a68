"""The recipes of published evaluations, on a few small files in the layouts that the data sets have."""

import csv
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import ClassLabel, Dataset, Features, Image

from openimp.commands import run_eval
from openimp.common.json_lines import read_lines
from openimp.evaluation.zero_shot import words
from openimp.inference.evaluate import _with_sets
from tests.messages import refuses

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "evaluation"
VIEWS = {
    "image": "{size: 16}",
    "video": "{size: 16, frames: 2, stride: 1, clips: 2, crops: 3}",
    "audio": "{seconds: 0.512}",
    "text": "{length: 8}",
}


@pytest.fixture
def evaluate(tiny_model_folder, tmp_path):
    """What `openimp eval` finds by a bundled recipe with one source and set of the same name, with small views."""

    def run(name, kinds, path, root=None, sets=None, recipe=None):
        changes = [f"evaluation.sets.{name}.view.{kind}={VIEWS[kind]}" for kind in kinds]
        changes.append(f"sources.{name}={{path: '{path}', root: {root or 'null'}}}")
        out = tmp_path / "results.jsonl"
        run_eval(tiny_model_folder, sets, f"evaluation/{recipe or name}", out, changes)
        return read_lines(out)

    return run


@pytest.fixture
def copy(media_folder):
    """Copies one of three pictures or clips."""

    def make(file: Path, kind: str, i: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(media_folder / f"{i % 3}.{kind}", file)

    return make


@pytest.fixture
def manifest(monkeypatch, capsys, tmp_path):
    """Makes a manifest by the script, as the recipe says."""

    def make(name: str, lists: Path) -> Path:
        monkeypatch.setattr(sys, "argv", ["manifests.py", name, str(lists)])
        capsys.readouterr()
        runpy.run_path(str(FOLDER / "manifests.py"), run_name="__main__")
        file = tmp_path / f"{name}.jsonl"
        file.write_text(capsys.readouterr().out)
        return file

    return make


def write_csv(file: Path, rows) -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("w", newline="") as handle:
        csv.writer(handle).writerows(rows)


@pytest.mark.slow
def test_imagenet(evaluate, copy, tmp_path):
    """Folders are ids; three of a thousand classes are there, and all are chosen from."""
    for i, wnid in enumerate(("n01440764", "n02012849", "n15075141")):
        copy(tmp_path / "val" / wnid / f"ILSVRC2012_val_0000000{i}.JPEG", "png", i)
    (result,) = evaluate("imagenet", ["image"], tmp_path / "val")
    assert (result["n"], result["candidates"], result["chance"]) == (3, 1000, 1 / 1000)
    assert len(result["prompts"]) == 16
    assert result["prompts"][0] == "a photo of a {}."
    copy(tmp_path / "val" / "n99999999" / "x.JPEG", "png", 0)
    with refuses():
        evaluate("imagenet", ["image"], tmp_path / "val")


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_fits_a_model_of_all_modalities(tiny_recipe, file):
    measured, _ = _with_sets(tiny_recipe({"space": "joint"}), str(file), [], None)
    assert measured.evaluation.sets


def test_cifar100(evaluate, media_folder, tmp_path):
    """A Parquet file of the hub's: encoded pictures, and numbers whose names are in the file's schema."""
    names = ["aquarium_fish", "pickup_truck", "wolf"]
    pictures = [{"bytes": (media_folder / f"{i}.png").read_bytes(), "path": None} for i in range(3)]
    data = {"img": pictures * 2, "fine_label": [0, 1] * 3}
    features = Features({"img": Image(), "fine_label": ClassLabel(names=names)})
    Dataset.from_dict(data, features).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    (result,) = evaluate("cifar100", ["image"], f"{tmp_path}/test-*.parquet")
    assert (result["n"], result["candidates"], result["task"]) == (6, 2, "image -> fine_label")


def test_kinetics(evaluate, copy, tmp_path):
    """One of three data sets; the others need not be there."""
    for i, name in enumerate(("abseiling", "air drumming", "tai chi", "abseiling")):
        copy(tmp_path / "val" / name / f"{i}.mp4", "mp4", i)
    (result,) = evaluate("kinetics600", ["video"], tmp_path / "val", sets=["kinetics600"], recipe="kinetics")
    assert (result["set"], result["n"], result["candidates"]) == ("kinetics600", 4, 3)
    assert (result["view"]["video"]["clips"], result["view"]["video"]["crops"]) == (2, 3)


def test_ucf101(evaluate, copy, manifest, tmp_path):
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    tests = [["ApplyEyeMakeup/v_1.avi", "YoYo/v_1.avi"], ["ApplyEyeMakeup/v_2.avi", "YoYo/v_2.avi"], ["YoYo/v_3.avi"]]
    for split, names in enumerate(tests, 1):
        (lists / f"testlist0{split}.txt").write_text("\n".join(names) + "\n")
        (lists / f"trainlist0{split}.txt").write_text("ApplyEyeMakeup/v_9.avi 1\n")
        for i, name in enumerate(names):
            copy(tmp_path / "UCF-101" / name, "mp4", split + i)
    file = manifest("ucf101", lists)
    (result,) = evaluate("ucf101", ["video"], file, tmp_path / "UCF-101")
    assert (result["n"], result["candidates"], result["skipped"]) == (5, 2, 0)
    assert [part["n"] for part in result["splits"].values()] == [2, 2, 1]


def test_hmdb51(evaluate, copy, manifest, tmp_path):
    """The lists of each class and split: 1 is training, 2 is test, 0 is neither; a clip may be in several tests."""
    lists = tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    for label in ("brush_hair", "climb_stairs"):
        for split in (1, 2, 3):
            lines = f"{label}_1.avi 2 \n{label}_2.avi {2 if split == 3 else 0} \n{label}_9.avi 1 \n"
            (lists / f"{label}_test_split{split}.txt").write_text(lines)
        for i in (1, 2):
            copy(tmp_path / "hmdb51" / label / f"{label}_{i}.avi", "mp4", i)
    file = manifest("hmdb51", lists)
    (result,) = evaluate("hmdb51", ["video"], file, tmp_path / "hmdb51")
    assert (result["n"], result["candidates"], result["skipped"]) == (4, 2, 0)
    assert {name: part["n"] for name, part in result["splits"].items()} == {"1": 2, "2": 2, "3": 4}


def test_esc50(evaluate, tmp_path):
    rows = [["filename", "fold", "target", "category", "esc10", "src_file", "take"]]
    (tmp_path / "audio").mkdir()
    for i in range(10):
        name = f"{1 + i % 5}-{i}-A-{i // 5}.wav"
        rows.append([name, 1 + i % 5, i // 5, ["dog", "crying_baby"][i // 5], "True", i, "A"])
        soundfile.write(tmp_path / "audio" / name, np.random.default_rng(i).normal(0, 0.1, 44_100), 44_100)
    write_csv(tmp_path / "meta" / "esc50.csv", rows)
    (result,) = evaluate("esc50", ["audio"], tmp_path / "meta" / "esc50.csv", tmp_path / "audio")
    assert (result["n"], result["candidates"], result["skipped"]) == (10, 2, 0)
    assert {name: part["n"] for name, part in result["splits"].items()} == {str(fold): 2 for fold in range(1, 6)}


def test_msrvtt(evaluate, copy, manifest, tmp_path):
    rows = [["key", "vid_key", "video_id", "sentence"]]
    for i in range(3):
        rows.append([f"ret{i}", f"msr{i}", f"video{7020 + i}", f"a person, and {i} dogs"])
        copy(tmp_path / "videos" / f"video{7020 + i}.mp4", "mp4", i)
    write_csv(tmp_path / "MSRVTT_JSFUSION_test.csv", rows)
    file = manifest("msrvtt", tmp_path / "MSRVTT_JSFUSION_test.csv")
    results = evaluate("msrvtt", ["video", "text"], file, tmp_path / "videos")
    tasks = [(result["task"], result["n"], result["candidates"]) for result in results]
    assert tasks == [("video -> text", 3, 3), ("text -> video", 3, 3)]


def test_coco_has_five_captions_a_picture(evaluate, copy, manifest, tmp_path):
    images = [{"filepath": "train2014", "filename": "x.jpg", "split": "train", "sentences": [{"raw": "no"}]}]
    for i in range(3):
        name = f"COCO_val2014_{i:012}.jpg"
        copy(tmp_path / "val2014" / name, "png", i)
        captions = [{"raw": f"caption {j} of picture {i}"} for j in range(5)]
        images.append({"filepath": "val2014", "filename": name, "split": "test", "sentences": captions})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    file = manifest("coco", tmp_path / "dataset_coco.json")
    to_text, to_image = evaluate("coco", ["image", "text"], file, tmp_path)
    assert (to_text["task"], to_text["n"], to_text["candidates"]) == ("image -> text", 3, 15)
    assert (to_image["task"], to_image["n"], to_image["candidates"]) == ("text -> image", 15, 3)
    assert to_text["chance"] == to_image["chance"] == 1 / 3


@pytest.mark.parametrize(
    ("label", "spoken"),
    [
        ("brush_hair", "brush hair"),
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("TVShow", "TV show"),
        ("Labrador_retriever", "Labrador retriever"),
        ("step2_left", "step2 left"),
        ("T-shirt", "t-shirt"),
        ("Mp3Player", "mp3 player"),
        ("_", ""),
    ],
)
def test_labels_are_spoken_as_their_words(label, spoken):
    assert words(label) == spoken
