"""Studies: equal FLOPs for every arm, results that tell what was found, and a stop that loses nothing."""

import math
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from openimp.alternation import Alternation
from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.recipe.file import find_file
from openimp.recipe.schema import Recipe
from openimp.study.budget import part_recipe
from openimp.study.outcome import Outcome
from openimp.study.results import curves_of, write_results
from openimp.study.run import _finished, run_study
from openimp.study.schema import Study, read_study

STUDIES = sorted(path.stem for path in Path(find_file("moe", "studies")).parent.glob("*.yaml"))
LITTLE = {
    "title": "Little arms",
    "question": "Which is better?",
    "recipe": "recipe.yaml",
    "flops": 2e8,
    "seeds": [0, 1],
    "arms": {
        "together": {},
        "half": {"flops": 0.5},
        "alone": [{"tasks": ["named"]}, {"tasks": ["heard"]}],
    },
}


def write_study(folder: Path, **changes: object) -> Path:
    file = folder / "little.yaml"
    file.write_text(yaml.safe_dump(LITTLE | changes, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def done(little_data, tmp_path_factory):
    """A study of the little recipe, run to its end: (study, runs, results)."""
    runs, out = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("out")
    file = write_study(little_data)
    assert run_study(str(file), runs, out)
    return file, runs, out


def outcome(folder: Path, arm: str, seed: int) -> Outcome:
    found = Outcome()
    for run in folder.glob(f"little/{arm}-*-seed{seed}"):
        found.add(run, 0)
    return found


def test_every_arm_gets_the_flops_that_the_study_says(done):
    _, runs, _ = done
    for arm, share in {"together": 1, "half": 0.5, "alone": 1}.items():
        spent = [outcome(runs, arm, seed).flops for seed in (0, 1)]
        # What a draw by weight and whole steps leave of it.
        assert spent == pytest.approx([share * LITTLE["flops"]] * 2, rel=0.15), arm


def test_the_page_holds_what_the_runs_found(done):
    file, runs, out = done
    page = (out / "little.md").read_text()
    assert f"`openimp study {file}`" in page
    assert "2 seeds (0, 1)" in page
    for arm in LITTLE["arms"]:
        (row,) = re.findall(rf"^\| {arm} \|.*$", page, re.MULTILINE)
        means = [100 * outcome(runs, arm, seed).scores["tones"] for seed in (0, 1)]
        assert f"{sum(means) / 2:.1f} ± " in row
        assert f"{outcome(runs, arm, 0).steps} " in row
    pictures = re.findall(r"\]\((.*?\.png)\)", page)
    assert pictures == ["little.png", "little-flops.png"]
    for picture in pictures:
        assert min(Image.open(out / picture).size) > 200


def test_arms_that_differ_in_their_flops_alone_are_one_curve(done):
    study, _ = read_study(str(done[0]), smoke=False)
    assert sorted(curves_of(study)) == [["alone"], ["half", "together"]]


def test_a_summed_round_takes_every_task_once(little_data):
    """Whatever the recipe or the part says of the alternation."""
    changes = ["tasks.named.interval=2", "tasks.heard.interval=3", "alternation.kind=random"]
    summed = {"summed": True, "set": changes}
    study, _ = read_study(str(write_study(little_data, arms={"a": {}, "b": summed})), smoke=False)
    write_study(little_data)
    schedule = Alternation(part_recipe(study, study.arms["b"][0], 0))
    tasks = [visit.task for visit in schedule]
    assert tasks == (["named", "heard"] * len(tasks))[: len(tasks)]


def test_what_is_trained_is_not_trained_again(done, capsys):
    file, runs, out = done
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.jsonl")}
    (out / "little.md").unlink()
    assert run_study(str(file), runs, out)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.jsonl")} == before
    assert (out / "little.md").exists()


def test_figures_of_another_recipe_do_not_pass_as_the_study_s(done, little_data, tmp_path):
    _, runs, _ = done
    changed = write_study(little_data, arms=LITTLE["arms"] | {"half": {"flops": 0.5, "set": ["optimizer.lr=0.5"]}})
    with pytest.raises(UserError, match=r"half-0-seed0: trained with optimizer.lr .*, now 0.5; remove the folder"):
        run_study(str(changed), runs, tmp_path)
    write_study(little_data)


def test_figures_of_another_loop_do_not_pass_as_the_study_s(done):
    _, runs, _ = done
    run = runs / "little/together-0-seed0"
    recipe = Recipe.load(run / "recipe.yaml")
    assert _finished(run, recipe, "Trainer")
    with pytest.raises(UserError, match="seed0: trained by Trainer, now by SummedTrainer; remove the folder"):
        _finished(run, recipe, "SummedTrainer")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("metrics.jsonl", ""),
        ("metrics.jsonl", '{"step": 1, "totals": {}, "seconds": 1.0, "experts": {}}\n'),
        ("metrics.jsonl", '{"step": 99}\n'),
        ("results.jsonl", '{"set": "tones"}\n'),
        ("results.jsonl", "3\n"),
        ("results.jsonl", '{"step": STEPS, "set": "tones", "mrr": 0.5}\n'),
    ],
)
def test_a_finished_run_that_lost_figures_is_named(done, tmp_path, name, lines):
    file, runs, _ = done
    shutil.copytree(runs, tmp_path / "runs")
    run = tmp_path / "runs/little/together-0-seed0"
    steps = Recipe.load(run / "recipe.yaml").train.steps
    (run / name).write_text(lines.replace("STEPS", str(steps)))
    message = f"together-0-seed0: {name} is missing or damaged; remove the folder to train it again"
    with pytest.raises(UserError, match=message):
        run_study(str(file), tmp_path / "runs", tmp_path / "out")


