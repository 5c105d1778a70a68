"""The loop: it learns, it goes on exactly where it was cut off, and it says what is wrong before it does harm."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openimp.checkpoint.folder import checkpoints, optimizer_state
from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.data.loader import load_batches
from openimp.study.variants import SUMMED, peak_bytes
from openimp.training.callbacks import Callback
from openimp.training.setup import Variant
from openimp.training.stopping import stop_signals
from openimp.training.trainer import Trainer, train
from tests.messages import refuses
from tests.processes import Process
from tests.saved import assert_equal, copies, hashes
from tests.trained import figures, recipe_of, trainer_of

STEPS = 120
LONG = [f"train.steps={STEPS}", "train.save_every=10", "train.keep_last=3", "evaluation.every=50", "optimizer.lr=1e-3",
        "optimizer.muon_lr=4e-3"]  # fmt: skip


def last_step(run: Path) -> int:
    found = checkpoints(run)
    return int(found[-1].name.removeprefix("step-")) if found else 0


@pytest.fixture(scope="module")
def whole_run(little_data, tmp_path_factory) -> Path:
    """All steps in one go."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(recipe_of(little_data, *LONG), run)
    return run


def test_the_run_tells_what_it_did(whole_run, little_data):
    lines = figures(whole_run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert sum(units["steps"] for units in lines[-1]["totals"].values()) == STEPS
    for line in lines:
        for layers in line["experts"].values():
            (layer,) = layers
            assert sum(layer["load"]) == pytest.approx(1)
            assert sum(layer["gate"]) == pytest.approx(1)
            assert 0 <= layer["dropped"] < 1
    results = read_lines(whole_run / "results.jsonl")
    assert [(result["step"], result["set"]) for result in results] == [
        (step, name) for step in (50, 100, 120) for name in ("colours", "tones", "tones")
    ]
    assert all(result.get("top1", result.get("r1")) > 1.5 * result["chance"] for result in results[-3:]), (
        "it has learned"
    )
    assert recipe_of(whole_run) == recipe_of(little_data, *LONG)
    assert list((whole_run / "tensorboard").iterdir())
    assert [folder.name[-3:] for folder in checkpoints(whole_run)] == ["100", "110", "120"]


def test_a_resumed_run_counts_steps_that_were_saved_before_they_were_logged(little_data, tmp_path):
    """A crash between two lines of metrics, after a checkpoint and an evaluation of a later step; and it left half of
    what it wrote. Parts of the model are frozen."""
    whole, run = tmp_path / "whole", tmp_path / "run"

    def crash(trainer, step):
        if step == 5:
            trainer.checkpointing.wait()
            raise RuntimeError

    changes = ["train.log_every=7", "train.save_every=3", "evaluation.every=4", "optimizer.muon_lr=0.01"]
    recipe = recipe_of(little_data, *changes, "optimizer.lr_scale={stems: 0, stems.text.after: 1, encoder.blocks.0: 0}")
    assert train(recipe, whole)
    with pytest.raises(RuntimeError):
        train(recipe, run, variant=Variant(before_step=crash))
    shutil.copytree(checkpoints(run)[-1], run / "checkpoints" / ".step-00000999.tmp")
    assert [line["step"] for line in read_lines(run / "results.jsonl")] == [4, 4, 4]
    for name in ("metrics.jsonl", "results.jsonl"):
        with (run / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 999, "tasks": {}}\n{"st')
    (run / "skipped.jsonl").write_text('{"step": 999, "task": "named", "where": "a", "why": "b"}\n')
    assert train(recipe, run, resume=True)
    assert figures(run) == figures(whole)
    assert [line["step"] for line in figures(run)] == [3, 4, 6, 7, 8, 9, 12]
    assert read_lines(run / "results.jsonl") == read_lines(whole / "results.jsonl")
    assert not read_lines(run / "skipped.jsonl")
    assert hashes(run) == hashes(whole)


@pytest.mark.slow
def test_evaluations_that_fail_lose_no_step_and_the_last_one_is_made_up_for(own_data, tmp_path):
    """The first one is that of step 6, between two checkpoints. Other sets are measured."""
    changes = ["tasks.heard.weight=0", "train.steps=9", "evaluation.every=6", "train.save_every=4"]
    recipe = recipe_of(own_data, *changes)
    run = tmp_path / "run"
    sounds = {file: file.read_bytes() for file in own_data.glob("*.wav")}

    class LosesTheSounds(Callback):
        def on_step(self, step, metrics):
            for file in sounds:
                file.write_bytes(b"no sound")

    with refuses():
        train(recipe, run, callbacks=[LosesTheSounds()])
    assert last_step(run) == 9
    for file, content in sounds.items():
        file.write_bytes(content)
    train(recipe, run, resume=True)
    assert [line["step"] for line in figures(run)] == list(range(1, 10))
    measured = [(line["step"], line["set"]) for line in read_lines(run / "results.jsonl")]
    assert sorted(measured) == [(6, "colours"), (9, "colours"), (9, "tones"), (9, "tones")]


def test_equal_texts_of_different_items_are_told(little_data, tmp_path, capsys):
    """Each of four colours has six pictures; unless they are one item, a batch of 8 pushes equal texts apart."""
    changes = ["train.steps=3", "tasks.heard.weight=0", "evaluation.sets={}", "tasks.named.views.1.weight=0.001"]
    train(recipe_of(little_data, *changes), tmp_path / "one item")
    assert "belong to other examples too" not in capsys.readouterr().out
    train(recipe_of(little_data, *changes, "tasks.named.objectives.0.positives_by=null"), tmp_path / "run")
    assert capsys.readouterr().out.count("of a batch's texts belong to other examples too") == 1


def test_the_temperatures_are_kept_in_bounds(little_data, tmp_path):
    training = trainer_of(little_data, tmp_path / "run", "tasks.heard.weight=0")
    (temperature,) = (t for pair, t in training.model.temperatures.items() if pair == "text-vision")
    with torch.no_grad():
        temperature.temperature.fill_(0.001)
    training.make_step(next(iter(load_batches(training.batches, 0))))
    assert temperature.scale.item() == pytest.approx(100)


def test_a_run_goes_on_after_it_and_its_data_have_moved(whole_run, little_data, tmp_path):
    data, run = (Path(shutil.copytree(old, tmp_path / old.name)) for old in (little_data, whole_run))
    shutil.rmtree(checkpoints(run)[-1])
    train(recipe_of(data, *LONG), run, resume=True)
    assert figures(run) == figures(whole_run)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_a_terminal_that_is_closed_asks_for_a_stop_unless_nohup_was_asked_for():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, asked in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            with stop_signals(lambda: False) as stop:
                signal.raise_signal(signal.SIGHUP)
                assert stop.requested == asked
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_asks_for_a_stop_although_nobody_reads_the_errors():
    """As with `2>&1 | tee log`: the terminal interrupts tee, too, which ends."""
    unread, errors = os.pipe()
    os.close(unread)
    stderr = os.dup(2)
    try:
        with stop_signals(lambda: False) as stop:
            os.dup2(errors, 2)
            signal.raise_signal(signal.SIGINT)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        os.dup2(stderr, 2)
        os.close(errors)
        os.close(stderr)


@pytest.mark.slow
def test_a_training_goes_on_when_nobody_reads_what_it_prints(little_data, tmp_path):
    """As in a pipe to `head`."""
    sets = [f"--set={change}" for change in ("train.steps=4", "train.log_every=1", "evaluation={}")]
    process = Process("-m", "openimp", "train", little_data / "recipe.yaml", "--run-dir", tmp_path / "run", *sets)
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=300) == 0
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").exists()


@pytest.mark.parametrize(("stop", "saved"), [(1, 0), (4, 4), (5, 4)])
def test_a_stop_tells_what_is_saved(little_data, tmp_path, capsys, stop, saved):
    """Of a round of summed losses, nothing is saved before its end."""

    def interrupt(trainer, step):
        if step + 1 == stop:
            os.kill(os.getpid(), signal.SIGINT)

    run = tmp_path / "run"
    interrupted = replace(SUMMED, before_step=interrupt)
    assert not train(recipe_of(little_data, "train.save_every=2", "train.log_every=10"), run, variant=interrupted)
    advice = "the same command resumes it (openimp train: with --resume)"
    outcome = f"saved in {run}; {advice}" if saved else "nothing is saved"
    assert f"stopped at step {saved}, {outcome}" in capsys.readouterr().out
    assert last_step(run) == saved
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(2, saved + 1, 2))


