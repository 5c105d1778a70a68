"""Which tasks are drafted for a source, what is held out, and what is not used."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openimp.common.errors import UserError
from openimp.common.schema import checked
from openimp.data.sources import open_source
from openimp.drafting.choosing import choose
from openimp.drafting.draft import _tasks
from openimp.drafting.finding import Candidate
from openimp.drafting.inspecting import inspect
from openimp.drafting.splitting import _fair_part
from openimp.recipe.tasks import Source


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, media_folder):
    """The current folder, with small files: 0.png, 1.wav, 2.mp4 and so on."""
    monkeypatch.chdir(tmp_path)
    for file in media_folder.iterdir():
        if file.suffix != ".txt":
            Path(file.name).write_bytes(file.read_bytes())
    return tmp_path


def tasks(rows, name="data.jsonl", below=""):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return choose(inspect(Candidate({"path": name}, below=below)))


def copies(count, kind="png"):
    """The names of this many files."""
    names = [f"copy{i}.{kind}" for i in range(count)]
    for name in names:
        Path(name).write_bytes(Path(f"0.{kind}").read_bytes())
    return names


def column(source, name):
    return open_source("x", checked(Source, source, "x", Path.cwd())).column(name)


def test_each_kind_of_media_is_paired_with_the_texts():
    rows = [{"a": f"{i % 3}.png", "b": f"{i % 3}.wav", "c": f"{i % 3}.mp4", "caption": f"text {i}"} for i in range(6)]
    found, _ = tasks(rows)
    assert [(task.media[0].kind, task.templates) for task in found] == [
        ("image", ["caption"]), ("audio", ["caption"]), ("video", ["caption"]),
    ]  # fmt: skip


def test_without_texts_and_classes_two_kinds_of_media_are_paired():
    (task,), _ = tasks([{"a": f"{i % 3}.png", "b": f"{i % 3}.wav"} for i in range(6)])
    assert [media.kind for media in task.media] == ["image", "audio"]
    assert task.templates == []


def test_classes_become_texts_and_the_rows_without_one_are_left_out():
    (task,), _ = tasks([{"file": "0.png", "label": ["cat", "dog", None][i % 3]} for i in range(30)])
    assert task.templates == ["a photo of a {label}"]
    assert task.split.train["where"] == {"label": ["cat", "dog"]}
    assert set(column(task.split.train, "label")) == {"cat", "dog"}


def test_rows_without_a_text_are_allowed_for():
    (task,), _ = tasks([{"file": "0.png", "caption": f"caption {i}" if i % 4 else None} for i in range(40)])
    assert task.bad == 0.25


def test_equal_captions_are_never_in_both_parts():
    (task,), _ = tasks([{"file": file, "caption": f"Caption  {i % 50}"} for i, file in enumerate(copies(200))])
    seen, unseen = (set(column(source, "caption")) for source in (task.split.train, task.split.test))
    assert seen
    assert unseen
    assert not seen & unseen
    assert len(seen) + len(unseen) == 50


@pytest.mark.parametrize("speakers", [[f"s{i}" for i in range(30)], list(range(30)), list("abcdef")])
def test_rows_of_one_speaker_are_never_in_both_parts(speakers):
    rows = [{"sound": "0.wav", "speaker": speakers[i % len(speakers)], "text": f"row {i}"} for i in range(300)]
    (task,), _ = tasks(rows)
    seen, unseen = (set(column(source, "speaker")) for source in (task.split.train, task.split.test))
    assert seen
    assert unseen
    assert not seen & unseen


def test_a_few_files_of_many_rows_are_not_in_both_parts():
    (task,), _ = tasks([{"file": f"{i % 3}.png", "caption": f"text {i}"} for i in range(60)])
    assert task.split.test is None
    assert task.split.why.startswith("too few different values of file to hold any out")


def test_a_text_that_one_task_holds_out_is_not_trained_on_by_another():
    rows = [{"a": a, "b": b, "caption": f"text {i}"}
            for i, (a, b) in enumerate(zip(copies(60), copies(30, "wav") * 2))]  # fmt: skip
    found, _ = tasks(rows)
    image, audio = (task.split for task in found)
    assert column(image.test, "caption") == column(audio.test, "caption")
    assert not set(column(image.train, "caption")) & set(column(audio.test, "caption"))


def test_a_part_is_found_if_few_groups_leave_most_parts_empty():
    numbers = [150] * 30 + [170] * 30 + [190] * 40
    assert _fair_part(numbers, 200, [None] * 100) == (150, True)


def test_each_split_has_its_own_files():
    for split in ("train", "test"):
        Path("set", split, "images").mkdir(parents=True)
        Path("set", split, "images/0.png").write_bytes(Path("0.png").read_bytes())
        Path("set", split, "list.csv").write_text("file,caption\n0.png,a cat\n", encoding="utf-8")
    ((task,), _) = _tasks(["set"])
    assert (task.split.train["root"], task.split.test["root"]) == ("set/train/images", "set/test/images")


def test_captions_beside_a_stray_table_are_found():
    Path("set").mkdir()
    for i in range(3):
        Path(f"set/{i}.png").write_bytes(Path(f"{i}.png").read_bytes())
        Path(f"set/{i}.txt").write_text(f"picture {i}", encoding="utf-8")
    for name in ("notes.txt", "3.HEIC", "Thumbs.db", ".hidden"):
        Path("set", name).write_bytes(b"")
    Path("set/sums.csv").write_text("".join(["file,md5\n", *(f"{i}.png,00{i}\n" for i in range(3))]), encoding="utf-8")
    ((task,), notes) = _tasks(["set"])
    assert notes[-1] == "not used: set: files that are neither media nor data: .db 1, .heic 1, .txt 1"
    assert task.data.candidate.place == "set"
    assert task.templates == ["text"]


def test_classes_of_the_test_are_known_from_training():
    (task,), _ = tasks([{"file": file, "label": f"class {i % 30}"} for i, file in enumerate(copies(90))])
    assert task.split.trains_test_classes
    assert set(column(task.split.test, "label")) <= set(column(task.split.train, "label"))


def test_a_split_column_is_used():
    rows = [{"file": "0.png", "text": f"row {i}", "split": ["train", "val", "test"][i % 3]} for i in range(30)]
    (task,), _ = tasks(rows)
    assert (task.split.train["where"], task.split.test["where"]) == ({"split": "train"}, {"split": "val"})
    assert "its test rows are left" in task.split.why


def test_three_rows_are_all_trained_on():
    (task,), _ = tasks([{"file": f"{i}.png", "caption": f"text {i}"} for i in range(3)])
    assert task.split.test is None
    assert task.split.rows == 3


def test_paths_may_start_at_a_folder_beside_the_table_or_above_it_in_the_named_folder():
    Path("media").mkdir()
    for i in range(3):
        Path(f"{i}.png").rename(f"media/{i}.png")
    rows = [{"file": f"{i}.png", "caption": f"text {i}"} for i in range(3)]
    (beside,), _ = tasks(rows)
    Path("tables").mkdir()
    rows = [{**row, "file": f"media/{row['file']}"} for row in rows]
    (above,), _ = tasks(rows, "tables/data.jsonl", below=".")
    assert [task.split.train["root"] for task in (beside, above)] == ["media", "."]
    assert tasks(rows, "tables/data.jsonl", below="tables")[0] == []


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            [{"file": f"{i}.png", "n": i} for i in range(3)],
            "file has image, but no column of texts or classes says",
        ),
        ([{"file": f"{i}.png", "label": "cat"} for i in range(3)], "label: it has the same value in every row ('cat')"),
        ([{"text": f"row {i}"} for i in range(3)], "no column holds media"),
        ([{"file": f"gone{i}.png", "text": f"row {i}"} for i in range(3)], "none of its files can be read: gone0.png"),
        ([{"file": f"0.{'wav' if i % 2 else 'png'}", "text": f"row {i}"} for i in range(8)], "mixes audio and image"),
    ],
)
def test_what_cannot_be_trained_on_is_told(rows, told):
    found, notes = tasks(rows)
    assert not found
    assert told in "\n".join(notes)


def test_a_folder_with_several_kinds_of_media_has_a_task_for_each(folder):
    for i in range(8):
        Path("zoo", "cat" if i % 2 else "dog").mkdir(parents=True, exist_ok=True)
        kind = "png" if i < 4 else "wav"
        Path("zoo", "cat" if i % 2 else "dog", f"{i}.{kind}").write_bytes(Path(f"0.{kind}").read_bytes())
    for name in ("cat/notes.pdf", "0.png", "notes.pdf"):
        Path("zoo", name).write_bytes(b"")
    found, notes = choose(inspect(Candidate({"path": "zoo"})))
    assert notes == ["files beside the subfolders, which are the classes: .png 1"]
    assert {task.media[0].kind: column(task.split.train, "extension") for task in found} == {
        "image": ["png"] * 4, "audio": ["wav"] * 4,
    }  # fmt: skip


def test_files_that_a_table_lists_are_no_source_of_their_own():
    for name in ("cat", "dog"):
        Path("set/files", name).mkdir(parents=True)
        Path("set/files", name, "0.png").write_bytes(Path("0.png").read_bytes())
    rows = [{"file": f"files/{name}/0.png", "caption": f"a {name} sits"} for name in ("cat", "dog")]
    Path("set/list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found, notes = _tasks(["set"])
    assert len(found) == 1
    assert "not used: set/files: a table lists its files" in notes


def test_a_source_that_cannot_be_read_does_not_hide_the_others():
    Path("set").mkdir()
    Path("set/0.png").write_bytes(Path("0.png").read_bytes())
    Path("set/broken.parquet").write_bytes(b"no parquet")
    Path("set/info.json").write_text('{"version": 1}', encoding="utf-8")
    pq.write_table(pa.Table.from_pylist([{"image": "0.png", "text": f"row {i}"} for i in range(3)]), "set/good.parquet")
    found, notes = _tasks(["set"])
    assert [task.data.candidate.place for task in found] == ["set/good.parquet"]
    assert any("broken.parquet is not a readable Parquet file" in note for note in notes)
    with pytest.raises(UserError, match=r"nothing to train on: .*broken\.parquet") as error:
        _tasks(["set/broken.parquet"])
    assert "\n" not in str(error.value)


def test_a_folder_without_texts_says_what_to_add_and_a_file_of_another_kind_what_is_expected():
    Path("flat").mkdir()
    Path("flat/0.png").write_bytes(Path("0.png").read_bytes())
    with pytest.raises(UserError, match=r"flat: no text or class says what is in its image files; add subfolders"):
        _tasks(["flat"])
    Path("notes.txt").write_text("notes")
    with pytest.raises(UserError, match=r"^notes\.txt: expected a folder or a data file \(\.csv, "):
        _tasks(["notes.txt"])
    Path("empty.csv").write_text("")
    with pytest.raises(UserError, match=r"^nothing to train on: /.*/empty\.csv: has no rows$"):
        _tasks(["empty.csv"])


def test_a_file_whose_name_is_not_utf8_is_told():
    Path("named").mkdir()
    for name in (b"cat", b"\xff"):
        Path("named", os.fsdecode(name)).mkdir()
        Path("named", os.fsdecode(name), "0.png").write_bytes(Path("0.png").read_bytes())
    with pytest.raises(UserError, match="is not UTF-8; rename it"):
        _tasks(["named"])
