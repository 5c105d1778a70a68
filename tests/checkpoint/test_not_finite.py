"""A model with weights that are not finite is refused wherever it is used: all its vectors and losses could be NaN."""

import pytest
import torch

from openimp.checkpoint import dcp
from openimp.checkpoint.folder import checkpoints, load_model
from openimp.training.trainer import train
from tests.messages import refuses
from tests.trained import recipe_of


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_model_is_refused_if_any_of_its_weights_is_not_finite(own_run, little_data, tmp_path, openimp, value):
    assert openimp("index", own_run, little_data / "pictures", "--out", tmp_path / "index")[0] == 0
    folder = checkpoints(own_run)[-1]
    weights = {name: weight.clone() for name, weight in dcp.read(folder / "ema").items()}
    weights["encoder.blocks.0.attention.qkv.weight"][3, 5] = value
    (folder / "ema" / "ema.safetensors").unlink()
    (folder / "ema").rmdir()
    dcp.save(folder / "ema", weights)

    with refuses():
        load_model(folder)
    with refuses():
        train(recipe_of(little_data, f"train.init={own_run}"), tmp_path / "other")
    for command in (
        ("eval", own_run),
        ("embed", own_run, little_data / "pictures", "--out", tmp_path / "vectors.parquet"),
        ("classify", own_run, little_data / "pictures"),
        ("index", own_run, little_data / "pictures", "--out", tmp_path / "other.index"),
    ):
        code, _, err = openimp(*command)
        assert code == 2
        assert err.count("\n") == 1
        assert "encoder.blocks.0.attention.qkv.weight has values that are not finite" in err
    assert openimp("search", tmp_path / "index", "a red square")[0] == 2
