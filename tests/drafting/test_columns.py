"""Which columns a drafted task reads, and which rows it holds out."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from openimp.drafting.assembling import source_name
from openimp.drafting.columns import inspect, open_candidate
from openimp.drafting.draft import draft_recipe, find_tasks
from openimp.drafting.finding import Candidate
from openimp.drafting.splitting import split_task
from openimp.recipe.file import RecipeLoader
from tests.messages import refuses


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, media_folder):
    """The current folder, with small files: 0.png, 1.wav, 2.mp4 and so on."""
    monkeypatch.chdir(tmp_path)
    for file in media_folder.iterdir():
        if file.suffix != ".txt":
            Path(file.name).write_bytes(file.read_bytes())


def write(rows, name="data.jsonl"):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def numbered(count, **columns):
    """Rows of a picture and of other columns: texts with the row's number in place of {}, or values that repeat."""
    return [
        {"file": "0.png"}
        | {name: of.format(i) if isinstance(of, str) else of[i % len(of)] for name, of in columns.items()}
        for i in range(count)
    ]


def tasks(rows, text=None, label=None):
    write(rows)
    return inspect(Candidate({"path": "data.jsonl"}), text, label)[0]


def copy(source, target):
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_bytes(Path(source).read_bytes())


def copies(count, kind="png"):
    """The names of this many files."""
    names = [f"copy{i}.{kind}" for i in range(count)]
    for name in names:
        copy(f"0.{kind}", name)
    return names


SPARSE = ["a caption", *[None] * 4]
WORDS = {name: name + " {}" for name in ("name", "title", "caption")} | {"label": [0, 1]}
THREE = ["owl", "hen", "jay"]


@pytest.mark.parametrize(
    ("columns", "chosen", "expected"),
    [
        ({"image_caption": "a cat {}"}, {}, ("image_caption", None)),
        ({"json.text": [*map(str, range(29)), "one"]}, {}, ("json.text", None)),
        ({"captions": [["a cat", "a pet"], ["a dog"]]}, {}, ("captions", None)),
        ({"species": ["cat", "dog"]}, {}, ("species", "species")),
        ({"name": ["cat", "dog"]}, {}, ("name", "name")),
        ({"caption": SPARSE, "label": ["cat", "dog"]}, {}, ("label", "label")),
        ({"caption": SPARSE, "label": ["cat", "dog"]}, {"text": "caption"}, ("caption", "label")),
        ({"caption": SPARSE, "label": [0, 1]}, {}, ("caption", "label")),  # numbers are no texts
        ({"caption": [None, *(f"text {i}" for i in range(29))], "label": ["cat", "dog"]}, {}, ("caption", "label")),
        (WORDS | {"category": ["a", "b"]}, {}, ("caption", "category")),
        (WORDS, {"text": "title", "label": "label"}, ("title", "label")),
        (
            {"species": "a species {}", "label": ["wild", "tame"], "caption": "{}"},
            {"text": "species"},
            ("species", "label"),
        ),
        ({"species": THREE, "label": ["wild", "tame"]}, {"text": "species"}, ("species", "label")),
        ({"species": THREE}, {"text": "species"}, ("species", "species")),
        (
            {"it shows": "{} dogs", "colour": ["a", "b"]},
            {"text": "it shows", "label": "colour"},
            ("it shows", "colour"),
        ),
    ],
)
def test_names_and_values_tell_which_columns_are_the_text_and_the_class(columns, chosen, expected):
    (task,) = tasks(numbered(30, **columns), **chosen)
    assert (task.text.name, task.label and task.label.name) == expected


def test_true_and_false_are_classes_without_names():
    (task,) = tasks(numbered(30, label=[True, False]))
    assert (task.label.name, task.label.are_numbers) == ("label", True)


def test_a_label_that_is_chosen_but_missing_is_told():
    with refuses():
        tasks(numbered(6, label=["a", "b"]), label="color")


