"""The command line: help that is the docstring, one line for what the user can mend, commands that do their work."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openimp import cli
from openimp.checkpoint.folder import checkpoints
from openimp.common.json_lines import read_lines
from openimp.common.versions import openimp_version


@pytest.fixture
def openimp(monkeypatch, capsys):
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["openimp", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture
def refused(openimp):
    """Runs a command that must fail as a user's mistake does, and returns its one line."""

    def run(*arguments: str | Path) -> str:
        code, _, err = openimp(*arguments)
        assert code == 2
        assert err.startswith("openimp: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert "Traceback" not in err
        return err.removeprefix("openimp: ").rstrip("\n")

    return run


def sets(*changes: str) -> list[str]:
    return [argument for change in changes for argument in ("--set", change)]


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "init",
        "train",
        "eval",
        "embed",
        "index",
        "search",
        "serve",
        "push",
        "export",
        "report",
        "info",
        "plan",
        "study",
    ],
)
def test_help_is_the_docstring(openimp, command):
    code, out, _ = openimp(command, "--help")
    assert code == 0
    assert " ".join(getattr(cli, command).__doc__.split()) in " ".join(out.replace("│", " ").split())
    assert command in openimp("--help")[1]


def test_help_shows_defaults_that_are_not_constants(openimp):
    """typer reads a default in brackets in the help's own text as markup, and drops it."""
    assert "RUN/search.index" in openimp("index", "--help")[1]


def test_version_is_the_one_that_results_name(openimp):
    assert openimp("--version") == (0, f"openimp {openimp_version()}\n", "")