@pytest.mark.parametrize("out", ["file", "file/folder"])
def test_no_place_for_the_results_is_told_before_anything_is_trained(done, tmp_path, out):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{out}: --out needs a folder, and none can be made there: "):
        run_study(str(done[0]), tmp_path / "runs", tmp_path / out)
    assert not (tmp_path / "runs").exists()


def test_models_of_one_arm_may_not_measure_the_same_set(little_data, tmp_path):
    for name in ("pictures", "sounds.jsonl"):
        (tmp_path / name).symlink_to(little_data / name)
    for file in little_data.glob("*.wav"):
        (tmp_path / file.name).symlink_to(file)
    data = yaml.safe_load((little_data / "recipe.yaml").read_text())
    data["tasks"]["heard_too"] = data["tasks"]["heard"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    study = write_study(tmp_path, arms={"a": {}, "b": [{"tasks": ["heard"]}, {"tasks": ["heard_too"]}]})
    with pytest.raises(UserError, match="arm 'b': two of its models measure tones; one figure would be lost"):
        run_study(str(study), tmp_path / "runs", tmp_path / "out")


def test_a_study_is_no_work_for_several_processes(done, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="a study trains in one process; start it without torchrun"):
        run_study(str(done[0]), tmp_path / "runs", tmp_path)


def test_cosines_that_were_not_measured_leave_an_empty_cell(tmp_path):
    """A task that comes rarely may not come twice in a short training, or not at all."""
    outcome = {"flops": 1, "steps": 1, "parameters": 1, "seconds": 1.0, "scores": {"s": 0.5}}
    found = {
        "a": [Outcome(**outcome, cosines={"x|x": [0.5], "x|y": [-0.25]}), Outcome(**outcome, cosines={"x|x": [0.25]})],
        "b": [Outcome(**outcome, cosines={"x|x": [1.0]}), Outcome(**outcome)],
        "c": [Outcome(**outcome), Outcome(**outcome)],
    }
    arms = {arm: {} for arm in found}
    study = Study(title="t", question="q", recipe="r", flops=1, seeds=[0, 1], conflict=True, arms=arms)
    write_results(study, found, tmp_path, "t", "c")
    page = (tmp_path / "t.md").read_text()
    assert "| x and x | 0.375 (0% below 0) | 1.000 (0% below 0) |" in page
    assert "| x and y | -0.250 (100% below 0) |  |" in page
    assert (tmp_path / "t-cosines.png").stat().st_size


PLAIN = Outcome(flops=1, steps=1, parameters=1, seconds=1.0, scores={"s": 0.5})


def test_results_that_cannot_be_written_leave_the_old_ones(tmp_path):
    for name in ("t.md", "t.png"):
        (tmp_path / name).write_text("old")
    study = Study(title="t", question="q", recipe="r", flops=1, arms={"a": {}, "b": {"flops": 2}})
    broken = replace(PLAIN, seconds=None)
    with pytest.raises(TypeError):
        write_results(study, {"a": [PLAIN], "b": [broken]}, tmp_path, "t", "c")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"t.md": "old", "t.png": "old"}
    write_results(study, {"a": [PLAIN], "b": [PLAIN]}, tmp_path, "t", "c")
    assert {path.name for path in tmp_path.iterdir()} == {"t.md", "t.png", "t-flops.png"}
    assert (tmp_path / "t.md").read_text() != "old"


