"""What `eval` and `report` read because a model's own recipe names it: anything for whoever trained it, else little."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from openimp.checkpoint.folder import checkpoints, describe_model
from openimp.commands import run_eval
from openimp.common.json_lines import read_lines
from openimp.data.sources import open_source
from openimp.data.trust import KNOWN, check_sources, trained_here
from openimp.inference.model import load
from openimp.recipe.tasks import Source
from openimp.report.write import write_report
from tests.messages import refuses

SECRET = "a low tone, for my eyes only"


def altered(model: Path, **sources) -> Path:
    """Lets a model's recipe name other sources, as whoever publishes one can."""
    file = model / "recipe.yaml"
    recipe = yaml.safe_load(file.read_text())
    recipe["sources"] |= sources
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return model


@pytest.fixture
def foreign(tmp_path, little_run) -> Path:
    """A model from somebody else."""
    return Path(shutil.copytree(checkpoints(little_run)[-1], tmp_path / "foreign"))


@pytest.fixture
def private(tmp_path, own_data) -> Path:
    """A file of the user's that another user's recipe may know of."""
    (own_data / "private.jsonl").write_text(
        "".join(json.dumps({"sound": f"{i}.wav", "caption": f"{SECRET} {i}"}) + "\n" for i in range(9))
    )
    return own_data / "private.jsonl"


def test_a_foreign_recipe_reads_no_private_file(foreign, private, tmp_path):
    altered(foreign, sounds={"path": str(private)})
    page = write_report(foreign, tmp_path / "page.html").read_text()
    assert SECRET not in page
    assert "tones is not measured again" in page
    assert "colours is not measured again" in page, "the data that it was trained with is no business of its either"
    with refuses():
        run_eval(foreign, ["tones"], None, None)
    # That is what the protection is against, and what somebody may want.
    assert SECRET in write_report(foreign, tmp_path / "page.html", allow_sources=True).read_text()
    run_eval(foreign, ["tones"], None, tmp_path / "results.jsonl", allow_sources=True)
    assert {line["n"] for line in read_lines(tmp_path / "results.jsonl")} == {9}


def test_who_names_the_data_of_a_foreign_model_trusts_that_path_alone(foreign, private, own_data, tmp_path):
    own = f"sources.sounds.path={own_data / 'sounds.jsonl'}"
    run_eval(foreign, ["tones"], None, tmp_path / "results.jsonl", [own])
    altered(foreign, sounds={"path": str(private), "root": str(own_data)})
    for changes in ([own], ["sources.sounds.limit=3"]):
        with refuses():
            run_eval(foreign, ["tones"], None, None, changes)
    run_eval(foreign, ["tones"], None, tmp_path / "results.jsonl", [own, f"sources.sounds.root={own_data}"])
    assert {line["n"] for line in read_lines(tmp_path / "results.jsonl")} == {3, 15}


def test_a_source_whose_files_are_missing_costs_only_the_sets_that_read_it(foreign, own_data, tmp_path):
    altered(foreign, sounds={"path": "gone.jsonl"})
    own = f"sources.pictures={{path: {own_data / 'pictures'}}}"
    with refuses():
        run_eval(foreign, None, None, tmp_path / "results.jsonl", [own])
    assert {line["set"] for line in read_lines(tmp_path / "results.jsonl")} == {"colours"}


def test_the_users_own_run_may_move_and_be_measured_with_no_flag(own_run, tmp_path):
    run_eval(own_run, None, None, None)
    assert "not measured again" not in write_report(own_run).read_text()
    load(own_run).save(tmp_path / "saved")
    run_eval(tmp_path / "saved", None, None, None)