def test_a_process_says_it_in_one_line_and_exits_with_2(own_data):
    """As the shell sees it, from a worker process too."""
    for file in own_data.glob("*.wav"):
        file.write_bytes(b"no sound")
    command = [sys.executable, "-m", "openimp", "train", str(own_data / "recipe.yaml"), "--run", str(own_data / "run")]
    changes = sets("tasks.named.weight=0", "train.num_workers=1")
    done = subprocess.run([*command, *changes], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "openimp: tasks.heard: 6 examples in a row could not be read in step 0; first: sounds.jsonl["
    )
    quick = subprocess.run([sys.executable, "-c", "import sys, openimp.cli; print('torch' in sys.modules)"],
                           capture_output=True, text=True)  # fmt: skip
    assert quick.stdout == "False\n", "help should not wait for torch"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("train.stepz=1", ["recipe.yaml: train: unknown key 'stepz'; did you mean 'steps'?"]),
        ("train.steps=many", ["recipe.yaml: train.steps: expected a whole number, found 'many'"]),
        ("tasks.named.views.0.image.size=20", ["recipe.yaml: tasks.named.views[0].image: size", "use 16 or 24"]),
        ("tasks.heard.inputs.text=captoin", ["tasks.heard: source sounds (", "no column 'captoin'", "'caption'?"]),
        ("tasks.heard.inputs.audio=sond", ["tasks.heard: source sounds (", "no column 'sond'", "'sound'?"]),
        ("tasks.named.objectives.1.label=lable", ["tasks.named: source pictures (", "'lable'; did you mean 'label'?"]),
        (
            "tasks.named.objectives.0.positives_by=nam",
            ["tasks.named: source pictures (", "'nam'; did you mean 'name'?"],
        ),
        ("sources.sounds.path=missing.jsonl", ["source sounds: ", "missing.jsonl: no such file or folder"]),
        ("sources.pictures.path=missing", ["source pictures: ", "missing: no such file or folder"]),
        ("sources.sounds.path=empty.jsonl", ["source sounds (", "empty.jsonl) has no rows"]),
        ("sources.pictures.path=empty", ["source pictures: ", "empty has no subfolders"]),
        ("sources.sounds.path=broken.jsonl", ["source sounds: ", "broken.jsonl: "]),
        ("sources.pictures.where={label: pink}", ["source pictures (", "no row has label = 'pink'"]),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused_before_training(
    refused, own_data, tmp_path, monkeypatch, change, named
):
    monkeypatch.chdir(own_data)
    (own_data / "empty.jsonl").write_text("")
    (own_data / "broken.jsonl").write_text('{"sound": "0.wav", "cap')
    (own_data / "empty").mkdir()
    message = refused("train", own_data / "recipe.yaml", "--run", tmp_path / "run", *sets(change))
    for part in named:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_what_is_no_recipe_no_run_and_no_model_is_refused(refused, tmp_path, little_data, little_run):
    (tmp_path / "bad.yaml").write_text("name: [")
    (tmp_path / "folder").mkdir()
    told = refused("train", tmp_path / "bad.yaml")
    assert "bad.yaml: not valid YAML" in told
    assert "at line 1, column 8" in told
    told = "demoo: no such file or folder, and no recipe of openimp; did you mean 'demo'?"
    assert told == refused("train", "demoo")
    assert "folder: is a folder, expected a recipe" in refused("plan", tmp_path / "folder")
    assert refused("info", "runs/nothing") == "runs/nothing: no such file or folder"
    assert "expected KEY=VALUE" in refused("train", "demo", "--set", "train.steps")
    assert "folder: no model here" in refused("eval", tmp_path / "folder")
    assert "folder: no model here" in refused("info", tmp_path / "folder")
    assert "nothing: no such file or folder" in refused("info", "nothing")
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
    shutil.copy(little_run / "checkpoints" / "step-00000012" / "tokenizer.json", damaged)
    shutil.copy(little_run / "checkpoints" / "step-00000012" / "ema" / weights.name, weights)
    config = json.loads((little_run / "checkpoints" / "step-00000012" / "config.json").read_text())
    config["model"]["layers"] = 10**9
    (damaged / "config.json").write_text(json.dumps(config))
    assert "config.json asks for 1000000000 layers, but the weights are only" in refused("info", damaged)
    (damaged / "config.json").write_text('{"format": 6, "model": "IMP", "classes": {}}')
    assert "config.json: damaged: its recipe cannot be read: KeyError('recipe')" in refused("info", damaged)
    (damaged / "config.json").write_text('{"format": 99}')
    assert "in format 99, and this version of openimp reads formats 6 and 7 only; use the version" in refused(
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
        assert f"{name}: is larger than 33,554,432 bytes" in refused("embed", folder, image)
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
    file = tmp_path / "file"
    file.write_text("")
    train = ("train", little_data / "recipe.yaml", "--run")
    assert refused(*train, file) == f"{file}: is a file; name a directory with --run-dir"
    assert refused(*train, file / "run") == f"{file / 'run'}: Not a directory"
    out = tmp_path / "missing" / "results.jsonl"
    for place in (out, tmp_path):
        assert (
            refused("eval", little_run, "--out", place) == f"{place}: --out needs a file, in a directory that is there"
        )
    told = refused("info", little_run, *sets("train.steps=1"))
    assert told == f"{little_run}: --set changes a recipe, and this is a run or a model"


def test_the_views_of_another_recipe_must_suit_the_model(refused, openimp, little_data, little_run, tmp_path):
    """The other recipe needs none of the run's sources, and its patches may be of another size."""
    text = (little_data / "recipe.yaml").read_text().replace("patch: [2, 8, 8]", "patch: [2, 4, 4]")
    text = text.replace("pictures", "squares").replace("{path: squares}", f"{{path: {little_data / 'pictures'}}}")
    for size, message in (
        (20, "20.yaml: evaluation.sets.colours.view.image: size: height of 20 pixels is not a multiple of 8"),
        (24, ""),
    ):
        other = tmp_path / f"{size}.yaml"
        other.write_text(text.replace("view: {image: {size: 16}}", f"view: {{image: {{size: {size}}}}}"))
        command = ("eval", little_run, "colours", "--recipe", other)
        if message:
            assert message in refused(*command)
        else:
            assert openimp(*command)[0] == 0


def test_info_counts_the_experts_of_a_token(openimp, little_data):
    """Choosing 2 of 2 experts uses all of the encoder, whatever the room in them. The stem has two linear layers."""
    moe = "model.moe={experts: 2, layers: 1, routing: token_choice, top_k: 2, capacity_factor: 1.5}"
    _, printed, _ = openimp("info", little_data / "recipe.yaml", *sets(moe))
    printed_counts = (re.search(rf"{part}\W+([\d,]+)", printed)[1] for part in ("after its embedding", "encoder"))
    used, encoder = (int(count.replace(",", "")) for count in printed_counts)
    assert used == encoder + 2 * (32 * 32 + 32)


def test_info_tells_that_a_vocabulary_is_a_limit(openimp, little_data, little_run):
    """Of a recipe whose tokenizer is yet to be trained; not of a run, nor where a file has the tokenizer."""
    recipe, told = little_data / "recipe.yaml", "text counts with 4,000 tokens, the limit of its vocabulary"
    limited = openimp("info", recipe, *sets("modalities.text.vocab_size=4000"))[1]
    assert told in limited
    assert "in all, at most" in limited
    assert told in openimp("plan", recipe, "--gpus", "1", *sets("modalities.text.vocab_size=4000"))[1]
    tokenizer = little_run / "checkpoints" / "step-00000012" / "tokenizer.json"
    of_run, of_file = openimp("info", little_run)[1], openimp("info", recipe, *sets(
        f"modalities.text={{tokenizer: {tokenizer}, positions: 16, vocab_size: 4000}}"))[1]  # fmt: skip
    assert "limit" not in of_run + of_file
    counts = [re.search(r"in all[^\d]+([\d,]+)", printed)[1] for printed in (of_run, of_file)]
    assert counts[0] == counts[1]


def test_eval_needs_no_more_of_another_recipe_than_sources_and_sets(
    openimp, little_data, little_run, tmp_path, monkeypatch
):
    """Relative paths in --set start at the current directory, those in the recipe at its folder."""
    monkeypatch.chdir(little_data)
    (tmp_path / "prompts.txt").write_text("# as trained\na {} square\n\nthe {} one\n")
    (tmp_path / "sets.yaml").write_text(
        "sources: {squares: {path: elsewhere}}\n"
        "evaluation: {sets: {named: {type: zero_shot, source: squares, inputs: {image: file}, label: label,"
        " classes: [red, green, blue, white, black], prompts: prompts.txt}}}\n"
    )
    out, changes = tmp_path / "found.jsonl", sets(
        "sources.squares.path=pictures", "evaluation.sets.named.view.image.size=16"
    )  # fmt: skip
    code, printed, err = openimp("eval", little_run, "--recipe", tmp_path / "sets.yaml", *changes, "--out", out)
    assert (code, err) == (0, "")
    assert "named" in printed
    (found,) = read_lines(out)
    assert (found["n"], found["candidates"], found["chance"]) == (24, 5, 1 / 5)
    assert found["prompts"] == ["a {} square", "the {} one"]
    assert found["top1"] > 0.9, "the run has learned its colours"


def test_eval_measures_the_other_sets_if_one_cannot_be_measured(openimp, little_run, tmp_path):
    """The first of three: two sentences at the end, one per set, and nothing that was measured is lost."""
    out, changes = tmp_path / "found.jsonl", sets(
        "evaluation.sets.colours.label=lable", "evaluation.sets.colours.view.image.size=24",
        "sources.gone={path: nowhere.jsonl}",
        "evaluation.sets.gone={type: zero_shot, source: gone, inputs: {image: file}, label: label, "
        "view: {image: {size: 16}}}",
    )  # fmt: skip
    code, printed, err = openimp("eval", little_run, *changes, "--out", out, "--allow-sources")
    assert code == 2
    assert [line["set"] for line in read_lines(out)] == ["tones", "tones"]
    assert "tones" in printed
    first, second = err.splitlines()
    assert first.startswith("openimp: evaluation.sets.colours: source pictures (")
    assert first.endswith("has no column 'lable'; did you mean 'label'?")
    assert second.startswith("evaluation.sets.gone: source gone: ")
    assert second.endswith("nowhere.jsonl: no such file or folder")


def test_eval_changes_the_sets_of_the_run_itself(openimp, refused, little_run, tmp_path):
    out = tmp_path / "found.jsonl"
    change = sets("evaluation.sets.colours.view.image.size=24")
    assert openimp("eval", little_run, "colours", *change, "--out", out)[0] == 0
    assert read_lines(out)[0]["view"]["image"]["size"] == 24
    told = refused("eval", little_run, *sets("model.width=64"))
    assert told == "--set model.width=64: a trained model allows changes of sources and evaluation only"
    told = refused("eval", little_run, *sets("evaluation.sets.colours.view.image.size=20"))
    assert "evaluation.sets.colours.view.image: size: height of 20 pixels" in told


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("evalution: {}", "unknown key 'evalution'; did you mean 'evaluation'?"),
        ("evaluation: {set: {}}", "evaluation: unknown key 'set'; did you mean 'sets'?"),
        ("sources: [a]", "sources: expected a mapping, found ['a']"),
        ("name: nothing", "the recipe has no evaluation sets"),
        ("{set: {prompts: no.txt}}", "prompts: expected a list, or a text file in {folder}; there is no file no.txt"),
        ("{set: {prompts: ../secret.txt}}", "prompts: ../secret.txt is outside of the folder {folder}"),
        ("{set: {prompts: link.txt}}", "prompts: link.txt is outside of the folder {folder}"),
        ("{set: {prompts: pipe}}", "prompts: expected a list, or a text file in {folder}; there is no file pipe"),
        ("{set: {prompts: binary.txt}}", "binary.txt cannot be read"),
        ("{set: {prompts: empty.txt}}", "prompts: needs at least 1 item, found 0"),
        ("{set: {classes: /etc/hostname}}", "classes: /etc/hostname is outside of the folder {folder}"),
        ("{set: {classes: [red, red]}}", "classes: class 'red' is listed twice"),
        ("{set: {classes: twice.txt}}", "classes: class 'a' is listed twice"),
    ],
)
def test_sets_that_cannot_be_measured_are_refused(refused, little_data, little_run, tmp_path, text, named):
    (tmp_path / "secret.txt").write_text("a {}\n")
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "binary.txt").write_bytes(b"\xff\xfe{}")
    (folder / "empty.txt").write_text("# nothing\n\n")
    (folder / "twice.txt").write_text("a\tx\nb\ty\na\tz\n")
    os.mkfifo(folder / "pipe")
    if text.startswith("{set: "):
        common = "type: zero_shot, source: pictures, inputs: {image: file}, label: label, view: {image: {size: 16}}, "
        text = f"evaluation: {{sets: {text.replace('{set: {', '{set: {' + common)}}}"
    (folder / "sets.yaml").write_text(text + "\n")
    assert named.replace("{folder}", str(folder)) in refused("eval", little_run, "--recipe", folder / "sets.yaml")


