"""The reported speed of a training run: step times, the wait for data, and advice against it."""

from pathlib import Path

import PIL.Image
import pytest
from processes import run

from openimp.common.json_lines import read_lines
from openimp.recipe.schema import Recipe
from openimp.training.step_timer import StepTimer, advice, speed_text


@pytest.mark.slow
def test_waiting_for_data_is_told_once_with_what_could_be_done(own_data, tmp_path):
    """Of large pictures, decoded by the process that trains; not at the first line, when workers would start."""
    for i, file in enumerate(sorted((own_data / "pictures").rglob("*.png"))):
        PIL.Image.new("RGB", (900 + i, 900), (i, 9 * i, 90)).save(file)
    recipe = own_data / "recipe.yaml"
    changes = ["--set=evaluation={}", "--set=train.log_every=4", "--set=train.save_every=100"]
    done = run("-m", "openimp", "train", recipe, "--run-dir", tmp_path / "run", *changes, check=True)
    assert done.stderr == ""
    *_, first, second, warning, third = done.stdout.splitlines()
    assert all(line.startswith(f"step {4 * i}/12") for i, line in enumerate((first, second, third), 1))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert warning.startswith(
        f"{lines[1]['data_wait']:.0%} of the time is spent waiting for data, most of it for task named; "
        "raise train.num_workers (now 0; "
    )
    smaller = "use smaller views in tasks.named (lower resolution, fewer frames or seconds)"
    assert warning.endswith(f" per rank), set sources.pictures.cache=memory or {smaller}")
    assert all(line["step_p50"] <= line["step_p95"] < line["seconds"] for line in lines)
    assert lines[1]["data_wait"] == pytest.approx(sum(lines[1]["waits"].values()))


def test_the_advice_fits_the_recipe(little_data, streamed, monkeypatch):
    def told(folder: Path, task: str, *changes: str, rare_waits: bool = False) -> str:
        recipe = Recipe.load(folder / "recipe.yaml", changes)
        return " | ".join(advice(recipe, recipe.make_modalities(), task, rare_waits))

    smaller = "use smaller views in tasks.named (lower resolution, fewer frames or seconds)"
    many = "train.num_workers=1000"
    assert told(little_data, "named", many) == f"set sources.pictures.cache=memory | {smaller}"
    assert told(little_data, "named", many, "sources.pictures.cache=memory") == ""
    assert told(streamed[0], "named", many, *streamed[1]) == smaller
    ahead = told(little_data, "heard", many, "train.prefetch_factor=3", rare_waits=True)
    assert ahead.startswith("raise train.prefetch_factor (now 3) | set sources.sounds.cache=memory | ")
    assert told(little_data, "heard", rare_waits=True).startswith("raise train.num_workers (now 0; ")
    for cores, raises in ((2, False), (8, True)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        decoded = told(little_data, "named", "sources.pictures.cache=memory")
        assert decoded == ("raise train.num_workers (now 0; 8 cores per rank)" if raises else "")


def test_tasks_without_views_to_shrink_are_not_told_to_shrink_them(little_data, little_run):
    """Those that read only texts or what a tower has embedded."""
    text = "{source: pictures, inputs: {text: label}, objectives: [{type: classification, label: label, of: text}]}"
    views = "tasks.named.views=[{text: {length: 8}}]"
    for changes in (
        [f"tasks={{named: {text}}}", "modalities={}"],
        [f"modalities.vision={{tower: {little_run}}}", views],
    ):
        recipe = Recipe.load(little_data / "recipe.yaml", ["train.num_workers=1000", "evaluation={}", *changes])
        assert advice(recipe, recipe.make_modalities(), "named", rare_waits=False) == []
        timer = StepTimer()
        timer.records = 2
        record = {"data_wait": 0.5, "waits": {"named": 0.5}}
        assert timer.warning(record, recipe, recipe.make_modalities()) is None
        fewer = Recipe.build({**recipe.to_dict(), "train": {"num_workers": 0}})
        assert "raise train.num_workers (now 0" in timer.warning(record, fewer, recipe.make_modalities())


def test_a_line_is_short():
    record = dict(
        examples_per_s=1234.5, tokens_per_s=1_234_567, mfu=0.14, data_wait=0.014, step_p50=0.0421, step_p95=1.3
    )
    assert speed_text(record) == "  1,234 examples,  1.23 M tokens/s  MFU 14%  wait  1%  step 42.1 ms (p95 1.30 s)"