def test_lists_of_captions_may_be_padded():
    (task,) = tasks(numbered(30, captions=[["a cat", None], ["a dog", "it sits"], [None, ""]]))
    assert task.text.name == "captions"
    assert {*task.text.sample} == {"a cat", "a dog", "it sits"}
    assert task.text.bad == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "rows",
    [
        numbered(3, what="text {}", id=[0, 1, 2]),
        numbered(3, label=["cat"]),
        numbered(27, label=["a", "b", None]),
        numbered(9, label=[*range(9)]),
        numbered(9, label=[[1], [2]]),
        numbered(3, text="17"),
        [{"text": f"row {i}"} for i in range(3)],
        numbered(3, file="gone{}.png", text="a"),
        numbered(8, file=["0.png", "0.wav"], text="a"),
        [{"1.png": "0.png", "cat": "dog"}] * 4,  # The first row was taken for the header.
        [{"file": "0.png", "caption": {"en": "a cat"}}] * 4,
    ],
)
def test_what_cannot_be_trained_on_is_told(rows):
    with refuses():
        tasks(rows)


def test_empty_texts_and_unusual_names_of_classes_are_told():
    write(numbered(60, caption=[f"a cat {i}" if i % 3 else "" for i in range(60)]))
    assert find_tasks(["data.jsonl"])[1] == [
        "found data.jsonl: 60 rows, image in file, text in caption (empty in 33% of the rows)"
    ]
    write(numbered(60, label=["Cat", "dog", "cat"]))
    (line,) = find_tasks(["data.jsonl"])[1]
    assert "3 classes in label ('Cat' and 'cat' count as two)" in line
    write(numbered(60, label=["iPhone", "GoldenRetriever"]))
    (line,) = find_tasks(["data.jsonl"])[1]
    assert "2 classes in label ('GoldenRetriever' is one word to the model; underscores or" in line


def test_what_is_wrong_with_files_is_told():
    write(numbered(60, label=["cat", "dog", "cow"]))  # All rows name the same file.
    first_line = find_tasks(["data.jsonl"])[1][0]
    assert "3 classes in label (1 file of several classes: openimp reads whole files" in first_line
    files = copies(50)
    write([{"file": file, "caption": f"a cat {i}"} for i, file in enumerate([*files, *["gone.png"] * 10])])
    assert "image in file (16% of a sample cannot be used: gone.png: No such file" in find_tasks(["data.jsonl"])[1][0]
    write([{"id": "0", "caption": "a cat"}, {"id": "1", "caption": "a dog"}])
    with refuses():
        find_tasks(["data.jsonl"])


def test_rows_without_a_file_or_a_text_are_counted():
    (task,) = tasks(numbered(32, file=["gone.png", *["0.png"] * 7], caption=[None, "a", "b", "c"]))
    assert (task.media.bad, task.text.bad) == (1 / 8, 1 / 4)


def test_of_folders_with_the_same_names_the_one_named_like_the_table_is_read():
    for folder in ("augmented", "test", "train"):
        for number in range(12 if folder == "train" else 6):
            copy("0.png", f"data/{folder}/{number}.png")
    for table, rows in {"train": 6, "test": 6, "all-1": 12, "all-2": 12}.items():
        write([{"file": f"{i}.png", "text": f"a {i}"} for i in range(rows)], f"data/{table}.jsonl")
    for table, root in {"train": "train", "test": "test", "all-*": "train"}.items():
        ((task,), _) = inspect(Candidate({"path": f"data/{table}.jsonl"}), None, None)
        assert task.source["root"] == f"data/{root}"


def test_paths_may_start_at_a_folder_beside_that_of_the_table_in_a_folder_that_was_named():
    for i in range(60):
        copy(f"{i % 3}.wav", f"ESC/audio/{i}.wav")
    write([{"filename": f"{i}.wav", "category": "cat" if i % 2 else "dog"} for i in range(60)], "ESC/meta/esc.jsonl")
    (named,), _ = find_tasks(["ESC"])
    assert named.task.source == {"path": "ESC/meta/esc.jsonl", "root": "ESC/audio"}
    with refuses():
        find_tasks(["ESC/meta/esc.jsonl"])


