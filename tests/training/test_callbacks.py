"""Callbacks of `openimp.train`."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import openimp
from openimp.checkpoint.folder import checkpoints, verify
from openimp.common.json_lines import read_lines
from tests.messages import refuses
from tests.trained import recipe_of

CHANGES = ["train.steps=6", "train.save_every=2", "train.log_every=2", "tasks.heard.weight=0", "evaluation.every=2"]


class Recorded(openimp.Callback):
    """Records its calls."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, bool]] = []
        self.evaluations: list[int] = []
        self.checkpoints: list[int] = []

    def on_step(self, step: int, metrics: dict[str, Any] | None) -> None:
        assert metrics is None or metrics["step"] == step
        self.steps.append((step, metrics is not None))

    def on_evaluation(self, step: int, results: list[dict[str, Any]]) -> None:
        assert {result["step"] for result in results} == {step}
        self.evaluations.append(step)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        verify(folder)
        self.checkpoints.append(step)


class StopAfter(openimp.Callback):
    def __init__(self, last: int) -> None:
        self.last = last

    def on_step(self, step: int, metrics: dict[str, Any] | None) -> None:
        if step == self.last:
            raise openimp.StopTraining


@pytest.fixture(scope="module")
def recipe(little_data: Path) -> openimp.Recipe:
    return recipe_of(little_data, *CHANGES)


def test_callbacks_are_told_of_steps_evaluations_and_checkpoints(recipe, tmp_path):
    data = recipe.to_dict()
    data["evaluation"]["best"] = "colours"
    data["train"]["save_every"] = 4
    recorded = Recorded()
    assert openimp.train(openimp.Recipe.build(data), tmp_path / "run", callbacks=[recorded])
    assert recorded.steps == [(step, step % 2 == 0) for step in range(1, 7)]
    assert recorded.evaluations == [2, 4, 6]
    assert {2, 4, 6} <= {*recorded.checkpoints}  # The evaluation after step 2 is the best so far.


def test_a_training_in_a_thread_with_workers_runs_like_one_in_the_main_thread(recipe, tmp_path):
    """Python lets only the main thread handle signals."""
    with_workers = recipe.to_dict()
    with_workers["train"]["num_workers"] = 1
    recorded = Recorded()
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(openimp.train, openimp.Recipe.build(with_workers), tmp_path / "run", callbacks=[recorded])
        assert work.result()
    assert [step for step, _ in recorded.steps] == [1, 2, 3, 4, 5, 6]
    assert recorded.checkpoints == [2, 4, 6]


def test_a_callback_ends_the_training_and_the_run_is_complete_and_can_go_on(recipe, tmp_path):
    recorded = Recorded()
    assert openimp.train(recipe, str(tmp_path / "run"), callbacks=[StopAfter(3), recorded])
    assert [step for step, _ in recorded.steps] == [1, 2, 3]
    (*_, last) = checkpoints(tmp_path / "run")
    assert last.name == "step-00000003"
    assert read_lines(tmp_path / "run" / "results.jsonl")[-1]["step"] == 3
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [2, 3]
    assert openimp.train(recipe, tmp_path / "run", resume=True, callbacks=[recorded])
    assert [step for step, _ in recorded.steps] == [1, 2, 3, 4, 5, 6]


def test_a_callback_that_fails_costs_no_step_and_no_evaluation(recipe, tmp_path):
    class LosesTheNetwork(openimp.Callback):
        def on_step(self, step: int, metrics: dict[str, Any] | None) -> None:
            if step == 3:
                raise ConnectionError("no network")

        def on_evaluation(self, step: int, results: list[dict[str, Any]]) -> None:
            if step == 4:
                raise ConnectionError("no network")

    recorded = Recorded()
    with refuses() as error:
        openimp.train(recipe, tmp_path / "run", callbacks=[recorded, LosesTheNetwork()])
    assert isinstance(error.value.__cause__, ConnectionError)
    with refuses():
        openimp.train(recipe, tmp_path / "run", resume=True, callbacks=[recorded, LosesTheNetwork()])
    assert openimp.train(recipe, tmp_path / "run", resume=True, callbacks=[recorded])
    assert [step for step, _ in recorded.steps] == [1, 2, 3, 4, 5, 6]
    assert recorded.evaluations == [2, 4, 6]


def test_early_stopping_waits_for_a_gain_and_begins_anew_in_each_training(recipe, tmp_path):
    """With a learning rate of zero nothing improves."""

    class Unchecked(openimp.EarlyStopping):
        def on_start(self, recipe):
            pass

    frozen = openimp.Recipe.build({**recipe.to_dict(), "optimizer": {"lr": 1e-30, "warmup_steps": 1}})
    stopping = openimp.EarlyStopping("colours", patience=1)
    for name, callback in (("first", stopping), ("second", stopping), ("third", Unchecked("colours", patience=1))):
        openimp.train(frozen, tmp_path / name, callbacks=[callback])
        assert {line["step"] for line in read_lines(tmp_path / name / "results.jsonl")} == {2, 4}


def test_early_stopping_that_would_never_stop_is_refused_before_the_first_step(recipe, tmp_path):
    class NeverStarts(openimp.Callback):
        def on_start(self, recipe):
            raise openimp.StopTraining

    seldom = recipe.to_dict()
    seldom["evaluation"]["every"] = None
    with refuses():
        openimp.train(openimp.Recipe.build(seldom), tmp_path / "run", callbacks=openimp.EarlyStopping("colours"))
    unknown = iter([openimp.EarlyStopping("colors")])
    for callbacks in (unknown, [openimp.EarlyStopping], openimp.EarlyStopping, NeverStarts()):
        with refuses():
            openimp.train(recipe, tmp_path / "run", callbacks=callbacks)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


class StopAtCheckpoint(openimp.Callback):
    def on_checkpoint(self, step: int, folder: Path) -> None:
        raise openimp.StopTraining


def test_each_checkpoint_is_announced_and_may_end_the_training(recipe, tmp_path):
    """The callback behind the one that stops is called, too."""
    recorded = Recorded()
    assert openimp.train(recipe, tmp_path / "run", callbacks=[StopAtCheckpoint(), recorded])
    assert recorded.checkpoints[0] == 2
    assert recorded.checkpoints[-1] == recorded.steps[-1][0] < 6
