"""What train does with a run that is there: it never throws a training away, and says what it does."""

import shutil
from pathlib import Path

import pytest

import openimp
from openimp.checkpoint.folder import checkpoints
from openimp.common.json_lines import read_lines
from openimp.recipe.schema import Recipe
from openimp.training.run_directory import ENDED, LOCK
from openimp.training.trainer import train
from tests.messages import refuses
from tests.trained import recipe_of

EVALUATED = ["evaluation.every=2", "train.save_every=100"]


@pytest.fixture(scope="module")
def recipe(little_data) -> Recipe:
    return recipe_of(little_data, *EVALUATED)


def content(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK}


def steps(run: Path) -> list[int]:
    return [line["step"] for line in read_lines(run / "metrics.jsonl")]


@pytest.mark.parametrize("lost", ["checkpoints", "checkpoints/step-00000012"])
def test_a_run_that_has_lost_its_checkpoints_is_not_started_again(little_data, own_run, openimp, lost):
    for folder in checkpoints(own_run)[:-1]:
        shutil.rmtree(folder)
    shutil.rmtree(own_run / lost)
    before = content(own_run)
    for resume in (False, True, "auto"):
        with refuses():
            train(recipe_of(little_data), own_run, resume)
    assert content(own_run) == before
    code, _, err = openimp("train", little_data / "recipe.yaml", "--run", own_run, "--resume", "auto")
    assert code == 2
    assert err.startswith(f"openimp: {own_run}: has logged 12 steps, but has no checkpoint to resume from; ")
    assert content(own_run) == before


def test_resume_auto_says_that_it_starts_and_starts_a_run_that_died_before_it_logged_a_step(
    little_data, tmp_path, capsys
):
    recipe, run = recipe_of(little_data, "train.steps=2", "evaluation={}"), tmp_path / "run"
    assert train(recipe, run, "auto")
    assert f"{run}: there is no run yet, so the training starts at step 0\n" in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").write_text('{"step": 1, "cut sho')
    assert train(recipe, run, "auto")
    out = capsys.readouterr().out
    assert f"{run}: it was interrupted before it logged a step, so the training starts at step 0\n" in out
    assert steps(run) == [1, 2]
    assert train(recipe, run, "auto")
    assert capsys.readouterr().out == f"{run}: is finished: all 2 steps are done and evaluated already\n"


class StopAfter(openimp.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, step, metrics):
        if step == self.step:
            raise openimp.StopTraining


class Killed(BaseException):
    """The end of the process."""


class DiesInEvaluation(openimp.Callback):
    """Takes the place of a kill during the last evaluation."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_evaluation(self, step, results):
        if step == self.step:
            raise Killed


def test_a_training_that_a_callback_ended_is_finished_for_auto_and_goes_on_if_asked(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    early = StopAfter(3)
    assert train(recipe, run, "auto", callbacks=early)
    before = content(run)
    for callbacks in (early, ()):
        capsys.readouterr()
        assert train(recipe, run, "auto", callbacks=callbacks)
        assert capsys.readouterr().out == (
            f"{run}: is finished: a callback ended the training after step 3 of 12; to train on, use --resume (in "
            "Python: resume=True) without auto\n"
        )
    assert content(run) == before
    assert train(recipe, run, resume=True)
    assert steps(run)[-1] == 12
    assert not (run / ENDED).exists()


def test_early_stopping_ends_a_run_for_good(recipe, tmp_path, capsys):
    """Also if its last checkpoint is lost: the training goes on to the step after which it ended, and no further."""
    run = tmp_path / "run"
    for _ in range(2):
        assert train(recipe, run, "auto", callbacks=openimp.EarlyStopping("colours", patience=1))
    (last,) = checkpoints(run)
    assert 4 <= (ended := int(last.name[-8:])) < 12
    whole = content(run / "checkpoints")
    again = recipe.model_copy(update={"train": recipe.train.model_copy(update={"save_every": 2})})
    shutil.rmtree(run)
    assert train(again, run, "auto", callbacks=openimp.EarlyStopping("colours", patience=1))
    shutil.rmtree(checkpoints(run)[-1])
    assert train(recipe, run, "auto")
    assert steps(run)[-1] == ended
    assert checkpoints(run)[-1].name == last.name
    weights = str(last / "model" / "model.safetensors")
    assert content(run)[weights] == whole[weights]
    assert train(recipe, run, "auto")
    assert "is finished: a callback ended the training" in capsys.readouterr().out


def test_a_training_that_was_killed_in_its_last_evaluation_is_only_evaluated(recipe, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(recipe, run, "auto", callbacks=[StopAfter(3), DiesInEvaluation(3)])
    (run / "results.jsonl").unlink()
    assert train(recipe, run, "auto")
    assert steps(run)[-1] == 3
    assert {line["step"] for line in read_lines(run / "results.jsonl")} == {3}