def test_a_table_named_metadata_takes_the_name_of_its_folder(tmp_path, monkeypatch):
    for table in ("metadata.csv", "train/Metadata.csv", "2024/01.jsonl"):
        assert source_name(f"Pets/{table}") == "pets"
    assert source_name("Pets/photo_metadata.csv") == "photo_metadata"
    assert source_name("metadata.csv") == "metadata", "there is no such file, so its folder is not known"
    (tmp_path / "Cats").mkdir()
    monkeypatch.chdir(tmp_path / "Cats")
    Path("metadata.csv").touch()
    assert source_name("metadata.csv") == source_name(".") == "cats"


def test_paths_may_start_at_a_folder_beside_the_table_also_of_a_test_split():
    for part in ("train", "test"):
        copy("0.png", f"set/{part}/images/0.png")
        write(numbered(3, caption=part + " {}"), f"set/{part}/list.jsonl")
    ((_, _, divided),), _ = find_tasks(["set"])
    assert (divided.train["root"], divided.test["root"]) == ("set/train/images", "set/test/images")


@pytest.mark.parametrize(
    ("column", "rows", "files", "columns"),
    [
        ("caption", 200, 200, {"caption": [f"Caption  {i}" for i in range(50)]}),
        ("file", 150, 30, {"caption": "text {}"}),
        ("speaker", 300, 300, {"text": "row {}", "speaker": [*range(30)]}),
        ("speaker", 300, 300, {"text": "row {}", "speaker": [*"abcdef"]}),
    ],
)
def test_equal_captions_files_and_speakers_are_never_in_both_parts(column, rows, files, columns):
    train, test = held_out(numbered(rows, file=copies(files), **columns), column)
    assert not train & test
    assert len(train | test) == len(set(columns.get(column, range(files))))


def test_equal_pictures_in_a_table_are_never_in_both_parts():
    """As in tables with a row per caption. The bytes count, not the names, which may differ."""
    pictures = [Path("0.png").read_bytes() + bytes([i]) for i in range(60)]
    rows = [
        {"image": {"bytes": picture, "path": f"{i}-{caption}.png"}, "caption": f"caption {caption} of {i}"}
        for i, picture in enumerate(pictures)
        for caption in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), "pictures.parquet")
    (task,) = inspect(Candidate({"path": "pictures.parquet"}), None, None)[0]
    divided = split_task(task)
    train, test = (
        {cell["bytes"] for cell in open_candidate(source).column("image")} for source in (divided.train, divided.test)
    )
    assert not train & test
    assert train | test == {*pictures}
    assert divided.item == "image"
    rows = [
        {"image": None if i in (3, 9) else {"bytes": picture, "path": None}, "caption": f"caption {i // 2}"}
        for i, picture in enumerate(pictures)
    ]
    pq.write_table(pa.Table.from_pylist(rows), "pictures.parquet")
    (task,) = inspect(Candidate({"path": "pictures.parquet"}), None, None)[0]
    assert split_task(task).item == "caption", "missing pictures are not equal"


def test_what_repeats_in_a_table_decides_what_is_a_positive():
    def objective(**columns):
        write(numbered(60, **columns))
        recipe = yaml.load(draft_recipe(["data.jsonl"]).text, RecipeLoader)
        return recipe["tasks"]["data"]["objectives"][0]

    files = [*copies(59), "copy0.png"]
    assert objective(file=files, caption=[f"finding {i}" for i in range(30)]) | {"type": ""} == {
        "type": "", "positives_by": "file", "positives_in": "caption"
    }  # fmt: skip
    assert objective(file=files, caption="a caption {}").keys() == {"type", "positives_by"}


