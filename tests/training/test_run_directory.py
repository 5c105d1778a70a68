"""The run directory: one training at a time, and nothing is done for a run that is finished."""

import json
import shutil
from pathlib import Path

import pytest

import openimp
from openimp.checkpoint.folder import checkpoints, verify
from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.recipe.schema import Recipe
from openimp.training.run_directory import LOCK, locked
from openimp.training.trainer import train
from tests.messages import refuses
from tests.trained import recipe_of


def test_a_second_training_in_the_same_directory_is_refused(little_data, tmp_path):
    run = tmp_path / "run"
    recipe = recipe_of(little_data)
    with locked(run):
        for resume in (False, True, "auto"):
            with refuses():
                train(recipe, run, resume)
    assert not run.exists()  # Nothing was written.
    with locked(run):
        (run / "metrics.jsonl").touch()
    assert sorted(path.name for path in run.iterdir()) == [LOCK, "metrics.jsonl"]


def test_a_finished_run_is_resumed_without_its_data(little_data, own_run, tmp_path, capsys):
    data = tmp_path / "data"
    recipe = recipe_of(little_data, f"sources.pictures.path={data}", f"sources.sounds.path={data}")
    assert train(recipe, own_run, resume=True)
    assert f"{own_run}: is finished: all 12 steps are done and evaluated already" in capsys.readouterr().out
    changed = Recipe.build(recipe.to_dict() | {"evaluation": {"sets": {}, "every": 3}})
    with pytest.raises(UserError, match=str(data)):
        train(changed, own_run, resume=True)
    (own_run / "results.jsonl").unlink()
    with pytest.raises(UserError, match=str(data)):  # It was not evaluated, and for that it needs the data.
        train(recipe, own_run, resume=True)


def test_what_may_change_when_a_run_is_resumed(little_data, little_run, own_run, tmp_path):
    """The list of loggers, which may be empty, and the paths of files that only the start of a run reads."""
    for changes in (["train.loggers=[]"], ["train.loggers=[tensorboard]", "train.log_every=7"]):
        assert train(recipe_of(little_data, *changes), own_run, resume=True)
    first = Path(shutil.copytree(little_run, tmp_path / "first", symlinks=True))
    started = [f"train.init={first}", "train.steps=1", "evaluation={}", "train.loggers=[]"]
    assert train(recipe_of(little_data, *started), tmp_path / "tuned")
    assert not (tmp_path / "tuned" / "tensorboard").exists()
    started[0] = f"train.init={tmp_path / 'elsewhere' / 'first'}"
    with refuses():  # Another model, because the first one is still there.
        train(recipe_of(little_data, *started), tmp_path / "tuned", resume=True)
    shutil.rmtree(first)
    assert train(recipe_of(little_data, *started), tmp_path / "tuned", resume=True)
    with refuses():
        started[0] = "train.init=another"
        train(recipe_of(little_data, *started), tmp_path / "tuned", resume=True)


def test_a_set_that_is_added_to_a_finished_run_can_be_measured_again(little_data, tmp_path):
    run = tmp_path / "run"
    sets = recipe_of(little_data).to_dict()["evaluation"]["sets"]
    short = ["train.steps=2", "evaluation={}"]
    assert train(recipe_of(little_data, *short), run)
    with refuses():
        openimp.evaluate(run)
    added = [*short, f"evaluation.sets={json.dumps({'colours': sets['colours']})}"]
    assert train(recipe_of(little_data, *added), run, resume=True)
    assert openimp.evaluate(run) == read_lines(run / "results.jsonl")
    verify(checkpoints(run)[-1])


def test_a_resumed_run_may_be_evaluated_on_another_source(little_data, own_run):
    colours = recipe_of(little_data).to_dict()["evaluation"]["sets"]["colours"]
    sets = json.dumps({"some": {**colours, "source": "some"}})
    for limit in (8, 4):
        some = f"sources.some={{path: pictures, limit: {limit}}}"
        assert train(recipe_of(little_data, some, f"evaluation.sets={sets}"), own_run, resume=True)
        assert [result["n"] for result in read_lines(own_run / "results.jsonl")] == [limit]
