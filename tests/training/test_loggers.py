"""Loggers show the figures of a run: TensorBoard, and Weights & Biases without a network."""

from pathlib import Path

import pytest

import openimp
from openimp.training.trainer import train
from tests.processes import run
from tests.trained import recipe_of

CHANGES = ["train.steps=4", "train.save_every=2", "train.log_every=2", "tasks.heard.weight=0"]


def train_with(library: str, data: Path, folder: Path, **environment: str) -> None:
    """In a process of its own, because these libraries start threads and processes."""
    sets = [f"--set={change}" for change in (*CHANGES, f"train.loggers=[{library}]")]
    run("-m", "openimp", "train", data / "recipe.yaml", "--run-dir", folder, *sets, check=True, **environment)


@pytest.mark.slow
def test_weights_and_biases_without_a_network(little_data, tmp_path):
    pytest.importorskip("wandb")
    train_with("wandb", little_data, tmp_path / "run", WANDB_MODE="offline", WANDB_SILENT="true")
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    content = file.read_bytes()
    assert b"loss/named" in content
    assert b"examples_per_s" in content
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.slow
def test_trackio_on_this_machine(little_data, tmp_path):
    sqlite = pytest.importorskip("sqlite3")
    pytest.importorskip("trackio")
    train_with("trackio", little_data, tmp_path / "run", TRACKIO_DIR=str(tmp_path / "trackio"))
    (file,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite.connect(file).execute("select step, metrics from metrics order by step").fetchall()
    assert {step for step, _ in rows} == {2, 4}
    assert any("loss/named" in str(metrics) for _, metrics in rows)


def test_tensorboard_keeps_the_figures_of_the_step_from_which_a_run_resumes(little_data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = recipe_of(little_data, *CHANGES, "evaluation={}")

    class StopAfter2(openimp.Callback):
        def on_step(self, step, metrics):
            if step == 2:
                raise openimp.StopTraining

    train(recipe, tmp_path / "run", callbacks=[StopAfter2()])
    train(recipe, tmp_path / "run", resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/named")] == [2, 4]
    names = events.Tags()["scalars"]
    assert {"lr", "grad_norm", "examples_per_s"} <= set(names)
    assert "seconds" not in names