def test_columns_of_captions_that_differ_in_a_number_are_all_trained_on():
    write(numbered(30, file=copies(30), **{f"caption_{i}": f"caption {i} of {{}}" for i in range(3)}))
    draft = draft_recipe(["data.jsonl"])
    recipe = yaml.load(draft.text, RecipeLoader)
    assert recipe["tasks"]["data"]["inputs"]["text"] == ["caption_0", "caption_1", "caption_2"]
    assert not [note for note in draft.notes if "not used" in note]
    write(numbered(40, file=copies(40), name_1=["cat", "dog"], name_2="a text {}"))
    recipe = yaml.load(draft_recipe(["data.jsonl"]).text, RecipeLoader)
    assert recipe["tasks"]["data"]["inputs"]["text"] == "name_2", "the names of classes are no captions"


def test_rows_that_are_not_used_are_told():
    write(numbered(40, file=copies(40), caption="text {}", split=["train", "train", "val", "restval"]))
    notes = draft_recipe(["data.jsonl"]).notes
    assert [note for note in notes if "rows with restval are not used" in note]


def test_captions_of_parts_of_a_recording_are_told():
    rows = numbered(40, file=["0.png"], caption="text {}")
    for i, row in enumerate(rows):
        copy("1.wav", f"copy{i % 2}.wav")
        row["file"] = f"copy{i % 2}.wav"
    told = "2 files of several texts: openimp reads whole files, so cut them first"
    write(rows)
    assert told not in "\n".join(find_tasks(["data.jsonl"])[1])
    write([row | {"start_time": i} for i, row in enumerate(rows)])
    assert told in "\n".join(find_tasks(["data.jsonl"])[1])


def test_texts_that_are_classes_are_in_both_parts():
    train, test = held_out(numbered(400, file=copies(400), name=[f"class {i}" for i in range(20)]), "name")
    assert test <= train


def test_the_held_out_part_of_few_rows_has_as_many_classes_as_any():
    for seed in range(5):
        rows = numbered(45, file=copies(45), label=["a", "b", "c"], caption=f"text {seed} {{}}")
        train, test = held_out(rows, "label")
        assert train == test == {"a", "b", "c"}


def test_a_large_group_is_not_held_out_for_its_many_classes():
    speakers = ["most"] * 60 + [f"s{i}" for i in range(8) for _ in range(5)]
    labels = [f"class {i % 6}" for i in range(60)] + [f"class {i % 2}" for i in range(40)]
    train, _ = held_out(numbered(100, file=copies(100), speaker=speakers, label=labels), "speaker")
    assert "most" in train


def held_out(rows, column):
    """The values of a column in the rows that the only task trains on, and in those that it holds out."""
    (task,) = tasks(rows)
    divided = split_task(task)
    train, test = (set(open_candidate(source).column(column)) for source in (divided.train, divided.test))
    assert train
    assert test
    return train, test


def test_a_text_that_one_task_holds_out_is_not_trained_on_by_another():
    rows = numbered(60, file=copies(60), sound=copies(30, "wav"), caption="text {}")
    image, audio = map(split_task, tasks(rows))
    assert image.test["part"] == audio.test["part"]


@pytest.mark.parametrize("count", [60, 3])
def test_few_items_are_all_trained_on(count):
    divided = split_task(*tasks(numbered(count, file=["0.png", "1.png", "2.png"], caption="text {}")))
    assert (divided.test, divided.rows) == (None, count)
    assert divided.why.startswith("too few different values of ")


@pytest.mark.parametrize(("items", "parts"), [(36, 5), (160, 8), (500, 10)])
def test_twenty_items_are_held_out_if_they_are_at_most_a_fifth(items, parts):
    rows = numbered(3 * items, text=[f"text {i}" for i in range(items)])
    for row, file in zip(rows, copies(len(rows))):
        row["file"] = file
    (task,) = tasks(rows)
    assert split_task(task).test["part"]["of"] == parts


