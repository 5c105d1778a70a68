"""Tables of pictures, an untrained model, and one evaluation set."""

from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openimp.common.modality import Modality
from openimp.inference.model import Model
from openimp.model.imp import IMP
from openimp.recipe.evaluation import EvaluationSet
from openimp.recipe.schema import Recipe
from tests.little import png


class Setup(NamedTuple):
    """The first arguments of `evaluate`. The recipe has one evaluation set, `things`."""

    model: IMP
    recipe: Recipe
    modalities: dict[str, Modality]

    @property
    def options(self) -> EvaluationSet:
        return self.recipe.evaluation.sets["things"]

    def inference_model(self) -> Model:
        """Encodes one item at a time, as the evaluation set views it."""
        model = Model(self.model, self.recipe.to_config({}), self.modalities, "fp32")
        model.views["image"] = self.options.view["image"]
        return model


@pytest.fixture
def setup(tmp_path, tiny_recipe, tiny_model):
    """Writes tables, each of which is a source, and makes a recipe that evaluates the last one.

    A table without a column `picture` gets pictures of noise. The other arguments are options of the evaluation set.
    """

    def make(tables, model=None, keys=None, **options) -> Setup:
        for name, columns in tables.items():
            rows = len(next(iter(columns.values())))
            columns = {"picture": [png(i) for i in range(rows)]} | columns
            pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        sources = {name: {"path": f"{tmp_path}/{name}.parquet"} for name in ("all", *tables)}
        defaults = {"source": name, "inputs": {"image": "picture"}, "view": {"image": {"size": 16}}}
        evaluation = {"sets": {"things": defaults | options}, "batch_size": 4}
        train = {"precision": "fp32"}
        recipe = tiny_recipe(model, tmp_path, sources=sources, train=train, evaluation=evaluation, **keys or {})
        network, modalities = tiny_model(recipe)
        return Setup(network, recipe, modalities)

    return make
