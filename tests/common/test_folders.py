"""Which files of a folder all commands read."""

import os
import shutil
from pathlib import Path

import pytest

from openimp.data.files import locate
from openimp.data.sources import open_source
from openimp.drafting.finding import find
from openimp.inference.files import find_files
from openimp.recipe.registry import modality_class
from openimp.recipe.tasks import Source

READ = ["cat/a.png", "cat/b.d/c.png", "cat/b.png", "dog/link.png", "dog/z.png"]
HIDDEN = ["._x.png", ".git/a.png", "cat/._a.png", "cat/.thumbnails/a.png", "dog/.x/y/a.png", ".z/.b.wav"]


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "media"
    for name in (*READ, *HIDDEN):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    (root / "dog/link.png").unlink()
    (root / "dog/link.png").symlink_to(root / "cat/a.png")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.png").write_bytes(b"")
    (root / "linked").symlink_to(tmp_path / "other")
    return root


def found(*given: object) -> list[str]:
    """What `embed` and `index` read of these files and folders."""
    kinds = {name: modality_class(name) for name in ("image", "audio")}
    modalities = {"image": kinds["image"](None), "audio": kinds["audio"](None)}
    return [str(path) for paths in find_files(given, modalities)[0].values() for path in paths]


def test_all_commands_read_the_same_files_of_a_folder(folder):
    read = {
        "train": open_source("media", Source(path=str(folder))).column("file"),
        "index": [os.path.relpath(path, folder) for path in found(folder)],
        "index with a slash": [os.path.relpath(path, folder) for path in found(f"{folder}/")],
        "a URL": [path.removeprefix(f"{folder.as_uri()}/") for path in found(folder.as_uri())],
    }
    assert read == dict.fromkeys(read, READ)
    (candidate,) = find([str(folder)])
    assert candidate.source == {"path": str(folder)}
    assert candidate.left_out == ""


def test_runs_and_indexes_among_the_data_are_no_data(folder):
    own_files = ["begun/recipe.yaml", "begun/.lock", "saved/recipe.yaml", "saved/checkpoints/1/a.png",
                 "indexed/index.json", "indexed/items.lance/a.png"]  # fmt: skip
    for name in (*READ, *own_files):
        file = folder / (name if name in READ else f"runs/{name}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    before = open_source("media", Source(path=str(folder)))
    assert before.column("file") == [os.path.relpath(path, folder) for path in found(folder)] == READ
    shutil.rmtree(folder / "cat")
    shutil.rmtree(folder / "dog")
    (folder / "a.png").write_bytes(b"")
    assert open_source("media", Source(path=str(folder))).column("file") == ["a.png"]
    (candidate,) = find([str(folder)])
    assert candidate.source == {"path": str(folder)}


def test_the_kind_of_a_folder_is_not_that_of_its_hidden_files(folder):
    for name in READ:
        (folder / name).unlink()
    (folder / "cat/a.wav").write_bytes(b"")
    (folder / "dog/b.wav").write_bytes(b"")
    (folder / "dog/.c.csv").write_bytes(b"")
    assert [candidate.kind for candidate in find([str(folder)])] == ["audio"]


def test_what_the_user_names_is_read_although_it_is_hidden(folder):
    for name in ("cat/._a.png", ".git/a.png"):
        assert found(folder / name) == [str(folder / name)]
        assert found((folder / name).as_uri()) == [(folder / name).as_uri()]
    assert found(folder / ".git") == [f"{folder}/.git/a.png"]
    assert found(folder / ".z/.b.wav", folder) == [f"{folder}/{name}" for name in (".z/.b.wav", *READ)]
    assert open_source("one", Source(path=f"{folder}/.git")).column("file") == ["a.png"]


def test_a_pattern_in_a_url_matches_what_it_matches_on_disk(folder):
    for name in ("a.csv", ".b.csv", ".c/d.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("n\n1\n")
    for pattern, names in (("*.csv", ["a.csv"]), (".*.csv", [".b.csv"]), (".c/*.csv", [".c/d.csv"])):
        assert [Path(file).relative_to(folder).as_posix() for file in locate("s", f"{folder}/{pattern}")[1]] == names
        assert locate("s", f"{folder.as_uri()}/{pattern}")[1] == [f"{folder.as_uri()}/{name}" for name in names]
