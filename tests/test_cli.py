"""The command line: help that is the docstring, one line for what the user can mend, commands that do their work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openimp import cli
from openimp.common.json_lines import read_lines
from openimp.common.versions import openimp_version

COMMANDS = sorted(command.callback.__name__ for command in cli.app.registered_commands)
ZERO_SHOT = "type: zero_shot, source: pictures, inputs: {image: file}, label: label, view: {image: {size: 16}}"


@pytest.fixture
def refused(openimp):
    """Runs a command that must fail as a user's mistake does, and returns its one line."""

    def run(*arguments: str | Path) -> str:
        code, _, err = openimp(*arguments)
        assert code == 2
        assert re.fullmatch("openimp: .*\n", err)
        assert "Traceback" not in err
        return err.removeprefix("openimp: ").rstrip("\n")

    return run


@pytest.fixture
def succeeded(openimp):
    """Runs a command that must succeed without a word on standard error, and returns what it prints."""

    def run(*arguments: str | Path) -> str:
        code, out, err = openimp(*arguments)
        assert (code, err) == (0, "")
        return out

    return run


def sets(*changes: str) -> list[str]:
    return [argument for change in changes for argument in ("--set", change)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_the_docstring(openimp, command):
    code, out, _ = openimp(command, "--help")
    assert code == 0
    assert " ".join(getattr(cli, command).__doc__.split()) in " ".join(out.replace("│", " ").split())
    assert command in openimp("--help")[1]


def test_help_shows_defaults_that_are_not_constants_and_the_version_is_the_one_that_results_name(succeeded):
    """typer reads a default in brackets in the help's own text as markup, and drops it."""
    assert "RUN/search.index" in succeeded("index", "--help")
    assert succeeded("--version") == f"openimp {openimp_version()}\n"


@pytest.mark.slow
def test_a_process_says_it_in_one_line_and_exits_with_2(own_data):
    """As the shell sees it, from a worker process too."""
    for file in own_data.glob("*.wav"):
        if file.name != "0.wav":  # If none could be read, that would be told before the workers start.
            file.write_bytes(b"no sound")
    command = [sys.executable, "-m", "openimp", "train", str(own_data / "recipe.yaml"), "--run", str(own_data / "run")]
    changes = sets("tasks.named.weight=0", "train.num_workers=1")
    done = subprocess.run([*command, *changes], capture_output=True, text=True)
    assert done.returncode == 2
    told = "openimp: tasks.heard: 10 examples in a row could not be read in step 0; first: sounds.jsonl["
    assert re.fullmatch(f"{re.escape(told)}.*\n", done.stderr)
    code = "import sys, openimp.cli; print('torch' in sys.modules)"
    quick = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert quick.stdout == "False\n", "help should not wait for torch"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.stepz=1", "recipe.yaml: train: unknown key 'stepz'; did you mean 'steps'?"),
        ("tasks.heard.inputs.audio=sond", "tasks.heard: source sounds (*no column 'sond'*'sound'?"),
        ("tasks.named.objectives.1.label=lable", "tasks.named: source pictures (*'lable'; did you mean 'label'?"),
        ("tasks.named.objectives.0.positives_by=nam", "tasks.named: source pictures (*'nam'; did you mean 'name'?"),
        (
            "tasks.named.objectives=[{type: contrastive}, {type: contrastive, loss: sigmoid}]",
            "objectives.0 already compares image and text; drop one of the two",
        ),
        ("sources.sounds.path=missing.jsonl", "source sounds: *missing.jsonl: no such file or folder"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused_before_training(
    refused, little_data, tmp_path, monkeypatch, change, message
):
    monkeypatch.chdir(tmp_path)
    told = refused("train", little_data / "recipe.yaml", "--run", tmp_path / "run", *sets(change))
    assert re.search(re.escape(message).replace(r"\*", ".*"), told)
    assert not (tmp_path / "run").exists()


def test_what_is_no_recipe_no_run_and_no_model_is_refused(refused, tmp_path, little_data, little_run):
    (tmp_path / "bad.yaml").write_text("name: [")
    (tmp_path / "folder").mkdir()
    assert re.search("bad.yaml: not valid YAML.*at line 1, column 8", refused("train", tmp_path / "bad.yaml"))
    told = "demoo: no such file or folder, and no recipe of openimp; did you mean 'demo'?"
    assert refused("train", "demoo") == told
    assert refused("info", "runs/nothing") == "runs/nothing: no such file or folder"
    assert "expected KEY=VALUE" in refused("train", "demo", "--set", "train.steps")
    assert "is not valid YAML" in refused("train", "demo", "--set", f"seed={'9' * 5000}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))  # Where the shell leaves ~ as it is.
        assert f"{tmp_path}/folder: nothing to report on" in refused("report", "~/folder")
        assert f"{tmp_path}/none: no such file" in refused("eval", little_run, "--recipe=~/none")
    assert "folder: is a folder, expected a recipe" in refused("plan", tmp_path / "folder")
    for command in ("eval", "info"):
        assert "folder: no model here" in refused(command, tmp_path / "folder")
    assert "no evaluation set is called 'tone'; did you mean 'tones'?" in refused("eval", little_run, "tone")
    other = little_data / "recipe.yaml"
    damaged = Path(shutil.copytree(little_run / "checkpoints" / "step-00000012", tmp_path / "damaged"))
    weights = damaged / "ema" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "ema: damaged: " in refused("eval", damaged, "--recipe", other)
    (damaged / "tokenizer.json").write_bytes(b"\xff\xfe{")
    assert "tokenizer.json: damaged: 'utf-8' codec" in refused("info", damaged)
    for content, told in (("{", "Expecting"), ("[" * 200_000, "recursion"), ("[]", "expected a JSON object")):
        (damaged / "config.json").write_text(content)
        assert re.search(f"config.json: damaged: .*{told}", refused("info", damaged))
    (damaged / "config.json").write_text('{"format": 6, "model": "IMP", "classes": {}}')
    assert "config.json: damaged: it cannot be read: KeyError('recipe')" in refused("info", damaged)
    (damaged / "config.json").write_text('{"format": 99}')
    assert "in format 99, and this version of openimp reads formats 6, 7 and 8 only; use the version" in refused(
        "info", damaged
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "other.json", "model/0.safetensors"])
def test_pipes_and_huge_files_in_a_model_folder_are_refused_and_not_read(refused, tiny_model_folder, tmp_path, name):
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    image = tmp_path / "0.png"
    image.touch()
    (folder / name).unlink(missing_ok=True)
    if name.endswith(".json"):
        with (folder / name).open("wb") as file:
            file.truncate(2**40)  # It takes no room on the disk.
        assert f"{name}: is larger than 67,108,864 bytes" in refused("embed", folder, image)
        (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name}: is not a regular file" in refused("embed", folder, image)


def test_control_characters_of_names_are_not_printed(openimp, refused, own_data):
    """They would move the cursor, change the title, or write to the clipboard."""
    file = own_data / "recipe.yaml"
    text = file.read_text(encoding="utf-8").replace("  named:", '  "na\\e]52;c;cG93bmVk\\amed\\u202e":')
    file.write_text(text, encoding="utf-8")
    code, out, _ = openimp("info", file)
    assert code == 0
    assert "na]52;c;cG93bmVkmed" in out
    assert not {"\x1b", "\a", "\u202e"} & {*out}
    assert "no[2Jthing: no such file or folder" in refused("train", "no\x1b[2Jthing")


def test_what_cannot_be_written_or_would_be_ignored_is_refused_at_once(refused, little_data, little_run, tmp_path):
    file, missing = tmp_path / "file", tmp_path / "missing" / "results.jsonl"
    file.touch()
    train = ("train", little_data / "recipe.yaml", "--run")
    assert refused(*train, file) == f"{file}: is a file; name a directory with --run-dir"
    assert refused(*train, file / "run") == f"{file / 'run'}: Not a directory"
    for out in (missing, tmp_path):
        told = f"{out}: --out needs a file, in a directory that is there"
        assert refused("eval", little_run, "--out", out) == told
    told = f"{little_run}: --set changes a recipe, and this is a run or a model"
    assert refused("info", little_run, *sets("train.steps=1")) == told
    if Path("/dev/full").exists():  # Only Linux has a disk that is always full.
        told = "/dev/full: No space left on device"
        assert refused("eval", little_run, "tones", "--out", "/dev/full") == told


def test_the_views_of_another_recipe_must_suit_the_model(refused, succeeded, little_data, little_run, tmp_path):
    """The other recipe needs none of the run's sources, and its patches may be of another size."""
    text = (little_data / "recipe.yaml").read_text().replace("patch: [2, 8, 8]", "patch: [2, 4, 4]")
    text = text.replace("pictures", "squares").replace("{path: squares}", f"{{path: {little_data / 'pictures'}}}")
    for size in (20, 24):
        view = f"view: {{image: {{size: {size}}}}}"
        (tmp_path / f"{size}.yaml").write_text(text.replace("view: {image: {size: 16}}", view))
    command = ("eval", little_run, "colours", "--recipe")
    told = "20.yaml: evaluation.sets.colours.view.image: size: height of 20 pixels is not a multiple of 8"
    assert told in refused(*command, tmp_path / "20.yaml")
    succeeded(*command, tmp_path / "24.yaml")


@pytest.mark.parametrize(
    ("experts", "unused"), [("2", 0), ("{vision: 2, text: 4, audio: 3}", 7)], ids=["shared", "by stem"]
)
def test_info_counts_the_experts_of_a_token(openimp, little_data, experts, unused):
    """2 experts of 2, or of all that the stems have. An expert has two layers, and the stem as well."""
    moe = f"model.moe={{experts: {experts}, layers: 1, capacity_factor: 2}}"
    _, printed, _ = openimp("info", little_data / "recipe.yaml", *sets(moe))
    printed_counts = (re.search(rf"{part}\W+([\d,]+)", printed)[1] for part in ("after its embedding", "encoder"))
    used, encoder = (int(count.replace(",", "")) for count in printed_counts)
    assert used == encoder + 2 * (32 * 32 + 32) - unused * 2 * 32 * 64


def test_eval_needs_no_more_of_another_recipe_than_sources_and_sets(
    succeeded, little_data, little_run, tmp_path, monkeypatch
):
    """Relative paths in --set start at the current directory, those in the recipe at its folder."""
    monkeypatch.chdir(little_data)
    (tmp_path / "prompts.txt").write_text("# as trained\na {} square\n\nthe {} square\n")
    (tmp_path / "sets.yaml").write_text(
        "sources: {squares: {path: elsewhere}}\n"
        "evaluation: {sets: {named: {type: zero_shot, source: squares, inputs: {image: file}, label: label,"
        " classes: [red, green, blue, white, black], prompts: prompts.txt}}}\n"
    )
    changes = sets("sources.squares.path=pictures", "evaluation.sets.named.view.image.size=16")
    out = tmp_path / "results.jsonl"
    assert "named" in succeeded("eval", little_run, "--recipe", tmp_path / "sets.yaml", *changes, "--out", out)
    (result,) = read_lines(out)
    assert (result["n"], result["candidates"], result["chance"]) == (24, 5, 1 / 5)
    assert result["prompts"] == ["a {} square", "the {} square"]
    assert result["top1"] > 0.9, "the run has learned its colours"


def test_eval_measures_the_other_sets_if_one_cannot_be_measured(openimp, little_run, tmp_path):
    """The first of three: two sentences at the end, one per set, and nothing that was measured is lost."""
    out = tmp_path / "results.jsonl"
    changes = sets(
        "evaluation.sets.colours.label=lable",
        "evaluation.sets.colours.view.image.size=24",
        "sources.gone={path: nowhere.jsonl}",
        f"evaluation.sets.gone={{{ZERO_SHOT.replace('pictures', 'gone')}}}",
    )
    code, printed, err = openimp("eval", little_run, *changes, "--out", out, "--allow-sources")
    assert code == 2
    assert [line["set"] for line in read_lines(out)] == ["tones", "tones"]
    assert "tones" in printed
    colours = "openimp: evaluation.sets.colours: source pictures .*has no column 'lable'; did you mean 'label'\\?"
    place = "if it has moved: openimp train and eval take --set sources.gone.path=PLACE"
    gone = f"evaluation.sets.gone: source gone: .*nowhere.jsonl: no such file or folder; {place}"
    assert re.fullmatch(f"{colours}\n{gone}\n", err)


def test_eval_changes_the_sets_of_the_run_itself(succeeded, refused, little_run, little_data, tmp_path):
    shutil.copytree(little_data / "pictures", tmp_path / "moved")
    out = tmp_path / "results.jsonl"
    succeeded("eval", little_run, "colours", *sets("evaluation.sets.colours.view.image.size=24"), "--out", out)
    assert read_lines(out)[0]["view"]["image"]["size"] == 24
    told = succeeded("eval", little_run, "colours", *sets("sources.pictures.limit=12"), "--out", out)
    assert [line.get("trained") for line in read_lines(out)] == [24, 12]
    assert "so the figures are no test: colours 12" in told
    succeeded("eval", little_run, "colours", *sets(f"sources.pictures.path={tmp_path}/moved"), "--out", out)
    assert "trained" not in read_lines(out)[-1], "pictures may have moved there"
    trained_on = sets(f"sources.more={{path: {little_data}/pictures}}", "evaluation.sets.colours.source=more")
    succeeded("eval", little_run, "colours", *trained_on, "--out", out)
    assert read_lines(out)[-1]["trained"] == 24
    told = refused("eval", little_run, *sets("model.width=64"))
    assert told == "--set model.width=64: a trained model allows changes of sources and evaluation only"
    told = refused("eval", little_run, *sets("evaluation.sets.colours.view.image.size=20"))
    assert "evaluation.sets.colours.view.image: size: height of 20 pixels" in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evalution: {}", "unknown key 'evalution'; did you mean 'evaluation'?"),
        ("sources: [a]", "sources: expected a mapping, found ['a']"),
        ("name: nothing", "the recipe has no evaluation sets"),
        ("prompts: no.txt", "prompts: expected a list, or a text file in {folder}; there is no file no.txt"),
        ("prompts: ../secret.txt", "prompts: ../secret.txt is outside of the folder {folder}"),
        ("prompts: link.txt", "prompts: link.txt is outside of the folder {folder}"),
        ("prompts: pipe", "prompts: expected a list, or a text file in {folder}; there is no file pipe"),
        ("prompts: binary.txt", "binary.txt cannot be read"),
        ("prompts: empty.txt", "prompts: needs at least 1 item, found 0"),
        ("classes: /etc/hostname", "classes: /etc/hostname is outside of the folder {folder}"),
        ("classes: [red, red]", "classes: class 'red' is listed twice"),
        ("classes: twice.txt", "classes: class 'a' is listed twice"),
    ],
)
def test_sets_that_cannot_be_measured_are_refused(refused, little_run, tmp_path, text, message):
    (tmp_path / "secret.txt").write_text("a {}\n")
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "binary.txt").write_bytes(b"\xff\xfe{}")
    (folder / "empty.txt").write_text("# nothing\n\n")
    (folder / "twice.txt").write_text("a\tx\nb\ty\na\tz\n")
    os.mkfifo(folder / "pipe")
    if text.startswith(("prompts", "classes")):
        text = f"evaluation: {{sets: {{set: {{{ZERO_SHOT}, {text}}}}}}}"
    (folder / "sets.yaml").write_text(text + "\n")
    told = refused("eval", little_run, "--recipe", folder / "sets.yaml")
    assert message.replace("{folder}", str(folder)) in told


