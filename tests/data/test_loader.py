"""The loader: the same batches whoever makes them, from wherever they go on, and whatever is broken on the disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from openimp.common.errors import UserError
from openimp.data.loaded_batch import LoadedBatch
from openimp.data.loader import load_batches
from openimp.data.order import rows_at
from openimp.data.step_batches import StepBatches
from openimp.data.tables import item_id
from openimp.data.task_data import CORPUS_ROWS, TaskData, _sample
from openimp.recipe.schema import Recipe
from tests.batches import assert_same
from tests.little import png, write_tar
from tests.messages import refuses
from tests.recordings import animation, counting, sound_file

NO_EVALUATION = "evaluation={}"
either = pytest.mark.parametrize("workers", [0, pytest.param(3, marks=pytest.mark.slow)])
"""The training process makes the batches, or workers do."""


def opened(folder: Path, *changes: str) -> StepBatches:
    recipe = Recipe.load(folder / "recipe.yaml", changes)
    batches = StepBatches(TaskData(recipe, recipe.make_modalities()))
    batches.data.fit()
    batches.data.prepare()
    return batches


def loaded(folder: Path, *changes: str, first: int = 0) -> list[LoadedBatch]:
    return list(load_batches(opened(folder, *changes), first))


def test_a_row_of_a_stream_without_a_listed_class_is_a_bad_example(own_data):
    members = {}
    unlisted = {3: None, 5: "violet", 7: ["red"]}
    for i, file in enumerate(sorted((own_data / "pictures").rglob("*.png"))):
        members[f"{i}.png"] = file.read_bytes()
        members[f"{i}.json"] = json.dumps({"label": unlisted.get(i, file.parent.name)}).encode()
    write_tar(own_data / "x.tar", members)
    source = "sources.pictures={path: x.tar, stream: true, lanes: 1, window: 1}"
    objective = "tasks.named.objectives=[{type: classification, label: json.label, classes: [red, green, blue, white]}]"
    changes = [source, objective, "tasks.named.inputs={image: png}", "tasks.named.views=[{image: {size: 16}}]"]
    batches = loaded(own_data, *changes, "tasks.heard.weight=0", NO_EVALUATION, "train.num_workers=0")
    assert {reason for item in batches for _, reason in item.bad} == {
        "column 'json.label': no class",
        "column 'json.label': 'violet' is not among the classes",
        "column 'json.label': expected one class, found ['red']",
    }


@pytest.mark.slow
def test_too_little_shared_memory_is_told_instead_of_waited_for(little_data):
    """As in a container of Docker, which has 64 MB. Here, files of 1 kB are the largest."""
    resource = pytest.importorskip("resource", reason="Windows does not limit files")
    batches = opened(little_data, "train.num_workers=1", NO_EVALUATION)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(UserError, match=r"the data of step 0: .*enlarge /dev/shm"):
            next(load_batches(batches, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_batches_are_bitwise_equal_with_any_number_of_workers(little_data):
    """Also where the training process, which has more threads than a worker, makes them itself."""
    longer = ["modalities.audio={}", "tasks.heard.views.0.audio.seconds=1.024", NO_EVALUATION]
    longer.append("tasks.named.inputs.text={column: [label, 'a {label}'], draw: 3}")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = loaded(little_data, "train.num_workers=0", *longer)
        assert torch.get_num_threads() == 2
        assert len({item.visit.task for item in alone}) == 2
        for workers in (1, 3):
            assert_same(loaded(little_data, f"train.num_workers={workers}", *longer), alone)
    finally:
        torch.set_num_threads(threads)


SYNC = """
name: sync
modalities: {vision: {patch: [4, 16, 16]}, audio: {window: 256, hop: 256, bins: 16}}
sources: {all: {path: rows.jsonl}}
tasks:
  one:
    source: all
    inputs: {video: video, audio: audio}
    objectives: [{type: contrastive}]
    batch_size: 16
    views: [{video: {size: 16, frames: 4, stride: 1, crop: 1}, audio: {seconds: 0.256}}]
