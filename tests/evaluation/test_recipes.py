"""The recipes of published evaluations, on a few small files in the layouts that the data sets have."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import soundfile

from openimp.commands import run_eval
from openimp.common.errors import UserError
from openimp.evaluation.zero_shot import words
from openimp.recipe.file import find_file

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "evaluation"
SMALL = {
    "image": "{size: 16}",
    "video": "{size: 16, frames: 2, stride: 1, clips: 2, crops: 3}",
    "audio": "{seconds: 0.512}",
}


@pytest.fixture
def evaluate(tiny_model_folder, tmp_path):
    """What `openimp eval` finds by a bundled recipe, with small views."""

    def run(name, views, *changes, sets=None):
        views = [f"evaluation.sets.{which}.view.{side}={SMALL[side]}" for which, side in views.items()]
        out = tmp_path / "found.jsonl"
        run_eval(tiny_model_folder, sets, f"evaluation/{name}", out, [*views, *changes])
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


def picture(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 30, 3), np.uint8)).save(file)


def film(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for pixels in np.random.default_rng(seed).integers(0, 256, (4, 32, 48, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def manifest(name: str, lists: Path, out: Path) -> list[dict]:
    """Made by the script, as the recipe says."""
    command = [sys.executable, str(FOLDER / "manifests.py"), name, str(lists)]
    out.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_imagenet(evaluate, tmp_path):
    """Folders are ids; three of a thousand classes are there, and all are chosen from."""
    for i, wnid in enumerate(("n01440764", "n02012849", "n15075141")):
        picture(tmp_path / "val" / wnid / f"ILSVRC2012_val_0000000{i}.JPEG", i)
    (found,) = evaluate("imagenet", {"imagenet": "image"}, f"sources.imagenet.path={tmp_path / 'val'}")
    assert (found["n"], found["candidates"], found["chance"]) == (3, 1000, 1 / 1000)
    assert len(found["prompts"]) == 16
    assert found["prompts"][0] == "a photo of a {}."
    picture(tmp_path / "val" / "n99999999" / "x.JPEG", 0)
    with pytest.raises(UserError, match="'n99999999' is not among the classes"):
        evaluate("imagenet", {"imagenet": "image"}, f"sources.imagenet.path={tmp_path / 'val'}")


def test_cifar100(evaluate, tmp_path):
    """A Parquet file of the hub's: encoded pictures, and numbers whose names are in the file's schema."""
    from datasets import ClassLabel, Dataset, Features, Image

    names = ["aquarium_fish", "pickup_truck", "wolf"]
    for i in range(6):
        picture(tmp_path / f"{i}.png", i)
    data = {"img": [str(tmp_path / f"{i}.png") for i in range(6)], "fine_label": [i % 2 for i in range(6)]}
    features = Features({"img": Image(), "fine_label": ClassLabel(names=names)})
    Dataset.from_dict(data, features).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    (found,) = evaluate("cifar100", {"cifar100": "image"}, f"sources.cifar100={{path: '{tmp_path}/test-*.parquet'}}")
    assert (found["n"], found["candidates"], found["task"]) == (6, 2, "image -> fine_label")


def test_kinetics(evaluate, tmp_path):
    """One of three data sets; the others need not be there."""
    for i, name in enumerate(("abseiling", "air drumming", "tai chi", "abseiling")):
        film(tmp_path / "val" / name / f"{i}.mp4", i)
    change = f"sources.kinetics600.path={tmp_path / 'val'}"
    (found,) = evaluate("kinetics", {"kinetics600": "video"}, change, sets=["kinetics600"])
    assert (found["set"], found["n"], found["candidates"]) == ("kinetics600", 4, 3)
    assert (found["view"]["video"]["clips"], found["view"]["video"]["crops"]) == (2, 3)


def test_ucf101(evaluate, tmp_path):
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    tests = [["ApplyEyeMakeup/v_1.avi", "YoYo/v_1.avi"], ["ApplyEyeMakeup/v_2.avi", "YoYo/v_2.avi"], ["YoYo/v_3.avi"]]
    for split, names in enumerate(tests, 1):
        (lists / f"testlist0{split}.txt").write_text("\n".join(names) + "\n")
        (lists / f"trainlist0{split}.txt").write_text("ApplyEyeMakeup/v_9.avi 1\n")
    for i, name in enumerate(name for names in tests for name in names):
        film(tmp_path / "UCF-101" / name, i)
    rows = manifest("ucf101", lists, tmp_path / "ucf101.jsonl")
    assert rows[0] == {"file": "ApplyEyeMakeup/v_1.avi", "label": "ApplyEyeMakeup", "splits": [1]}
    changes = [f"sources.ucf101.path={tmp_path / 'ucf101.jsonl'}", f"sources.ucf101.root={tmp_path / 'UCF-101'}"]
    (found,) = evaluate("ucf101", {"ucf101": "video"}, *changes)
    assert (found["n"], found["candidates"], found["skipped"]) == (5, 2, 0)
    assert [part["n"] for part in found["splits"].values()] == [2, 2, 1]
    assert found["top1"] == pytest.approx(np.mean([part["top1"] for part in found["splits"].values()]))


def test_hmdb51(evaluate, tmp_path):
    """The lists of each class and split: 1 is training, 2 is test, 0 is neither; a clip may be in several tests."""
    lists = tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    for label in ("brush_hair", "climb_stairs"):
        for split in (1, 2, 3):
            parts = [f"{label} 1.avi".replace(" ", "_") + " 2 \n", f"{label}_2.avi {2 if split == 3 else 0} \n"]
            (lists / f"{label}_test_split{split}.txt").write_text("".join([*parts, f"{label}_9.avi 1 \n"]))
        for i in (1, 2):
            film(tmp_path / "hmdb51" / label / f"{label}_{i}.avi", i + len(label))
    rows = manifest("hmdb51", lists, tmp_path / "hmdb51.jsonl")
    assert [(row["file"], row["splits"]) for row in rows[:2]] == [
        ("brush_hair/brush_hair_1.avi", [1, 2, 3]),
        ("brush_hair/brush_hair_2.avi", [3]),
    ]
    changes = [f"sources.hmdb51.path={tmp_path / 'hmdb51.jsonl'}", f"sources.hmdb51.root={tmp_path / 'hmdb51'}"]
    (found,) = evaluate("hmdb51", {"hmdb51": "video"}, *changes)
    assert (found["n"], found["candidates"], found["skipped"]) == (4, 2, 0)
    assert {name: part["n"] for name, part in found["splits"].items()} == {"1": 2, "2": 2, "3": 4}


def test_esc50(evaluate, tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "audio").mkdir()
    with (tmp_path / "meta" / "esc50.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filename", "fold", "target", "category", "esc10", "src_file", "take"])
        for i in range(10):
            name = ["dog", "crying_baby"][i // 5]
            table.writerow([f"{1 + i % 5}-{i}-A-{i // 5}.wav", 1 + i % 5, i // 5, name, "True", i, "A"])
            sound = np.random.default_rng(i).normal(0, 0.1, 44_100)
            soundfile.write(tmp_path / "audio" / f"{1 + i % 5}-{i}-A-{i // 5}.wav", sound, 44_100)
    changes = [f"sources.esc50.path={tmp_path / 'meta' / 'esc50.csv'}", f"sources.esc50.root={tmp_path / 'audio'}"]
    (found,) = evaluate("esc50", {"esc50": "audio"}, *changes)
    assert (found["n"], found["candidates"], found["skipped"]) == (10, 2, 0)
    assert {name: part["n"] for name, part in found["splits"].items()} == {str(fold): 2 for fold in range(1, 6)}


def test_msrvtt(evaluate, tmp_path):
    with (tmp_path / "MSRVTT_JSFUSION_test.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["key", "vid_key", "video_id", "sentence"])
        for i in range(4):
            table.writerow([f"ret{i}", f"msr{i}", f"video{7020 + i}", f"a person, and {i} dogs"])
            film(tmp_path / "videos" / f"video{7020 + i}.mp4", i)
    rows = manifest("msrvtt", tmp_path / "MSRVTT_JSFUSION_test.csv", tmp_path / "msrvtt.jsonl")
    assert rows[1] == {"file": "video7021.mp4", "caption": "a person, and 1 dogs"}
    changes = [f"sources.msrvtt.path={tmp_path / 'msrvtt.jsonl'}", f"sources.msrvtt.root={tmp_path / 'videos'}"]
    found = evaluate("msrvtt", {"msrvtt": "video"}, "evaluation.sets.msrvtt.view.text={length: 8}", *changes)
    assert [(one["task"], one["n"], one["candidates"]) for one in found] == [
        ("video -> text", 4, 4),
        ("text -> video", 4, 4),
    ]
    assert {"r1", "r5", "r10", "median_rank"} <= found[0].keys()


def test_coco_has_five_captions_a_picture(evaluate, tmp_path):
    images = []
    for i in range(4):
        name = f"COCO_val2014_{i:012}.jpg"
        picture(tmp_path / "val2014" / name, i)
        captions = [{"raw": f"caption {j} of picture {i}"} for j in range(5)]
        images.append({"filepath": "val2014", "filename": name, "split": "test", "sentences": captions})
    images.append({"filepath": "train2014", "filename": "x.jpg", "split": "train", "sentences": [{"raw": "no"}]})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    rows = manifest("coco", tmp_path / "dataset_coco.json", tmp_path / "coco.jsonl")
    assert len(rows) == 20
    changes = [f"sources.coco.path={tmp_path / 'coco.jsonl'}", f"sources.coco.root={tmp_path}"]
    to_text, to_image = evaluate("coco", {"coco": "image"}, "evaluation.sets.coco.view.text={length: 8}", *changes)
    assert (to_text["task"], to_text["n"], to_text["candidates"]) == ("image -> text", 4, 20)
    assert (to_image["task"], to_image["n"], to_image["candidates"]) == ("text -> image", 20, 4)
    assert to_text["chance"] == to_image["chance"] == 1 / 4


@pytest.mark.parametrize("name", ["ucf101", "hmdb51", "msrvtt", "coco"])
def test_other_lists_are_refused(tmp_path, name):
    for wrong in (tmp_path, tmp_path / "nothing"):
        command = [sys.executable, str(FOLDER / "manifests.py"), name, str(wrong)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode
        assert not done.stdout
        assert done.stderr.startswith(str(wrong))
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("label", "spoken"),
    [
        ("brush_hair", "brush hair"),
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("YoYo", "yo yo"),
        ("Biking", "biking"),
        ("TVShow", "TV show"),
        ("dog", "dog"),
        ("aquarium_fish", "aquarium fish"),
        ("air drumming", "air drumming"),
        ("Labrador_retriever", "Labrador retriever"),
        ("shot  on_net", "shot on net"),
        ("step2_left", "step2 left"),
        ("T-shirt", "t-shirt"),
        ("3DModel", "3D model"),
        ("Mp3Player", "mp3 player"),
        ("PlayTV", "play TV"),
        ("_", ""),
    ],
)
def test_labels_are_spoken_as_their_words(label, spoken):
    assert words(label) == spoken


def test_every_recipe_says_how_it_is_used():
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names == {"imagenet", "cifar100", "kinetics", "ucf101", "hmdb51", "esc50", "msrvtt", "coco"}
    for name in names:
        file = find_file(f"evaluation/{name}")
        head = file.read_text(encoding="utf-8").partition("\nsources:")[0]
        for part in ("--recipe evaluation/" + name, "# Data: ", "# The paper: ", "# What differs"):
            assert part in head, f"{file}: {part}"


def test_there_are_sixteen_prompts_of_each_modality():
    for file in (FOLDER / "prompts").glob("*.txt"):
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert len(set(lines)) == len(lines) == 16, file
        assert all(line.count("{}") == 1 for line in lines), file


def test_the_names_of_imagenets_classes_are_distinct():
    lines = (FOLDER / "classes" / "imagenet.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if not line.startswith("#")]
    assert len({label for label, _ in pairs}) == len({name.lower() for _, name in pairs}) == len(pairs) == 1000
    assert [label for label, _ in pairs] == sorted(label for label, _ in pairs)