def test_a_run_that_is_there_and_a_checkpoint_of_another_recipe_are_refused(refused, little_data, little_run):
    file = little_data / "recipe.yaml"
    train = ("train", file, "--run")
    change = sets("model.embed_dim=64")
    told = "step-00000012: made by another recipe: model.embed_dim is 32 there, 64 here"
    for resumed in (
        (*train, little_run, "--resume"),
        (*train, little_run, "--resume", "auto"),
        ("train", "--resume", file, "--run", little_run),
    ):
        assert told in refused(*resumed, *change)
    assert "no checkpoint to resume from" in refused(*train, little_run / "x", "--resume")
    assert refused(*train, little_run, "--resume=yes") == "--resume: expected auto or nothing, found yes"
    before = file.read_bytes()
    assert "holds a run, or files that a run would overwrite; " in refused(*train, little_data)
    assert "holds files that are not of this run; " in refused(*train, little_data, "--resume", "auto")
    assert file.read_bytes() == before


@pytest.mark.slow
def test_broken_files_are_skipped_counted_and_named_and_too_many_stop_the_run(openimp, refused, own_data, tmp_path):
    run = tmp_path / "run"
    whole = (own_data / "pictures/red/1.png").read_bytes()
    broken = {"red/1.png": whole[: len(whole) // 2], "green/2.png": b"", "blue/3.png": bytes(reversed(whole))}
    for name, content in broken.items():
        (own_data / "pictures" / name).write_bytes(content)
    changes = sets("train.steps=60", "train.max_bad_fraction=0.05", "tasks.heard.weight=0")
    train = ("train", own_data / "recipe.yaml", "--run", run, *changes)
    told = refused(*train)
    part = "examples could not be read, more than train.max_bad_fraction 0.05; for example "
    assert re.search(f"task named: .*{part}", told)
    assert f"{run / 'skipped.jsonl'} lists all; to go on with the others, resume with --set " in told
    code, out, err = openimp(*train, "--resume", "--set", told.rpartition(" ")[2])
    assert code == 0, err
    assert f"3 examples could not be read; {run / 'skipped.jsonl'} lists them\n" in out


def test_train_prints_the_mixture_and_the_results(succeeded, little_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(little_data / "pictures", "others")
    others = "type: zero_shot, source: others, inputs: {image: file}, label: label, view: {image: {size: 24}}"
    changes = sets(
        "train.precision=fp32",
        "train.steps=6",
        "sources.pictures.cache=memory",
        f"sources.same={{path: {little_data}/pictures}}",
        "evaluation.sets.colours.source=same",
        f"sources.others={{path: {tmp_path}/others}}",
        f"evaluation.sets.others={{{others}}}",
    )
    out = succeeded("train", little_data / "recipe.yaml", *changes)
    trained = {line["set"]: line["trained"] for line in read_lines(tmp_path / "runs/little/results.jsonl")}
    assert trained == {"colours": 24, "tones": 15, "others": 0}
    few = "n is below 50, so results and intervals are unreliable: colours, tones, others"
    no_test = "rows of training, so the figures are no test: colours 24, tones 15"
    start = "parameters on cpu, fp32, into runs/little"
    parts = ("mixture", "66.7%", start, "step 6/6", "Evaluation at step 6", "colours", "chance", few, no_test)
    printed = " ".join(out.split())
    for part in parts:
        assert part in printed


@pytest.mark.slow
def test_info_of_a_recipe_and_of_a_run(succeeded, little_data, little_run):
    totals = read_lines(little_run / "metrics.jsonl")[-1]["totals"]
    for arguments, parts in (
        (
            (little_data / "recipe.yaml", *sets("model.embed_dim=64")),
            ["parameters", "encoder", "classifiers", "mixture", "named", "heard"],
        ),
        (
            (little_run,),
            [
                "mixture",
                "spent up to step 12",
                "colours",
                "step-00000012",
                "recipe little",
                "chance",
                f"{totals['named']['tokens']:,}",
            ],
        ),
        (("imp_s",), ["GFLOPs"]),  # Recipes of the published sizes are described without their data.
    ):
        out = succeeded("info", *arguments)
        for part in parts:
            assert part in out


def test_eval_reproduces_the_results_of_training(succeeded, little_run, little_data, tmp_path):
    out = tmp_path / "results.jsonl"
    assert "colours" in succeeded("eval", little_run, "--out", out)
    assert out.read_bytes() == (little_run / "results.jsonl").read_bytes()
    succeeded("eval", little_run, "tones", "--recipe", little_data / "recipe.yaml", "--out", out)
    assert [line["set"] for line in read_lines(out)] == ["colours", "tones", "tones", "tones", "tones"]


def test_report_writes_a_page_or_says_why_not(succeeded, refused, little_run, tmp_path):
    page = tmp_path / "page.html"
    printed = succeeded("report", little_run, "--out", page)
    assert f"{page}: {page.stat().st_size / 1e6:.2f} MB" in printed
    assert refused("report", tmp_path / "missing") == f"{tmp_path / 'missing'}: no such folder"


@pytest.mark.slow
def test_demo_is_the_bundled_recipe(succeeded, tmp_path):
    """A few steps of it: `make demo` trains it whole."""
    model = ("model.width=48", "model.heads=3", "model.mlp_dim=48")
    tasks = (f"{change}" for kind in ("stills", "icons", "clips", "notes")
             for change in (f"sources.{kind}.cache=none", f"tasks.{kind}.batch_size=4"))  # fmt: skip
    changes = sets("train.steps=2", "evaluation={}", "train.num_workers=0", *model, *tasks)
    out = succeeded("demo", "--run", tmp_path / "run", *changes)
    assert f"The run is in {tmp_path / 'run'}" in out.replace("\n", "")
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "tokenizer.json").exists()
    assert "all 2 steps are done and evaluated already" in succeeded("demo", "--run", tmp_path / "run", *changes)


def test_rows_get_the_vectors_of_a_model(succeeded, refused, little_run, little_data, tmp_path):
    source, out, sound = little_data / "sounds.jsonl", tmp_path / "joined.parquet", little_data / "0.wav"
    join = ["embed", little_run, "--join", source, "--out", out]
    choice = ["--modality", "audio", "--column", "sound", "--to", "teacher"]
    printed = succeeded(*join, *choice)
    assert "15 embeddings of 32 numbers in column 'teacher'" in printed
    assert f"as a source: {{path: {out}, root: {little_data}}}" in printed
    for arguments, told in (
        ([*join[:3], out, "--out", out, *choice], "already; name another one"),
        (join, "--modality: expected image or text or audio, found none"),
        ([*join, *choice[:2]], "--column: name the column or the text template that audio reads"),
        (["embed", little_run, sound, *choice[2:4]], "--column and --to are for --join"),
        ([*join, *choice, sound], "name either files or folders to embed, or a source with --join"),
        (["embed", little_run], "name either files or folders to embed, or a source with --join"),
        ([*join[:4], "--out", tmp_path / "x.csv", *choice], "name a file on disk that ends with .parquet"),
    ):
        assert told in refused(*arguments)


def test_push_writes_a_folder_that_info_describes_and_embed_uses(succeeded, refused, little_run, tmp_path):
    out = tmp_path / "published"
    printed = succeeded("push", little_run, "me/little", "--to", out, "--license", "mit")
    assert printed == f"{out}: weights, recipe and model card; read README.md before you publish it\n"
    assert "a model of recipe little" in succeeded("info", out)
    assert "license: mit" in (out / "README.md").read_text(encoding="utf-8")
    assert refused("export", little_run, "--onnx", out) == f"{out}: expected a new or empty folder"


@pytest.mark.parametrize(
    ("arguments", "cores", "spins"),
    [
        (["train", "demo", "--set", "train.num_workers=0"], 8, None),
        (["train", "demo"], 2, "1000"),
        (["train", "."], 2, None),
        (["study", "moe"], 2, "1000"),
    ],
)
def test_threads_leave_cores_to_processes_that_read_data_and_only_to_them(
    arguments, cores, spins, openimp, monkeypatch, tmp_path
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(cores)}, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # So that it is restored in the end.
    monkeypatch.delenv("GOMP_SPINCOUNT")
    code, _, err = openimp(*arguments, "--no-such-option" if arguments[0] == "study" else "--resume=never")
    assert code == 2, err
    assert os.environ.get("GOMP_SPINCOUNT") == spins