def test_without_a_cache_of_ones_own_no_model_is_known(little_run, little_data, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    shutil.copytree(os.environ["OPENIMP_CACHE"], cache)
    assert trained_here(checkpoints(little_run)[-1])
    monkeypatch.setenv("OPENIMP_CACHE", str(cache))
    cache.chmod(0o777)  # Whatever is in it, anybody may have put there.
    assert any((cache / KNOWN).iterdir())
    for _ in range(2):
        assert "tones is not measured again" in write_report(little_run, tmp_path / "page.html").read_text()
        with refuses():
            run_eval(little_run, ["tones"], None, None)
        shutil.rmtree(cache, ignore_errors=True)
        cache.touch()  # No folder can be made there.
    run_eval(little_run, None, None, None, allow_sources=True)
    run_eval(little_run, None, str(little_data / "recipe.yaml"), None)


def test_another_recipe_allows_only_the_sources_that_it_defines(foreign, private, tmp_path):
    altered(foreign, sounds={"path": str(private)})
    recipe = yaml.safe_load((private.parent / "recipe.yaml").read_text())
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump({"evaluation": recipe["evaluation"]}))
    with refuses():
        run_eval(foreign, ["tones"], str(tmp_path / "sets.yaml"), None)


@pytest.mark.parametrize(
    "source",
    [
        {"hub": "me/private"},
        {"path": "https://169.254.169.254/rows.parquet"},
        {"path": "file:///{private}", "format": "parquet"},
        {"path": "{private}"},
        {"path": "../data/private.jsonl"},
        {"path": "sub/../../data/private.jsonl"},
        {"path": "link.jsonl"},
        {"path": "sub/*.jsonl"},
        {"path": "*/private.jsonl"},
        {"path": "linked"},
        {"path": "rows.jsonl", "root": "{folder}"},
        {"path": "rows.jsonl", "root": "linked"},
        {"path": "openimp:stills.parquet", "root": "{folder}"},
        {"path": "~/private.jsonl"},
        {"path": "~"},
        {"path": "rows.jsonl", "root": "~"},
    ],
)
def test_no_way_out_of_the_folder_is_taken(foreign, private, source, monkeypatch):
    monkeypatch.setenv("HOME", str(private.parent))
    (foreign / "sub").mkdir()
    (foreign / "rows.jsonl").write_text('{"sound": "0.wav", "caption": "a"}\n')
    for link, target in {"link.jsonl": private, "sub/more.jsonl": private, "linked": private.parent}.items():
        (foreign / link).symlink_to(target)
    source = {key: value.format(private=private, folder=private.parent) for key, value in source.items()}
    altered(foreign, sounds=source)
    recipe = describe_model(foreign).recipe.validated()
    with refuses():
        check_sources(foreign, foreign, recipe, ["tones"])


def test_a_file_that_is_named_like_a_pattern_brings_in_no_other(foreign, private):
    """`locate` finds the file of that very name; `datasets` must not expand it again, nor read `::` as a URL."""
    secret = private.with_suffix(".parquet")
    pq.write_table(pa.table({"caption": [SECRET]}), secret)
    chain = f"d::{private.parent}/private.parquet"
    for name in ("d/*.parquet", chain):
        (foreign / name).parent.mkdir(parents=True)
        pq.write_table(pa.table({"caption": ["a"]}), foreign / name)
    (foreign / "d" / "evil.parquet").symlink_to(secret)
    for stream in (False, True):
        opened = open_source("sounds", Source(path=f"{foreign}/d/*.parquet", stream=stream))
        rows = [row["caption"] for _, row in opened.read(0, range(2))] if stream else opened.column("caption")
        assert {*rows} == {"a"}
        with refuses():
            open_source("sounds", Source(path=f"{foreign}/{chain}", stream=stream))


def test_data_in_the_folder_and_bundled_data_are_read(foreign, little_data, tmp_path):
    shutil.copytree(little_data, foreign / "data")
    altered(foreign, sounds={"path": "data/*.jsonl"}, pictures={"path": "data/pictures"})
    run_eval(foreign, None, None, tmp_path / "results.jsonl")
    assert len(read_lines(tmp_path / "results.jsonl")) == 3
    altered(foreign, sounds={"path": "openimp:notes.parquet"})
    check_sources(foreign, foreign, describe_model(foreign).recipe.validated(), ["tones"])


@pytest.mark.parametrize("name", ["config.json", "recipe.yaml"])
def test_a_change_of_either_file_makes_a_model_foreign(own_run, name):
    folder = checkpoints(own_run)[-1]
    assert trained_here(folder)
    with (folder / name).open("a") as file:
        file.write("\n")
    assert not trained_here(folder)
    with refuses():
        run_eval(own_run, None, None, None)
    (folder / name).unlink()
    assert not trained_here(folder)
