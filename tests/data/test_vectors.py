"""Examples of towers' vectors, cut out of arrays, are those that are read one by one."""

import numpy as np
import pytest
import torch

from openimp.data.examples import ExampleReader
from openimp.data.order import uniform
from openimp.data.step_batches import StepBatches
from openimp.data.task_data import TaskData
from openimp.recipe.schema import Recipe
from tests import little, public


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """Pictures with two captions each, a class, and a file that is no picture; both inputs have a tower."""
    folder = little.write(tmp_path_factory.mktemp("data"))
    name = public.write("clip", folder / "clip")
    (folder / "bad.png").write_text("no picture")
    files = sorted(path.relative_to(folder).as_posix() for path in (folder / "pictures").rglob("*.png"))[:9]
    lines = ["file,label,caption,other"]
    lines += [f"{file},{number % 3},a {number % 3} square,blue {number}" for number, file in enumerate(files)]
    lines.insert(4, "bad.png,0,nothing,nothing")
    (folder / "pictures.csv").write_text("\n".join(lines), encoding="utf-8")
    objectives = [
        {"type": "contrastive", "positives_by": "label", "positives_in": "caption"},
        {"type": "classification", "label": "label"},
    ]
    task = {
        "source": "pictures",
        "inputs": {"image": "file", "text": ["caption", "other"]},
        "objectives": objectives,
        "batch_size": 4,
        "views": [{}],
    }
    return Recipe.build(
        {
            "name": "vectors",
            "model": {"width": 24, "layers": 0, "heads": 1, "space": "joint", "embed_dim": 24},
            "modalities": {"vision": {"tower": name, "crops": 2}, "text": {"tower": name}},
            "sources": {"pictures": {"path": "pictures.csv"}},
            "tasks": {"pictures": task},
            "train": {"steps": 30, "num_workers": 0},
        },
        folder,
    )


@pytest.fixture(scope="module")
def data(recipe) -> TaskData:
    data = TaskData(recipe, recipe.make_modalities())
    data.prepare(None, {})
    return data


def test_an_example_has_the_vectors_and_targets_of_its_row(data):
    batches = StepBatches(data)
    reader = ExampleReader(data)
    crops_drawn = set()
    texts_drawn = set()
    for step in range(20):
        loaded = batches[step]
        visit = batches.schedule[step]
        positions = range(visit.start, visit.start + visit.batch_size)
        examples = reader.load(visit, positions)
        expected = [reader.find_readable(visit, position, examples) for position in positions]
        assert loaded.rows == [example.row for example in expected]
        assert loaded.names == [example.name for example in expected]
        assert loaded.bad == [(example.name, example.bad) for example in map(examples.get, positions) if example.bad]
        for number, example in enumerate(expected):
            row = data.source_of_task["pictures"].rows([example.row])[0]
            stored = data.stores["pictures", "image", "file"][example.row].copy()
            crops = data.modalities["image"].tokens(stored, None, [])
            crop = [torch.equal(loaded.batch.tokens["image"].values[number], values) for values in crops.values]
            assert any(crop)
            crops_drawn.add((example.row, crop.index(True)))
            vectors = [data.text_vectors["text"][row[column]] for column in ("caption", "other")]
            texts = data.modalities["text"].tokens(np.concatenate(vectors), None, [])
            text = [torch.equal(loaded.batch.tokens["text"].values[number], values) for values in texts.values]
            assert any(text)
            texts_drawn.add((example.row, text.index(True)))
            contrastive, classification = loaded.batch.targets
            assert contrastive["item"][number] == example.targets[0]["item"]
            assert torch.equal(contrastive["values"][number], example.targets[0]["values"])
            # A caption equals a value of its row, and the other text equals none.
            assert (contrastive["text:text"][number] in contrastive["values"][number]) == (text.index(True) == 0)
            assert classification["label"][number] == example.targets[1]["label"]
    assert len(crops_drawn) == len(texts_drawn) == 2 * 9


def test_workers_share_the_batch_of_one(data):
    whole = StepBatches(data)[3]
    parts = [StepBatches(data).part(3, index, 3) for index in range(3)]
    assert [row for part in parts for row in part.rows] == whole.rows
    assert torch.equal(
        torch.cat([part.batch.tokens["text"].values for part in parts]), whole.batch.tokens["text"].values
    )
    assert sum(part.digest for part in parts) == whole.digest


def test_random_numbers_of_a_position_depend_on_nothing_else():
    numbers = uniform(7, range(10_000), 2)
    assert np.array_equal(uniform(7, [9_999, 5], 2), numbers[:, [9_999, 5]])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    histogram = np.histogram(numbers, bins=10, range=(0, 1))[0]
    assert np.abs(histogram - 2_000).max() < 200
    assert abs(np.corrcoef(numbers)[0, 1]) < 0.03
    assert not np.array_equal(uniform(8, range(10), 1), uniform(7, range(10), 1))