def test_a_bar_in_a_name_is_none_of_the_table(tmp_path):
    study = Study(title="t", question="q", recipe="r", flops=1, arms={"a|b": {}, "c": {}})
    write_results(study, {"a|b": [PLAIN], "c": [PLAIN]}, tmp_path, "t", "c")
    assert "\n| a\\|b | **50.0** |" in (tmp_path / "t.md").read_text()


def test_a_training_that_was_killed_before_its_first_checkpoint_begins_anew(done, tmp_path):
    file, runs, _ = done
    shutil.copytree(runs, tmp_path / "runs")
    (killed,) = tmp_path.glob("runs/little/half-0-seed1")
    shutil.rmtree(killed / "checkpoints")
    (killed / "results.jsonl").unlink()
    assert run_study(str(file), tmp_path / "runs", tmp_path / "out")
    assert outcome(tmp_path / "runs", "half", 1).scores == outcome(runs, "half", 1).scores


def test_a_stopped_study_goes_on_where_it_stopped(done, little_data, tmp_path):
    """Stopped by a signal in its first training, it ends with the figures of the one that was never stopped."""
    file, runs, _ = done
    command = [sys.executable, "-u", "-m", "openimp", "study", file, "--runs", tmp_path / "runs", "--out", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
    assert process.returncode == 0
    assert "go on with" in rest
    assert not list(tmp_path.glob("*.md"))
    assert run_study(str(file), tmp_path / "runs", tmp_path)
    for arm in LITTLE["arms"]:
        assert outcome(tmp_path / "runs", arm, 0).scores == outcome(runs, arm, 0).scores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"armz": {}}, "unknown key 'armz'"),
        ({"arms": {"only": {}}}, "arms: .*at least 2"),
        ({"arms": {"a": {}, "b": {"set": ["model.widht=3"]}}}, "arm 'b': .*unknown key 'widht'; did you mean 'width'"),
        ({"arms": {"a": {}, "b": {"tasks": ["herd"]}}}, "arm 'b': .*'herd'; did you mean 'heard'"),
        ({"arms": {"a": {"summed": True}, "b": {}}, "conflict": True}, "which arm 'a' has not"),
        ({"arms": {"a": {"tasks": ["named"]}, "b": {}}, "conflict": True}, "which arm 'a' has not"),
        ({"recipe": "none.yaml"}, "none.yaml: no such recipe"),
        ({"arms": {"a": {}, "b": []}}, "arms.b: .*at least 1"),
        ({"arms": {"a": {}, "../b": {}}}, "arm '../b': no slash may be in its name"),
        ({"arms": {"a": {}, "b\0": {}}}, r"arm 'b\\x00': no control character may be in its name"),
        ({"arms": {"x y": {}, "x_y": {}}}, "arms 'x y' and 'x_y' would share files: only spaces, _ - or commas differ"),
        ({"arms": {"x y": {}, "x, y": {}}}, "arms 'x y' and 'x, y' would share files"),
        ({"arms": {"a": {}, "b": {"tasks": ["named", "named"]}}}, "arm 'b': tasks: 'named' is given twice"),
        ({"seeds": [0, 1, 0]}, "seeds: 0 is given twice"),
        ({"seeds": [10**30]}, f"seeds.0: Input should be less than {2**63}"),
        ({"seeds": [-1]}, "seeds.0: Input should be greater than or equal to 0"),
        ({"clip_benchmark": ["tones", "tones"]}, "clip_benchmark: 'tones' is given twice"),
        ({"flops": math.inf}, "flops: Input should be a finite number"),
        ({"arms": {"a": {}, "b": {"flops": math.inf}}}, "arms.b.flops: Input should be a finite number"),
        (
            {"flops": 1e300},
            "arm 'together': its FLOPs pay for .*e.2.. steps, where a training takes at most 100,000,000",
        ),
        ({"flops": 1e300, "arms": {"a": {}, "b": {"flops": 1e300}}}, "arm 'a': its FLOPs pay for"),
        ({"arms": {"a": {}, "b": {"flops": 1e300}}}, "arm 'b': its FLOPs pay for"),
        ({"arms": {"a": {}, "b": [{}, {}]}}, "arm 'b': each of its models needs tasks of its own"),
        ({"arms": {"a": {}, "b": [{"tasks": ["named"]}] * 2}}, "arm 'b': each of its models needs tasks of its own"),
        ({"arms": {"a": {}, "b": {"set": ["train.steps=3"]}}}, "arm 'b': train.steps follows from the study's FLOPs"),
        (
            {"arms": {"a": {}, "b": {"set": ["optimizer={lr: 1e-3, warmup_steps: 7}"]}}},
            "arm 'b': optimizer.warmup_steps follows from",
        ),
        ({"arms": {"a": {}, "b": {"set": ["model.width={"]}}}, "arm 'b': --set model.width={: '{' is not valid YAML"),
        ({"arms": {"a": {}, "b": {"set": ["model.width"]}}}, "arm 'b': --set model.width: expected KEY=VALUE"),
        ({"arms": {"a": {}, "b": {"set": ["seed =9"]}}}, "arm 'b': seed follows from the study's FLOPs and seeds"),
        ({"set": ["tasks.named.weight=0"], "arms": {"a": {}, "b": {"tasks": ["named"]}}}, "arm 'b': .*weight 0"),
        ({"clip_benchmark": ["tones"]}, "evaluation.sets.tones: CLIP_benchmark takes pictures and their texts"),
        ({"clip_benchmark": ["tonez"]}, "clip_benchmark: no retrieval set is called 'tonez'; did you mean 'tones'"),
        ({"set": ["evaluation.sets={}"]}, "no evaluation set of type retrieval"),
        ({"arms": {"a": {"tasks": ["named"]}, "b": {"tasks": ["heard"], "set": ["evaluation.sets={}"]}}}, "no eval"),
    ],
)
def test_a_mistake_in_a_study_is_told_before_anything_is_trained(little_data, tmp_path, change, message):
    for name in ("recipe.yaml", "pictures", "sounds.jsonl"):
        (tmp_path / name).symlink_to(little_data / name)
    with pytest.raises(UserError, match=message):
        run_study(str(write_study(tmp_path, **change)), tmp_path / "runs", tmp_path / "out")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "out").exists()


def test_an_unknown_study_is_told_with_the_nearest_known():
    with pytest.raises(UserError, match="moo: no such study; did you mean 'moe'"):
        read_study("moo", smoke=False)


@pytest.mark.parametrize("name", STUDIES)
def test_bundled_studies_run_to_their_end(name, tmp_path):
    """Their smallest setting, on a part of the bundled data."""
    assert run_study(name, tmp_path / "runs", tmp_path / "out", smoke=True)
    study, title = read_study(name, smoke=True)
    assert len(read_study(name, smoke=False)[0].seeds) >= 3
    page = (tmp_path / "out" / f"{title}.md").read_text()
    assert "--smoke" in page.splitlines()[0]
    assert "Findings" not in page
    for arm, parts in study.arms.items():
        assert f"\n| {arm} |" in page
        for i, _ in enumerate(parts):
            (run,) = (tmp_path / "runs" / title).glob(f"{arm}-{i}-seed0".replace(" ", "_"))
            assert read_lines(run / "results.jsonl")
    for picture in re.findall(r"\]\((.*?\.png)\)", page):
        assert (tmp_path / "out" / picture).exists()