"""


@pytest.mark.parametrize("sync", [True, False])
def test_in_a_view_with_sync_clip_and_sound_start_at_the_same_moment(tmp_path, sync):
    """Frame i of 100 has the gray level 2 i, and a sound grows louder as evenly, so a part tells where it starts."""
    (tmp_path / "v.webp").write_bytes(animation(counting(100, 16, 16, step=2), "WEBP"))
    noise = np.random.default_rng(0).uniform(-1, 1, 32_000)
    (tmp_path / "a.wav").write_bytes(sound_file(noise * np.linspace(0, 1, 32_000)))
    (tmp_path / "rows.jsonl").write_text('{"video": "v.webp", "audio": "a.wav"}\n' * 16)
    (tmp_path / "recipe.yaml").write_text(SYNC)
    batches = opened(tmp_path, f"tasks.one.views.0.sync={sync}", "tasks.one.views.0.audio.speed=0.2")
    tokens = batches[0].batch.tokens
    loudness = (batches.data.modalities["audio"].config.std * tokens["audio"].values.mean((1, 2))).exp()
    together = torch.corrcoef(torch.stack([tokens["video"].values[:, 0, 0], loudness]))[0, 1]
    assert (together > 0.95) == sync


def test_what_cannot_be_read_at_all_is_told_before_the_first_step(own_data):
    for file in own_data.rglob("*.png"):
        file.write_bytes(b"")
    with refuses():
        opened(own_data, NO_EVALUATION)


@either
def test_a_bad_file_is_skipped_counted_named_and_replaced(own_data, workers):
    """By the next one in the task's order. A caption that is missing is as bad."""
    rows = [{"sound": f"{i}.wav", "caption": None if i == 3 else f"tone {i}"} for i in range(15)]
    (own_data / "sounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    bad = {"red/1.png": b"", "blue/2.png": b"\x89PNG\r\n\x1a\n broken", "white/0.png": b"GIF89a"}
    for name, content in bad.items():
        (own_data / "pictures" / name).write_bytes(content)
    each_row_an_item = "tasks.named.objectives.0.positives_by=null"
    batches = opened(own_data, f"train.num_workers={workers}", each_row_an_item, NO_EVALUATION)
    table = batches.data.source_of_task["named"]
    steps = list(load_batches(batches, 0))
    for item in steps:
        if item.visit.task == "named":
            assert len(item.batch.tokens["image"].values) == item.visit.batch_size
            # A stand-in is the same item as the neighbour whose place it shares, not a false negative.
            assert item.batch.targets[0]["item"].tolist() == item.rows
            classes = [batches.data.classes["pictures:label"][label] for label in item.batch.targets[1]["label"]]
            assert classes == [table.row_name(row).split("/")[0] for row in item.rows]
            order = rows_at(0, "named", 24, np.arange(item.visit.start, item.visit.start + 24)).tolist()
            good = [i for i in range(24) if table.row_name(order[i]) not in bad]
            assert item.rows == [order[min(j for j in good if j >= i)] for i in range(item.visit.batch_size)]
            assert item.names == [table.row_name(row) for row in item.rows]
    reasons = dict(pair for item in steps for pair in item.bad)
    assert reasons.keys() == {*bad, "sounds.jsonl[3]"}
    assert reasons["sounds.jsonl[3]"] == "no text in column caption"
    assert all(reasons.values())


class Failing(StepBatches):
    """Fails in step 2, like a network file system."""

    def part(self, step: int, part_index: int, parts: int) -> LoadedBatch:
        if step == 2:
            raise FileNotFoundError("the server does not answer")
        return super().part(step, part_index, parts)


@either
def test_any_error_of_loading_stops_the_training_as_one_that_the_user_can_mend_does(little_data, workers):
    """So that all complete steps are saved. It is not taken for the end of a worker."""
    recipe = Recipe.load(little_data / "recipe.yaml", [f"train.num_workers={workers}", NO_EVALUATION])
    batches = Failing(TaskData(recipe, recipe.make_modalities()))
    batches.data.fit()
    loading = load_batches(batches, 0)
    assert [next(loading).visit.step for _ in range(2)] == [0, 1]
    with refuses():
        next(loading)


def test_a_stream_must_name_all_its_classes(streamed):
    folder, changes = streamed
    objective = "tasks.named.objectives=[{type: classification, label: txt%s}]"
    with refuses():
        opened(folder, *changes, objective % "")
    with refuses():
        loaded(folder, *changes, objective % ", classes: [a grey square, a pink square]")


def test_a_tar_in_which_the_members_of_an_example_are_apart_is_told(streamed):
    folder, changes = streamed
    members = {f"{i}.png": png(i) for i in range(20)} | {f"{i}.txt": b"a square" for i in range(20)}
    for shard in range(2):
        write_tar(folder / f"{shard}.tar", members)
    with refuses():
        loaded(folder, *changes)


@pytest.mark.slow
def test_a_cached_source_gives_the_same_pictures(little_data, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path))
    one_view = ["tasks.named.views=[{image: {size: 16}, text: {length: 8}}]", "tasks.heard.weight=0"]
    plain = loaded(little_data, *one_view)
    for cache in ("memory", "disk", "disk"):
        assert_same(loaded(little_data, f"sources.pictures.cache={cache}", "train.num_workers=1", *one_view), plain)
    assert list(tmp_path.rglob("*.arrow"))


