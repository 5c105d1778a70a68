"""Which columns a drafted task reads, and which rows it holds out."""

import json
from pathlib import Path

import pytest

from openimp.common.errors import UserError
from openimp.drafting.columns import inspect, open_candidate
from openimp.drafting.draft import find_tasks
from openimp.drafting.finding import Candidate
from openimp.drafting.splitting import split


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, media_folder):
    """The current folder, with small files: 0.png, 1.wav, 2.mp4 and so on."""
    monkeypatch.chdir(tmp_path)
    for file in media_folder.iterdir():
        if file.suffix != ".txt":
            Path(file.name).write_bytes(file.read_bytes())
    return tmp_path


def write(rows, name="data.jsonl"):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tasks(rows, text=None, label=None):
    write(rows)
    return inspect(Candidate({"path": "data.jsonl"}), text, label)[0]


def copies(count, kind="png"):
    """The names of this many files."""
    names = [f"copy{i}.{kind}" for i in range(count)]
    for name in names:
        Path(name).write_bytes(Path(f"0.{kind}").read_bytes())
    return names


def parts(rows, column):
    """The values of a column in the rows that the only task trains on, and in those that it holds out."""
    (task,) = tasks(rows)
    divided = split(task)
    train, test = (set(open_candidate(source).column(column)) for source in (divided.train, divided.test))
    assert train
    assert test
    return train, test


def test_each_kind_of_media_is_paired_with_the_text():
    rows = [{"a": f"{i % 3}.png", "b": f"{i % 3}.wav", "c": f"{i % 3}.mp4", "caption": f"text {i}"} for i in range(6)]
    found = [(task.media.kind, task.text.template) for task in tasks(rows)]
    assert found == [("image", "caption"), ("audio", "caption"), ("video", "caption")]


@pytest.mark.parametrize(
    ("column", "values", "template"),
    [
        ("image_caption", ["a cat", "a dog"], "image_caption"),
        ("json.text", ["1", "one"], "json.text"),
        ("captions", [["a cat", "it sits"], ["a dog"]], "captions"),
        ("species", ["cat", "dog"], "a photo of a {species}"),
        ("name", ["cat", "dog"] * 10, "a photo of a {name}"),
        ("class_name", ["cat", "dog"], "a photo of a {class_name}"),
    ],
)
def test_names_of_columns_tell_texts_and_classes(column, values, template):
    (task,) = tasks([{"file": "0.png", column: value} for value in [*values, *values]])
    assert task.text.template == template


def test_the_best_text_is_read_and_classes_with_names_are_preferred():
    texts = ("name", "title", "caption")
    rows = [{"file": "0.png", **{text: f"{text} {i}" for text in texts}, "label": i % 2} for i in range(20)]
    (task,) = tasks([{**row, "category": "ab"[i % 2]} for i, row in enumerate(rows)])
    assert (task.text.name, task.label.name) == ("caption", "category")
    (task,) = tasks(rows, text="title", label="label")
    assert (task.text.name, task.label.are_numbers) == ("title", True)


def test_numbers_as_classes_make_no_texts():
    for label in (0, 1), ("0", "1"):
        (task,) = tasks([{"file": "0.png", "label": label[i % 2]} for i in range(4)])
        assert (task.text, task.label.classes) == (None, list(label))


def test_a_chosen_column_may_have_any_name():
    rows = [{"file": "0.png", "what it shows": f"text {i}", "colour": "ab"[i % 2]} for i in range(6)]
    (task,) = tasks(rows, "what it shows", "colour")
    assert (task.text.name, task.label.name) == ("what it shows", "colour")
    with pytest.raises(UserError, match="has no column 'color'; did you mean 'colour'"):
        tasks(rows, label="color")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            [{"file": "0.png", "what": f"text {i}", "id": i} for i in range(3)],
            r"file has image, but no other column \(what, id\) has a name like caption,.* --text COLUMN or --label",
        ),
        ([{"file": "0.png", "label": "cat"}] * 3, r"label: expected a class .* in every row, at least two"),
        ([{"file": "0.png", "label": label} for label in ("a", "b", None) * 9], r"label: expected .* in every row"),
        ([{"file": "0.png", "label": i} for i in range(9)], r"label: expected .* 2 rows per class"),
        ([{"file": "0.png", "label": [[1], [2]][i % 2]} for i in range(9)], r"label: expected a class \(a text or"),
        ([{"file": "0.png", "text": "17"}] * 3, r"no other column \(text\)"),
        ([{"text": f"row {i}"} for i in range(3)], "no column holds media; the others are text"),
        (
            [{"file": f"gone{i}.png", "text": "a"} for i in range(3)],
            r"most of its files cannot be used: .*No such file",
        ),
        ([{"file": f"0.{'wav' if i % 2 else 'png'}", "text": "a"} for i in range(8)], "it mixes kinds of media"),
    ],
)
def test_what_cannot_be_trained_on_is_told(rows, told):
    with pytest.raises(UserError, match=told):
        tasks(rows)


def test_rows_without_a_file_or_a_text_are_counted():
    (task,) = tasks(
        [{"file": "0.png" if i % 8 else "gone.png", "caption": f"row {i}" if i % 4 else None} for i in range(32)]
    )
    assert (task.media.bad, task.text.bad) == (1 / 8, 1 / 4)


