"""benchmarks/loader.py measures each task and view."""

from benchmarks import loader
from openimp.data import examples
from openimp.recipe.schema import Recipe


def test_each_view_is_measured(little_data, monkeypatch):
    monkeypatch.setattr(examples, "fill", examples.fill)  # `measure` replaces it.
    found = loader.measure(Recipe.load(little_data / "recipe.yaml", ["train.steps=40"]), 2)
    assert found.keys() == {("named", 0), ("named", 1), ("heard", 0)}
    assert all(parts["all"] > parts["text"] > 0 for parts in found.values())