def test_a_short_stream_is_read_once_for_its_texts(streamed):
    folder, changes = streamed
    texts = [text for (text,) in opened(folder, *changes).data._texts("text")]
    assert len([text for text in texts if text.endswith("square")]) == 24


def only_image(*objectives: str) -> list[str]:
    """Changes of the recipe: one task, of a manifest of the pictures, with these objectives."""
    task = "{source: pictures, batch_size: 6, inputs: {image: file}, views: [{image: {size: 16}}], objectives: [%s]}"
    return [NO_EVALUATION, "modalities={vision: {patch: [2, 8, 8]}}", f"tasks={{one: {task % ', '.join(objectives)}}}"]


def write_labels(folder: Path, labels: list[object]) -> list[str]:
    """A manifest of red pictures with these labels, and the change of the recipe that reads it."""
    lines = [json.dumps({"file": f"pictures/red/{i}.png", "label": label}) for i, label in enumerate(labels)]
    (folder / "m.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ["sources.pictures={path: m.jsonl}"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["a", None, None, "a", "", ""], [[0, 3], [1], [2], [4], [5]]),
        ([1.5, float("nan"), float("nan"), 1.5, 0.0, None], [[0, 3], [1], [2], [4], [5]]),
        ([["A", "b"], ["a", "b"], ["b"], [], [], None], [[0, 1], [2], [3], [4], [5]]),
    ],
)
def test_equal_values_are_one_item_and_rows_without_a_value_are_items_of_their_own(own_data, labels, expected):
    assert items(own_data, write_labels(own_data, labels)) == expected


def test_bytes_that_differ_are_two_items():
    values = [b"\x00A", b"\x00a", 1, "1", True, "true", "a", "\nrow 7"]
    assert len({item_id(value, row) for row, value in enumerate(values)}) == 6
    assert item_id(b"", 7) == item_id(None, 7) != item_id("row 7", 0)


def items(folder: Path, source: list[str]) -> list[list[int]]:
    """The rows of each item."""
    (batch, *_) = loaded(folder, *source, "tasks.named.objectives=[{type: contrastive, positives_by: label}]",
                         "tasks.named.inputs.text=file", "tasks.heard.weight=0", NO_EVALUATION)  # fmt: skip
    found: dict[int, set[int]] = {}
    for row, item in zip(batch.rows, batch.batch.targets[0]["item"].tolist()):
        found.setdefault(item, set()).add(row)
    return sorted(map(sorted, found.values()))


def test_several_classes_a_row(own_data):
    source = write_labels(own_data, [["a", "b"], [], None, ["c"], ["a"], ["b", "c"]])
    (batch, *_) = loaded(own_data, *source, *only_image("{type: classification, label: label, loss: sigmoid}"))
    hot = dict(zip(batch.rows, batch.batch.targets[0]["label"].int().tolist()))
    assert [hot[row] for row in range(6)] == [[1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ("loss: sigmoid", ["a", "b"]),
        ("loss: sigmoid", [[], [["a"]]]),
        ("loss: sigmoid", [[], ["a", None]]),
        ("loss: softmax", [None, ["a"]]),
        ("classes: [a]", [None, {"a": 1}]),
        ("classes: [a]", ["a", None, None]),
        ("loss: softmax", [1.0, float("nan")]),
        ("classes: [red, blue]", ["red", "bleu"]),
        ("classes: [1, 2]", ["1", "2"]),
        ("loss: sigmoid, classes: [red]", [["red"], ["blue"]]),
    ],
)
def test_labels_that_do_not_fit_are_told_before_training(own_data, options, labels):
    task = only_image(f"{{type: classification, label: label, {options}}}")
    with refuses():
        opened(own_data, *write_labels(own_data, labels), *task)


def test_a_large_table_gives_the_tokenizer_some_rows_of_all_its_parts():
    samples = [_sample(2 * CORPUS_ROWS, CORPUS_ROWS, key) for key in (0, 0, 1)]
    assert samples[0] == samples[1] == sorted(set(samples[0])) != samples[2]
    assert len(samples[0]) == CORPUS_ROWS
    assert np.histogram(samples[0], 10)[0].min() > CORPUS_ROWS / 11