def test_a_split_column_is_used():
    divided = split_task(*tasks(numbered(30, text="row {}", split=["Train", "val", "test"])))
    assert (divided.train["where"], divided.test["where"]) == ({"split": ["Train"]}, {"split": ["val"]})
    assert "its test rows are left" in divided.why


def test_a_head_that_lacks_classes_of_the_split_for_evaluation_is_told():
    write(numbered(60, label=["0", "1", "2"], split=["train", "train", "val"]))
    assert draft_recipe(["data.jsonl"]).notes[-1].startswith("data: the rows for evaluation have classes that training")


def test_a_test_split_without_classes_is_not_used():
    files = copies(40)
    write(numbered(40, file=files, label=["cat", "dog"]), "train.jsonl")
    write(numbered(40, file=files, label=[None]), "test.jsonl")
    ((_, _, divided),), _ = find_tasks(["train.jsonl", "test.jsonl"])
    assert divided.test["path"] == "train.jsonl"


def test_a_source_that_cannot_be_read_does_not_hide_the_others():
    write(numbered(3, file=["../0.png"], text="row {}"), "set/outside.jsonl")
    write(numbered(3, text="row {}"), "set/good.jsonl")
    copy("0.png", "set/0.png")
    Path("set/broken.parquet").write_bytes(b"no parquet")
    Path("set/empty.csv").write_text("")
    named, notes = find_tasks(["set"])
    assert [task.task.candidate.place for task in named] == ["set/good.jsonl"]
    for part in ("broken.parquet is not a readable Parquet file", "empty.csv", "set/outside.jsonl"):
        assert part in "\n".join(notes)
    with refuses():
        find_tasks(["set/broken.parquet"])
    copy("0.png", "table/0.png")
    Path("table/broken.csv").write_text("file;caption\n0.png;a cat\n")
    with refuses():
        find_tasks(["table"])


def test_a_table_of_something_else_does_not_hide_the_media_of_a_folder():
    for color in ("red", "blue"):
        Path("mixed", color).mkdir(parents=True)
        for i in range(4):
            shutil.copy("0.png", f"mixed/{color}/{i}.png")
    Path("mixed/red/costs.csv").write_text("date,costs\n2026-05-01,7\n", encoding="utf-8")
    (named,), lines = find_tasks(["mixed"])
    assert named.task.label.classes == ["blue", "red"]
    assert "not used: mixed/red/costs.csv: no column holds media; the others are date, costs" in lines


def test_a_folder_without_texts_says_what_to_add_and_may_use_the_names_of_its_files():
    names = ["a red bicycle", "two dogs"]
    for name in names:
        copy("0.png", f"flat/{name}.png")
    with refuses():
        find_tasks(["flat"])
    ((_, task, _),), _ = find_tasks(["flat"], "name")
    assert task.text.sample == names
    for name in names:
        Path(f"flat/{name}.txt").write_bytes("grün".encode("latin-1"))
    Path("flat/captions.json").write_text("[]")
    with refuses():
        find_tasks(["flat"])


def test_the_first_part_of_the_names_of_files_may_be_the_class():
    """Which also a template may use, and which is a text even if it is a number, because the user names the column."""
    for name in ("7_theo_0", "7_theo_1", "3-lucas-0", "3.lucas.1"):
        copy("1.wav", f"flat/{name}.wav")
    ((_, task, _),), _ = find_tasks(["flat"], label="prefix")
    assert sorted(task.label.classes) == ["3", "7"]
    assert (task.text.name, task.text.distinct) == ("prefix", 0)


def test_a_file_whose_name_is_not_utf8_is_skipped(capsys):
    for name in (b"cat/0", b"cat/\xff", b"dog/0", b"dog/1"):
        copy("0.png", Path("named", f"{name.decode(errors='surrogateescape')}.png"))
    copy("1.png", Path("named", "cat", "1.png"))
    assert find_tasks(["named"])
    assert "skipped 1 file with a name that is not UTF-8" in capsys.readouterr().err