def test_a_class_without_text_is_refused(refused, own_data, little_run, tmp_path):
    recipe = (own_data / "recipe.yaml").read_text()
    rows = [{"picture": str(path.relative_to(own_data)), "class": i % 3} for i, path in enumerate(
        sorted((own_data / "pictures").rglob("*.png")))]  # fmt: skip
    (own_data / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = "{type: zero_shot, source: numbers, inputs: {image: picture}, label: class, view: {image: {size: 16}}"
    changed = recipe.replace("sources:", "sources:\n  numbers: {path: numbers.jsonl}")
    for texts, message in (
        ("}", "class 0 of column 'class' has no text; name it in classes as '0'"),
        (
            ", classes: {0: red, 1: green}}",
            "column 'class' of source numbers: numbers.jsonl[2]: '2' is not among the classes; known: 0, 1",
        ),
        (
            ", classes: {0: a, 1: b, 2: c}, prompts: [picture]}",
            "prompt 'picture' needs one plain {} where the class' text goes",
        ),
    ):
        (own_data / "other.yaml").write_text(changed + f"    numbers: {numbers}{texts}\n")
        told = refused("eval", little_run, "numbers", "--recipe", own_data / "other.yaml")
        assert told.startswith("evaluation.sets.numbers: ")
        assert told.endswith(message)


def test_a_run_that_is_there_and_a_checkpoint_of_another_recipe_are_refused(refused, little_data, little_run):
    file = little_data / "recipe.yaml"
    assert f"{little_run}: already holds a run; resume it with --resume" in refused("train", file, "--run", little_run)
    told = refused("train", file, "--run", little_run, "--resume", *sets("model.embed_dim=64"))
    assert "step-00000012: made by another recipe: model.embed_dim is 32 there, 64 here" in told
    assert "no checkpoint to resume from" in refused("train", file, "--run", little_run / "x", "--resume")
    before = file.read_bytes()
    for resume in ([], ["--resume", "auto"]):
        told = refused("train", file, "--run", little_data, *resume)
        assert told == f"{file}: a run would overwrite it; name another directory with --run-dir"
        assert file.read_bytes() == before
    assert "made by another recipe" in refused(
        "train", file, "--run", little_run, "--resume", "auto", *sets("model.embed_dim=64")
    )
    assert (
        refused("train", file, "--run", little_run, "--resume=yes") == "--resume: expected auto or nothing, found yes"
    )
    told = refused("train", "--resume", file, "--run", little_run, *sets("model.embed_dim=64"))
    assert "step-00000012: made by another recipe: model.embed_dim is 32 there, 64 here" in told


def broken(folder: Path) -> set[str]:
    """Spoils three pictures, each in its own way, and returns their names."""
    whole = (folder / "pictures/red/1.png").read_bytes()
    contents = {"red/1.png": whole[: len(whole) // 2], "green/2.png": b"", "blue/3.png": bytes(reversed(whole))}
    for name, content in contents.items():
        (folder / "pictures" / name).write_bytes(content)
    return set(contents)


def test_broken_files_are_skipped_counted_and_named(openimp, own_data, tmp_path):
    bad, run = broken(own_data), tmp_path / "run"
    changes = sets("train.steps=20", "train.max_bad_fraction=0.5", "tasks.heard.weight=0", "train.num_workers=1")
    code, out, err = openimp("train", own_data / "recipe.yaml", "--run", run, *changes)
    assert (code, err) == (0, "")
    assert f"3 examples could not be read; {run / 'skipped.jsonl'} lists them\n" in out
    lines = read_lines(run / "skipped.jsonl")
    assert {line["where"] for line in lines} == bad
    assert all(line["task"] == "named" and line["why"] for line in lines)
    state = json.loads((next((run / "checkpoints").glob("step-00000020")) / "state.json").read_text())
    assert state["bad"]["named"]["bad"] == len(lines)
    (colours,) = [line for line in read_lines(run / "results.jsonl") if line["set"] == "colours"]
    assert (colours["n"], colours["skipped"]) == (21, 3)
    assert {row.split(": ")[0] for row in colours["skipped_rows"]} == bad


def test_too_many_broken_files_stop_the_run(openimp, refused, own_data, tmp_path):
    bad, run = broken(own_data), tmp_path / "run"
    changes = sets("train.steps=60", "train.max_bad_fraction=0.05", "tasks.heard.weight=0")
    told = refused("train", own_data / "recipe.yaml", "--run", run, *changes)
    assert "task named: " in told
    assert "examples could not be read, more than train.max_bad_fraction 0.05; for example " in told
    assert any(name in told for name in bad)
    assert told.endswith(f"{run / 'skipped.jsonl'} lists all")
    assert {line["where"] for line in read_lines(run / "skipped.jsonl")} <= bad
    # The steps up to there are kept.
    assert checkpoints(run)[-1].name == f"step-{read_lines(run / 'skipped.jsonl')[-1]['step'] + 1:08d}"
    assert (
        openimp(
            "train", own_data / "recipe.yaml", "--run", run, "--resume", *changes, *sets("train.max_bad_fraction=1")
        )[0]
        == 0
    )


def test_train_prints_the_mixture_and_the_results(openimp, little_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = openimp("train", little_data / "recipe.yaml", *sets("train.precision=fp32", "train.steps=6"))
    assert (code, err) == (0, "")
    assert (tmp_path / "runs" / "little" / "results.jsonl").exists()
    assert "mixture" in out
    assert "66.7%" in out
    assert "parameters on cpu, fp32, into runs/little" in out
    assert "step 6/6" in out
    assert "colours" in out
    assert "chance" in out
    assert "n is below 50, so results and intervals are unreliable: colours, tones" in out


def test_info_of_a_recipe_and_of_a_run(openimp, little_data, little_run, tmp_path):
    code, of_recipe, err = openimp("info", little_data / "recipe.yaml", *sets("model.embed_dim=64"))
    assert (code, err) == (0, "")
    for part in ("parameters", "encoder", "classifiers", "mixture", "named", "heard"):
        assert part in of_recipe
    code, of_run, err = openimp("info", little_run)
    assert (code, err) == (0, "")
    for part in ("step-00000012", "recipe little", "mixture", "spent up to step 12", "colours", "chance"):
        assert part in of_run
    spent = read_lines(little_run / "metrics.jsonl")[-1]["totals"]
    assert f"{spent['named']['tokens']:,}" in of_run
    began = Path(shutil.copytree(little_run, tmp_path / "began", ignore=shutil.ignore_patterns("checkpoints")))
    code, without, err = openimp("info", began)
    assert (code, err) == (0, "")
    assert f"{began}: a run of recipe little, which has saved no checkpoint yet" in without
    for part in ("parameters", "mixture", "spent up to step 12", "colours"):
        assert part in without
    # Recipes of the published sizes are described without their data.
    code, of_published, err = openimp("info", "imp_s")
    assert (code, err) == (0, "")
    assert "GFLOPs" in of_published


def test_eval_reproduces_the_results_of_training(openimp, little_run, little_data, tmp_path):
    out = tmp_path / "results.jsonl"
    code, printed, err = openimp("eval", little_run, "--out", out)
    assert (code, err) == (0, "")
    assert "colours" in printed
    assert out.read_bytes() == (little_run / "results.jsonl").read_bytes()
    assert openimp("eval", little_run, "tones", "--recipe", little_data / "recipe.yaml", "--out", out)[0] == 0
    assert [line["set"] for line in read_lines(out)] == ["colours", "tones", "tones", "tones", "tones"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_is_told(refused, little_run):
    assert refused("eval", little_run, "tones", "--out", "/dev/full") == "/dev/full: No space left on device"


def test_embed_writes_vectors_and_paths(openimp, refused, little_run, little_data, tmp_path):
    out = tmp_path / "vectors.parquet"
    code, printed, err = openimp("embed", little_run, little_data / "pictures", little_data / "0.wav", "--out", out)
    assert (code, err) == (0, "")
    table = pq.read_table(out)
    assert table.num_rows == 25
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert str(little_data / "0.wav") in table["path"].to_pylist()
    assert "25 embeddings (24 image, 1 audio)" in printed
    assert "missing.png: no such file or folder" in refused("embed", little_run, tmp_path / "missing.png")


def test_report_writes_a_page_or_says_why_not(openimp, refused, little_run, tmp_path):
    page = tmp_path / "page.html"
    code, printed, err = openimp("report", little_run, "--out", page)
    assert (code, err) == (0, "")
    assert f"{page}: {page.stat().st_size / 1e6:.2f} MB" in printed
    told = refused("report", tmp_path / "missing")
    assert told == f"{tmp_path / 'missing'}: nothing to report on: no checkpoint, and no line in metrics.jsonl"


def test_demo_is_the_bundled_recipe(openimp, tmp_path):
    """A few steps of it: `make demo` trains it whole."""
    kinds = ("stills", "icons", "clips", "notes")
    changes = sets("train.steps=2", "evaluation={}", "model.width=48", "model.heads=3", "model.mlp_dim=48",
                   "train.num_workers=0", *(f"sources.{kind}.cache=none" for kind in kinds),
                   *(f"tasks.{kind}.batch_size=4" for kind in kinds))  # fmt: skip
    code, out, err = openimp("demo", "--run", tmp_path / "run", *changes)
    assert (code, err) == (0, "")
    assert f"The run is in {tmp_path / 'run'}" in out.replace("\n", "")
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "tokenizer.json").exists()


DISTILLED = """
name: student
model: {width: 32, layers: 1, heads: 2, mlp_dim: 64, embed_dim: 32, space: joint}
modalities: {audio: {window: 512, hop: 256, bins: 32}}
sources: {sounds: {path: joined.parquet, root: ROOT}}
tasks:
  heard: {source: sounds, inputs: {audio: sound}, objectives: [{type: distill, of: audio, to: teacher}], batch_size: 6,
          views: [{audio: {seconds: 0.512}}]}
train: {steps: 2, num_workers: 0, log_every: 1}
"""


def test_rows_get_the_vectors_of_a_model_from_which_another_one_learns(
    openimp, refused, little_run, little_data, tmp_path
):
    source, out = little_data / "sounds.jsonl", tmp_path / "joined.parquet"
    join = ["embed", little_run, "--join", source, "--out", out]
    choice = ["--modality", "audio", "--column", "sound", "--to", "teacher"]
    code, printed, err = openimp(*join, *choice)
    assert code == 0, err
    assert "15 embeddings of 32 numbers in column 'teacher'" in printed
    assert f"as a source: {{path: {out}, root: {little_data}}}" in printed
    (tmp_path / "student.yaml").write_text(DISTILLED.replace("ROOT", str(little_data)))
    code, printed, err = openimp("train", tmp_path / "student.yaml", "--run", tmp_path / "run")
    assert code == 0, err
    assert 0 < read_lines(tmp_path / "run" / "metrics.jsonl")[0]["tasks"]["heard"]["audio:teacher"] < 2
    # A model of one modality has embeddings, too: those of the teacher's space.
    code, printed, err = openimp("embed", tmp_path / "run", little_data / "0.wav", "--out", tmp_path / "own.parquet")
    assert code == 0, err
    assert pq.read_table(tmp_path / "own.parquet").to_pylist()[0]["towards"] == "audio"

    told = refused("train", tmp_path / "student.yaml", "--run", tmp_path / "no", *sets("model.embed_dim=16"))
    assert "column 'teacher': expected a list of 16 numbers (the model's embed_dim), found a list of shape [32]" in told
    assert "--to: " in refused(*join[:3], out, "--out", out, *choice)
    assert "already; name another one" in refused(*join[:3], out, "--out", out, *choice)
    assert "--modality: expected image or text or audio, found none" in refused(*join)
    assert "--column: name the column or the text template that audio reads" in refused(*join, *choice[:2])
    assert "has no column 'sond'; did you mean 'sound'?" in refused(*join, *choice[:2], "--column", "sond")
    assert "--column needs --join" in refused("embed", little_run, little_data / "0.wav", *choice[2:4])
    assert "drop files" in refused(*join, *choice, little_data / "0.wav")
    assert "name files or folders to embed, or a source with --join" in refused("embed", little_run)
    assert "name a file on disk that ends with .parquet" in refused(*join[:4], "--out", tmp_path / "x.csv", *choice)


def test_push_writes_a_folder_that_info_describes_and_embed_uses(openimp, refused, little_run, tmp_path):
    out = tmp_path / "published"
    licenses = ["--license", "mit", *sets("sources.sounds.license=CC-BY-4.0")]
    code, printed, _ = openimp("push", little_run, "me/little", "--to", out, *licenses)
    assert code == 0
    assert printed == f"{out}: weights, recipe and model card; read README.md before you publish it\n"
    assert "a model of recipe little" in openimp("info", out)[1]
    assert "license: mit" in (out / "README.md").read_text(encoding="utf-8")
    assert refused("push", little_run, "little", "--to", out).startswith("little: expected OWNER/NAME")
    assert refused("export", little_run, "--onnx", out) == f"{out}: expected a new or empty folder"