def test_paths_may_start_at_a_folder_beside_the_table_also_of_a_test_split():
    for part in ("train", "test"):
        Path("set", part, "images").mkdir(parents=True)
        Path("set", part, "images/0.png").write_bytes(Path("0.png").read_bytes())
        write([{"file": "0.png", "caption": f"{part} {i}"} for i in range(3)], f"set/{part}/list.jsonl")
    ((_, _, divided),), _ = find_tasks(["set"])
    assert (divided.train["root"], divided.test["root"]) == ("set/train/images", "set/test/images")


def test_equal_captions_are_never_in_both_parts():
    seen, unseen = parts([{"file": f, "caption": f"Caption  {i % 50}"} for i, f in enumerate(copies(200))], "caption")
    assert not seen & unseen
    assert len(seen) + len(unseen) == 50


def test_one_file_with_several_captions_is_never_in_both_parts():
    seen, unseen = parts([{"file": f, "caption": f"text {i}"} for i, f in enumerate(copies(30) * 5)], "file")
    assert not seen & unseen


@pytest.mark.parametrize("speakers", [[f"s{i}" for i in range(30)], list(range(30)), list("abcdef")])
def test_rows_of_one_speaker_are_never_in_both_parts(speakers):
    rows = [{"sound": "0.wav", "speaker": speakers[i % len(speakers)], "text": f"row {i}"} for i in range(300)]
    rows = [{**row, "sound": file} for row, file in zip(rows, copies(300, "wav"))]
    seen, unseen = parts(rows, "speaker")
    assert not seen & unseen


def test_texts_that_are_classes_are_in_both_parts():
    seen, unseen = parts([{"file": f, "name": f"class {i % 20}"} for i, f in enumerate(copies(400))], "name")
    assert unseen <= seen


def test_a_text_that_one_task_holds_out_is_not_trained_on_by_another():
    files = zip(copies(60), copies(30, "wav") * 2)
    image, audio = map(split, tasks([{"a": a, "b": b, "caption": f"text {i}"} for i, (a, b) in enumerate(files)]))
    assert image.test["part"] == audio.test["part"]


@pytest.mark.parametrize("files", [["0.png", "1.png", "2.png"] * 20, ["0.png", "1.png", "2.png"]])
def test_few_items_are_all_trained_on(files):
    (task,) = tasks([{"file": file, "caption": f"text {i}"} for i, file in enumerate(files)])
    divided = split(task)
    assert (divided.test, divided.rows) == (None, len(files))
    assert divided.why.startswith("too few different values of ")


def test_a_split_column_is_used():
    rows = [{"file": "0.png", "text": f"row {i}", "split": ["Train", "val", "test"][i % 3]} for i in range(30)]
    divided = split(*tasks(rows))
    assert (divided.train["where"], divided.test["where"]) == ({"split": ["Train"]}, {"split": ["val"]})
    assert "its test rows are left" in divided.why


def test_a_test_split_without_classes_is_not_used():
    for part in ("train", "test"):
        labels = ["cat", "dog"] if part == "train" else [None, None]
        write([{"file": f, "label": labels[i % 2]} for i, f in enumerate(copies(40))], f"{part}.jsonl")
    ((_, _, divided),), _ = find_tasks(["train.jsonl", "test.jsonl"])
    assert divided.test["path"] == "train.jsonl"


def test_a_source_that_cannot_be_read_does_not_hide_the_others():
    write([{"image": "../0.png", "text": f"row {i}"} for i in range(3)], "set/outside.jsonl")
    write([{"image": "0.png", "text": f"row {i}"} for i in range(3)], "set/good.jsonl")
    Path("set/0.png").write_bytes(Path("0.png").read_bytes())
    Path("set/broken.parquet").write_bytes(b"no parquet")
    Path("set/empty.csv").write_text("")
    found, notes = find_tasks(["set"])
    assert [named.task.candidate.place for named in found] == ["set/good.jsonl"]
    told = "\n".join(notes)
    assert "broken.parquet is not a readable Parquet file" in told
    assert "empty.csv" in told
    assert "set/outside.jsonl" in told
    with pytest.raises(UserError, match=r"nothing to train on: .*broken\.parquet") as error:
        find_tasks(["set/broken.parquet"])
    assert "\n" not in str(error.value)
    Path("notes.txt").write_text("notes")
    with pytest.raises(UserError, match=r"notes\.txt: unknown extension '\.txt'; known: \.csv, "):
        find_tasks(["notes.txt"])


def test_a_folder_without_texts_says_what_to_add_and_may_use_the_names_of_its_files():
    Path("flat").mkdir()
    for name in ("a red bicycle", "two dogs"):
        Path(f"flat/{name}.png").write_bytes(Path("0.png").read_bytes())
    with pytest.raises(UserError, match=r"flat: no text or class says what is in its image files; add subfolders"):
        find_tasks(["flat"])
    ((_, task, _),), _ = find_tasks(["flat"], "name")
    assert task.text.sample == ["a red bicycle", "two dogs"]


def test_a_file_whose_name_is_not_utf8_is_told():
    for name in (b"cat", b"\xff"):
        folder = Path("named", name.decode(errors="surrogateescape"))
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(Path("0.png").read_bytes())
    with pytest.raises(UserError, match="is not UTF-8; rename it"):
        find_tasks(["named"])