def test_a_run_is_never_written_over(whole_run, little_data, tmp_path):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in whole_run.rglob("*")}

    recipe = recipe_of(little_data, *LONG)
    before = times()
    with refuses():
        train(recipe, whole_run)
    assert times() == before
    (tmp_path / "begun").mkdir()
    shutil.copy(whole_run / "recipe.yaml", tmp_path / "begun")
    for resume in (False, True):
        with refuses():
            train(recipe, tmp_path / "begun", resume)
    # Without a recipe.yaml. `openimp eval --out` writes results.jsonl.
    for file in ("checkpoints/step-00000009/state.json", "metrics.jsonl", "results.jsonl"):
        run = tmp_path / Path(file).parts[0]
        (run / file).parent.mkdir(parents=True)
        (run / file).write_text('{"step": 9}\n')
        for resume in (False, "auto"):
            with refuses():
                train(recipe, run, resume)
        assert (run / file).read_text() == '{"step": 9}\n'
    with refuses():
        train(recipe, tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def break_a_gradient(training, monkeypatch):
    """Makes one number of one gradient infinite in step 2."""
    really_step = training.updater.queue_update

    def step(number):
        if number == 2:
            training.model.encoder.blocks[0].attention.qkv.weight.grad[0, 0] = torch.inf
        return really_step(number)

    monkeypatch.setattr(training.updater, "queue_update", step)


def break_a_loss(training, monkeypatch):
    """Adds infinity to the loss of step 2, which changes no gradient."""
    really_forward = training.forward

    def forward(loaded):
        losses = really_forward(loaded)
        return replace(losses, total=losses.total + torch.inf) if loaded.visit.step == 2 else losses

    monkeypatch.setattr(training, "forward", forward)


@pytest.mark.parametrize(
    ("breaks", "changes"),
    [
        (None, ["optimizer.lr=1e30"]),
        (break_a_gradient, []),
        (break_a_loss, ["optimizer.zero_missing_grads=true"]),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(little_data, tmp_path, monkeypatch, breaks, changes):
    """Weights, their average and the optimizers' state stay as they are. The step after it is not applied either."""
    changes = ["optimizer={lr: 3e-3, muon_lr: 0.01, weight_decay: 0.1, warmup_steps: 0, ema_decay: 0.9}", *changes]
    training = trainer_of(little_data, tmp_path / "run", *changes, "tasks.heard.weight=0")
    if breaks:
        breaks(training, monkeypatch)
    batches = [*load_batches(training.batches, 0, 4)]
    for loaded in batches[: 2 if breaks else 1]:
        training.make_step(loaded)
    training.confirm()
    before = state_of(training)
    bad = batches[training.step]
    training.make_step(bad)  # The host does not know yet.
    with pytest.raises(UserError) as error:
        training.make_step(batches[bad.visit.step + 1])
    message = str(error.value)
    assert f"step {bad.visit.step}, task named: " in message
    assert "not finite" in message
    assert training.data.source_of_task["named"].row_name(bad.rows[0]) in message
    after = state_of(training)
    assert_equal(after, before)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert math.isfinite(training.grad_norm), "the last line of metrics is of the last confirmed step"


def test_a_step_that_needs_too_much_memory_is_told_and_the_steps_before_it_are_saved(little_data, tmp_path, capsys):
    """But not if the update itself does: some weights are then those of the next step."""

    def allocate(trainer: Trainer, step: int) -> None:
        if step == 2:
            torch.empty(2**50)

    def allocate_in_update(trainer: Trainer, step: int) -> None:
        if step == 2:
            trainer.updater.queue_update = lambda step: torch.empty(2**50)

    recipe = recipe_of(little_data, "train.steps=4", "tasks.heard.weight=0", "evaluation={}")
    with refuses():
        train(recipe, tmp_path / "run", variant=Variant(before_step=allocate))
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert "the learning rate only rises" in capsys.readouterr().out, "5 steps of warm-up are more than 4"
    with pytest.raises(RuntimeError):
        train(recipe, tmp_path / "half", variant=Variant(before_step=allocate_in_update))
    assert not checkpoints(tmp_path / "half")


def test_an_evaluation_that_needs_too_much_memory_costs_no_step(little_data, tmp_path, monkeypatch):
    def allocate(*_: Any, **__: Any) -> None:
        torch.empty(2**50)

    monkeypatch.setattr("openimp.training.trainer.evaluate", allocate)
    with refuses():
        train(recipe_of(little_data, "train.steps=4", "evaluation.every=2", "tasks.heard.weight=0"), tmp_path / "run")
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-00000002"]


def test_a_run_resumes_whatever_its_columns_are_called(little_data, tmp_path):
    files = sorted((little_data / "pictures").rglob("*.png"))
    rows = [json.dumps({"file": str(file.relative_to(little_data)), "a|b": file.parent.name}) for file in files]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    task = "{source: rows, inputs: {image: file}, objectives: [{type: classification, label: a|b}], batch_size: 8,"
    changes = [
        f"sources.rows={{path: {tmp_path}/rows.jsonl, root: {little_data}}}",
        f"tasks.classed={task} views: [{{image: {{size: 32}}}}]}}",
        "tasks.named.weight=0",
        "tasks.heard.weight=0",
        "evaluation={}",
        "train.steps=4",
        "train.save_every=2",
    ]
    recipe = recipe_of(little_data, *changes)
    train(recipe, tmp_path / "run")
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    assert train(recipe, tmp_path / "run", resume=True)


def state_of(training: Trainer) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a checkpoint."""
    kinds = training.model.state_dict(), training.updater.ema.weights, moments_of(training)
    return {f"{i} {name}": tensor.clone() for i, tensors in enumerate(kinds) for name, tensor in tensors.items()}


def moments_of(training: Trainer) -> dict[str, torch.Tensor]:
    return optimizer_state(training.model, training.updater.optimizers)


def test_unused_parameters_keep_their_value_and_optimizer_state(little_data, tmp_path):
    """No weight decay, no decay of moments, no count: the gradient is None, not zero."""
    changes = ["alternation.kind=intervals", "optimizer.weight_decay=0.5", "optimizer.muon_lr=0.01"]
    training = trainer_of(little_data, tmp_path / "run", *changes)
    own = {
        "named": ("stems.vision", "projections.vision", "projections.text-to-vision", "classifiers",
                  "temperatures.text-vision"),
        "heard": ("stems.audio", "projections.audio", "projections.text-to-audio", "temperatures.audio-text"),
    }  # fmt: skip
    for loaded in load_batches(training.batches, 0, 6):
        before, moments = copies(training.model.state_dict()), copies(moments_of(training))
        training.make_step(loaded)
        (other,) = own.keys() - {loaded.visit.task}
        for name, tensor in training.model.state_dict().items():
            touched = not name.startswith(own[other])
            if name.endswith(("bias", "positions.0.weight")) and torch.equal(tensor, before[name]):
                continue  # the sigmoid loss' bias, or rows whose gradient is 0
            assert torch.equal(tensor, before[name]) != touched, name
        unused = {name: tensor for name, tensor in moments_of(training).items() if name.startswith(own[other])}
        assert all(torch.equal(tensor, moments[name]) for name, tensor in unused.items())
    counts = moments_of(training)
    assert counts["encoder.norm.weight|step"] == 6
    assert counts["stems.vision.embed.weight|step"] == counts["stems.audio.embed.weight|step"] == 3


def test_zero_gradients_let_the_state_of_untouched_parameters_decay(little_data, tmp_path):
    """As in the authors' release: AdamW's momentum moves them on, its means decay, and it counts the step."""
    changes = ["alternation.kind=intervals", "optimizer.zero_missing_grads=true"]
    training = trainer_of(little_data, tmp_path / "run", *changes)
    first, second = load_batches(training.batches, 0, 2)
    assert (first.visit.task, second.visit.task) == ("named", "heard")
    training.make_step(first)
    name = "stems.vision.before.weight"
    before = training.model.get_parameter(name).detach().clone()
    mean = moments_of(training)[f"{name}|exp_avg"].clone()
    training.make_step(second)
    assert not torch.equal(training.model.get_parameter(name), before)
    torch.testing.assert_close(moments_of(training)[f"{name}|exp_avg"], 0.9 * mean)
    assert moments_of(training)[f"{name}|step"] == 2


def test_the_gradient_is_clipped_and_the_weights_are_averaged_as_the_recipe_says(little_data, tmp_path):
    changes = ["optimizer.max_grad_norm=0.01", "optimizer.ema_decay=0.5"]
    training = trainer_of(little_data, tmp_path / "run", *changes)
    seen: list[float] = []

    def note(optimizer, *_):
        grads = [parameter.grad for parameter in training.model.parameters() if parameter.grad is not None]
        seen.append(float(torch.nn.utils.get_total_norm(grads)))

    training.updater.optimizers[0].register_step_pre_hook(note)
    average = copies(training.model.state_dict())
    for step, loaded in enumerate(load_batches(training.batches, 0)):
        training.make_step(loaded)
        training.confirm()
        assert training.grad_norm > 0.01
        assert seen[-1] == pytest.approx(0.01, rel=1e-3)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in training.model.state_dict().items():
            average[name].lerp_(tensor, 1 - decay)
    for name, tensor in training.updater.ema.weights.items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-4, atol=1e-6)


def test_the_evaluated_weights_are_the_averaged_ones(whole_run, little_data, tmp_path):
    """And training goes on with its own."""
    run = Path(shutil.copytree(whole_run, tmp_path / "run"))
    training = trainer_of(little_data, run, *LONG, resume=True)
    trained = copies(training.model.state_dict())
    training.evaluate()
    assert read_lines(run / "results.jsonl") == read_lines(whole_run / "results.jsonl")
    training.updater.ema.weights = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    training.evaluate()
    assert [result.get("r1", result.get("top1")) for result in read_lines(run / "results.jsonl")[-3:]] == [0, 0, 0]
    assert_equal(training.model.state_dict(), trained)
    assert training.model.training


@pytest.mark.slow
def test_the_peak_memory_of_a_mixture_is_that_of_its_largest_task(little_data, tmp_path):
    """Nor does a step hold on to anything of the one before: a task alone has a single step here."""
    common = ["alternation.kind=intervals", "evaluation={}", "train.precision=fp32",
              "tasks.named.batch_size=128", "tasks.named.views=[{image: {size: 32}, text: {length: 16}}]",
              "tasks.heard.batch_size=96",
               "tasks.heard.views=[{audio: {seconds: 2.048}, text: {length: 16}}]"]  # fmt: skip

    def peak(name: str, *changes: str) -> int:
        return peak_bytes(lambda: train(recipe_of(little_data, *common, *changes), tmp_path / name))

    mixed = peak("mixed", "train.steps=6")
    alone = [peak(other, "train.steps=1", f"tasks.{other}.weight=0") for other in ("heard", "named")]
    assert min(alone) > 0.6 * max(alone), "the tasks should be about as large, or this tells nothing"
    assert mixed < 1.1 * max(alone)
