"""Studies: every arm gets equal FLOPs, the page shows the runs' results, and a stopped study resumes without loss."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from openimp.alternation import Schedule
from openimp.common.json_lines import append, read_lines
from openimp.data.files import locate
from openimp.inference.join import embed_rows
from openimp.recipe.file import find_file
from openimp.recipe.schema import Recipe
from openimp.study.budget import MIN_STEPS, SMOKE_ROWS, arm_model_recipe
from openimp.study.outcome import Outcome
from openimp.study.results import curves_of, write_results
from openimp.study.run import run_study
from openimp.study.schema import Study, file_name, read_study
from openimp.training.trainer import train
from tests.little import png, write_tar
from tests.messages import refuses
from tests.processes import Process

STUDIES = sorted(
    {path.stem for path in Path(find_file("moe", "studies")).parent.glob("*.yaml")} - {"photos_and_speech"}
)
"""The bundled studies of bundled data. recipe/test_photos_and_speech.py runs the other one."""
TRAINED = ["alternation", "conflict", "distillation", "peer", "tower"]
"""Studies that differ in more than the keys of their recipes."""
LITTLE = {
    "title": "Little arms",
    "question": "Which is better?",
    "recipe": "recipe.yaml",
    "flops": 5e8,
    "seeds": [0, 1],
    "arms": {
        "together": {},
        "half": {"flops_factor": 0.5},
        "alone": [{"tasks": ["named"]}, {"tasks": ["heard"]}],
    },
}


PLAIN = Outcome(flops=123_456_789, steps=1, parameters=1, seconds=1.0, scores={"s": 0.5})
HEARD_TOO = """tasks.heard_too={source: sounds, inputs: {audio: sound, text: caption}, batch_size: 6,
    objectives: [{type: contrastive}], views: [{audio: {seconds: 0.512}, text: {length: 8}}]}"""


def write_study(folder: Path, **changes: object) -> Path:
    file = folder / "little.yaml"
    file.write_text(yaml.safe_dump(LITTLE | changes, sort_keys=False))
    return file


def write_vectors(teacher: Path, out: Path) -> None:
    """Does what the commands in the head of studies/distillation.yaml do, with the first rows of the bundled data."""
    lines = find_file("distillation", "studies").read_text().splitlines()
    commands = [shlex.split(line)[2:] for line in lines if line.startswith("#   teach ")]
    assert len(commands) == 6
    for source, name, modality, column, to in commands:
        if source == f"openimp:{name}.parquet":
            (bundled,) = locate(name, source)[1]
            rows, source = pq.read_table(bundled, filters=[("split", "=", "train")]), str(teacher / "rows.parquet")
            pq.write_table(rows[:SMOKE_ROWS], source)
        else:
            source = str(out.parent / source)
        embed_rows(teacher, source, out / f"{name}.parquet", modality, column, to)


@pytest.fixture(scope="module")
def done(little_data, tmp_path_factory):
    """A finished study of the little recipe: (study, runs, results)."""
    runs, out = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("out")
    file = write_study(little_data)
    assert run_study(str(file), runs, out)
    return file, runs, out


def outcome(folder: Path, arm: str, seed: int) -> Outcome:
    found = Outcome()
    for run in folder.glob(f"little/{arm}-*-seed{seed}"):
        found.add(run)
    return found


@pytest.mark.slow
def test_every_arm_spends_the_flops_of_the_study(done):
    _, runs, _ = done
    for arm, share in {"together": 1, "half": 0.5, "alone": 1}.items():
        spent = [outcome(runs, arm, seed).flops for seed in (0, 1)]
        # Tasks are drawn at random, and steps are whole, so the FLOPs are only about equal.
        assert spent == pytest.approx([share * LITTLE["flops"]] * 2, rel=0.15), arm


def test_the_page_shows_the_results_of_the_runs(done):
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


def test_accuracies_count_all_sets(done):
    _, runs, _ = done
    run = next(runs.glob("little/together-*-seed0"))
    found = Outcome()
    found.add(run, "accuracy")
    results = read_lines(run / "results.jsonl")
    assert found.scores["colours"] == next(result["top1"] for result in results if result["set"] == "colours")
    both = [result["r1"] for result in results if result["set"] == "tones"]
    assert found.scores["tones"] == sum(both) / 2


def test_arms_that_differ_only_in_their_flops_are_one_curve(done):
    study, _ = read_study(str(done[0]), smoke=False)
    assert sorted(curves_of(study)) == [["alone"], ["half", "together"]]


def test_a_summed_round_takes_every_task_once(little_data):
    """Even if the recipe or the part sets another alternation."""
    changes = ["tasks.named.interval=2", "tasks.heard.interval=3", "alternation.kind=random"]
    summed = {"summed": True, "set": changes}
    study, _ = read_study(str(write_study(little_data, arms={"a": {}, "b": summed})), smoke=False)
    write_study(little_data)
    schedule = Schedule(arm_model_recipe(study, study.arms["b"][0], 0))
    tasks = [visit.task for visit in schedule]
    assert tasks == (["named", "heard"] * len(tasks))[: len(tasks)]


CONTRASTIVE = "objectives: [{type: contrastive}]"
CLASSES = "objectives: [{type: classification, label: label}]"


def test_a_small_recipe_has_the_classes_and_words_of_the_whole(little_data, tmp_path):
    write_tar(
        tmp_path / "a.tar", {f"{i}.{end}": data for i in range(8) for end, data in (("png", png(i)), ("txt", b"a"))}
    )
    changes = [
        "modalities.text.min_df=2",
        f"sources.stream={{path: {tmp_path}/a.tar, stream: true, lanes: 8}}",
        f"tasks.streamed={{source: stream, inputs: {{image: png, text: txt}}, {CONTRASTIVE}, batch_size: 24}}",
        f"sources.probed={{path: {little_data}/pictures}}",
        "evaluation.sets.probe={type: probe, train: probed, source: pictures, inputs: {image: file}, label: label}",
    ]
    study, _ = read_study(str(write_study(little_data, arms={"a": {}, "b": {}}, set=changes)), smoke=True)
    write_study(little_data)
    small = arm_model_recipe(study, study.arms["a"][0], 0, smoke=True)
    assert {name: source.limit for name, source in small.sources.items()} == {
        "pictures": None,
        "sounds": SMOKE_ROWS,
        "stream": None,
        "probed": None,
    }
    assert small.modalities["text"].min_df == 1
    assert small.tasks["streamed"].batch_size == 24


def test_a_model_for_some_tasks_has_no_heads_and_learning_rates_of_others(little_data):
    reads = "inputs: {image: file}, label: label"
    changes = [
        f"sources.again={{path: {little_data}/pictures}}",
        f"tasks.other={{source: again, inputs: {{image: file}}, {CLASSES}, batch_size: 8}}",
        f"""evaluation={{best: other_classes, sets: {{
          named_classes: {{type: classification, task: named, source: pictures, {reads}}},
          other_classes: {{type: classification, task: other, source: again, {reads}}}}}}}""",
        "optimizer.lr_scale={stems.audio: 0.5, projections.text-to-audio: 0.5, stems.vision: 0.1, encoder: 0.5}",
    ]
    arms = {"whole": {}, "each": [{"tasks": ["named"]}, {"tasks": ["other"]}]}
    study, _ = read_study(str(write_study(little_data, arms=arms, set=changes)), smoke=False)
    write_study(little_data)
    recipes = [arm_model_recipe(study, part, 0, smoke=True) for part in study.arms["each"]]
    named, other = (recipe.evaluation for recipe in recipes)
    assert (list(named.sets), named.best) == (["named_classes"], None)
    assert (list(other.sets), other.best) == (["other_classes"], "other_classes")
    assert recipes[0].optimizer.lr_scale == {"stems.vision": 0.1, "encoder": 0.5}


def test_a_run_without_its_metrics_is_refused(done, tmp_path):
    runs = shutil.copytree(done[1], tmp_path / "runs")
    (runs / "little/together-0-seed0" / "metrics.jsonl").write_text("")
    with refuses():
        run_study(str(done[0]), runs, tmp_path / "out")


def test_results_of_published_benchmarks_are_no_scores_of_a_study(little_run, tmp_path):
    run = Path(shutil.copytree(little_run, tmp_path / "run"))
    before, after = Outcome(), Outcome()
    before.add(run)
    append(run / "results.jsonl", read_lines(run / "results.jsonl")[-1] | {"set": "flickr", "library": "mteb 2"})
    after.add(run)
    assert after.scores == before.scores


def test_an_impossible_results_folder_is_reported_before_training(done, tmp_path):
    (tmp_path / "file").touch()
    with refuses():
        run_study(str(done[0]), tmp_path / "runs", tmp_path / "file")
    assert not (tmp_path / "runs").exists()


def test_a_study_refuses_several_processes(done, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with refuses():
        run_study(str(done[0]), tmp_path / "runs", tmp_path)


def test_cosines_that_were_not_measured_have_an_empty_cell(tmp_path):
    """In a short training, a rare task may occur only once or never."""
    found = {
        "a|b": [replace(PLAIN, cosines={"x|x": [0.5], "x|y": [-0.25]}), replace(PLAIN, cosines={"x|x": [0.25]})],
        "b": [replace(PLAIN, cosines={"x|x": [1.0]}), PLAIN],
        "c": [PLAIN, PLAIN],
    }
    arms = {arm: {} for arm in found}
    study = Study(title="t", question="q", recipe="r", flops=1, seeds=[0, 1], conflict=True, arms=arms)
    write_results(study, found, tmp_path, "t", "c")
    page = (tmp_path / "t.md").read_text()
    assert "| x and x | 0.375 (0% below 0) | 1.000 (0% below 0) |" in page
    assert "| x and y | -0.250 (100% below 0) |  |" in page
    assert "\n| a\\|b | **50.0 ± 0.0** |" in page, "a vertical bar is escaped"
    assert page.count(" | 0.000123 | ") == 3, "three digits of the TFLOPs"


def test_only_arms_with_all_sets_are_plotted_against_their_flops(tmp_path):
    """An arm that lacks a set has no mean over the sets, so its FLOPs have nothing to be plotted against."""
    arms = {"all tasks": {}, "one task": {"flops_factor": 2}, "all tasks, longer": {"flops_factor": 2}}
    both = replace(PLAIN, scores={"s": 0.5, "t": 0.5})
    without, with_longer = tmp_path / "without", tmp_path / "with"
    for folder, found in ((without, [both, PLAIN]), (with_longer, [both, PLAIN, both])):
        named = dict(zip(arms, ([outcome] for outcome in found)))
        study = Study(title="t", question="q", recipe="r", flops=1, seeds=[0], arms={arm: arms[arm] for arm in named})
        write_results(study, named, folder, "t", "c")
    assert not (without / "t-flops.png").exists()
    assert (with_longer / "t-flops.png").is_file()


@pytest.mark.slow
def test_a_stopped_study_resumes(done, tmp_path):
    """A signal stops its first training. After resuming, the scores equal those of the study that was not stopped."""
    _, runs, _ = done
    file = tmp_path / "little.yaml"
    study = LITTLE | {
        "recipe": str(done[0].with_name("recipe.yaml")),
        "seeds": [0],
        "arms": {"together": {}, "half": {"flops_factor": 0.5}},
    }
    file.write_text(yaml.safe_dump(study))
    process = Process("-m", "openimp", "study", file, "--runs", tmp_path / "runs", "--out", tmp_path)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.terminate()
            break
    rest = process.stdout.read()
    assert process.wait() == 0
    assert "the same command resumes it" in rest
    assert not list(tmp_path.glob("*.md"))
    assert run_study(str(file), tmp_path / "runs", tmp_path)
    for arm in study["arms"]:
        assert outcome(tmp_path / "runs", arm, 0).scores == outcome(runs, arm, 0).scores


def test_a_mistake_in_a_study_is_reported_before_training(own_data, tmp_path):
    for change in (
        "arms: {a: {}}",
        "arms: {a: {}, b: {set: [model.widht=3]}}",
        "arms: {a: {}, b: {tasks: [herd]}}",
        "{arms: {a: {}, b: {summed: true}}, conflict: true}",
        "recipe: none.yaml",
        "arms: {a: {}, ../b: {}}",
        "arms: {a: {}, b: {tasks: [named, named]}}",
        "seeds: [0, 1, 0]",
        "flops: 2.0e+7",
        "arms: {a: {}, b: [{tasks: [named]}, {tasks: [named]}]}",
        "arms: {a: {}, b: [{tasks: [heard]}, {tasks: [heard_too]}]}",
        "arms: {a: {}, b: {set: ['optimizer={lr: 1e-3, warmup_steps: 7}']}}",
        "{set: [tasks.named.weight=0], arms: {a: {}, b: {tasks: [named]}}}",
        "set: ['evaluation.sets={}']",
        "arms: {a: {tasks: [named]}, b: {tasks: [heard], set: ['evaluation.sets={}']}}",
        "arms: {a b: {}, a-b: {}}",
    ):
        options = yaml.safe_load(change)
        if "heard_too" in change:
            options["set"] = [HEARD_TOO]
        with refuses():
            run_study(str(write_study(own_data, **options)), tmp_path / "runs", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in STUDIES if name not in TRAINED])
def test_the_arms_of_other_bundled_studies_can_be_trained(name):
    """Each recipe is built, and the FLOPs of its steps are counted."""
    study, _ = read_study(name, smoke=False)
    for parts in study.arms.values():
        for part in parts:
            assert arm_model_recipe(study, part, 0).train.steps >= MIN_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_bundled_studies_run(name, tiny_recipe, write_tiny, tmp_path, monkeypatch):
    """In their --smoke setting, on a part of the bundled data."""
    if name == "distillation":
        teacher = write_tiny(tiny_recipe(model={"embed_dim": 256}), tmp_path / "teacher")
        write_vectors(teacher, tmp_path / "vectors")
        monkeypatch.chdir(tmp_path)
    if name == "tower":  # The command in its head, with few steps on a few icons.
        changes = ["train.steps=2", "train.num_workers=0", "sources.icons.limit=300", "evaluation.sets={}"]
        train(Recipe.load("icons", changes), tmp_path / "runs/icons")
        monkeypatch.chdir(tmp_path)
    assert run_study(name, tmp_path / "runs", tmp_path / "out", smoke=True)
    study, title = read_study(name, smoke=True)
    assert len(read_study(name, smoke=False)[0].seeds) >= 3
    page = (tmp_path / "out" / f"{title}.md").read_text()
    assert "--smoke" in page.splitlines()[0]
    assert "Findings" not in page
    for arm, parts in study.arms.items():
        assert f"\n| {arm} |" in page
        for i, _ in enumerate(parts):
            (run,) = (tmp_path / "runs" / title).glob(f"{file_name(arm)}-{i}-seed0")
            assert read_lines(run / "results.jsonl")
    for picture in re.findall(r"\]\((.*?\.png)\)", page):
        assert (tmp_path / "out" / picture).exists()
