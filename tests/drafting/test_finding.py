"""Which sources are found below a path."""

import pytest
from PIL import Image

from openimp.common.errors import UserError
from openimp.drafting.finding import find


def touch(*names):
    for name in names:
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(b"")


def sources(*paths):
    return [candidate.source["path"] for candidate in find([str(path) for path in paths])]


def test_a_folder_may_hold_several_sources(tmp_path):
    touch(*(tmp_path / name for name in ("a.csv", "x-0.tar", "x-1.tar", "deep/er/b.parquet", ".hidden.csv")))
    touch(tmp_path / "photos/cat/0.jpg", tmp_path / "photos/dog/1.jpg", tmp_path / "notes/readme.md")
    found = find([str(tmp_path)])
    places = [candidate.source["path"].removeprefix(f"{tmp_path}/") for candidate in found]
    assert places == ["a.csv", "x-*.tar", "deep/er/b.parquet", "photos"]
    assert [candidate.beside_data_files for candidate in found] == [False, False, False, True]


def test_classes_beside_a_stray_table_are_one_source(tmp_path):
    touch(tmp_path / "cat/0.jpg", tmp_path / "dog/1.jpg", tmp_path / "about.json")
    assert sources(tmp_path) == [f"{tmp_path}/about.json", str(tmp_path)]


def test_shards_are_one_pattern_only_if_it_matches_nothing_else(tmp_path):
    touch(tmp_path / "x-0.tar", tmp_path / "x-1.tar", tmp_path / "x-last.tar")
    assert sources(tmp_path) == [f"{tmp_path}/x-0.tar", f"{tmp_path}/x-1.tar", f"{tmp_path}/x-last.tar"]


@pytest.mark.parametrize("test", ["test", "val"])
def test_paths_that_differ_in_the_name_of_a_split_are_one_source(tmp_path, test):
    touch(tmp_path / "one/train.csv", tmp_path / f"one/{test}.csv")
    touch(tmp_path / "two/train/cat/0.jpg", tmp_path / f"two/{test}/cat/1.jpg")
    touch(tmp_path / "three/train-00-of-02.parquet", tmp_path / "three/train-01-of-02.parquet")
    touch(tmp_path / f"three/{test}-00-of-01.parquet")
    found = {c.source["path"]: (c.held_out or {}).get("path") for c in find([str(tmp_path)])}
    assert found == {
        f"{tmp_path}/one/train.csv": f"{tmp_path}/one/{test}.csv",
        f"{tmp_path}/two/train": f"{tmp_path}/two/{test}",
        f"{tmp_path}/three/train-*-of-*.parquet": f"{tmp_path}/three/{test}-00-of-01.parquet",
    }


def test_subfolders_of_different_kinds_are_sources_of_their_own(tmp_path):
    touch(tmp_path / "pictures/cat/0.jpg", tmp_path / "pictures/dog/1.jpg", tmp_path / "sounds/cat/0.wav")
    assert sources(tmp_path) == [f"{tmp_path}/pictures", f"{tmp_path}/sounds"]


def test_links_are_not_followed(tmp_path):
    touch(tmp_path / "secret/a.csv")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="no media in this folder"):
        find([str(tmp_path / "data")])


def test_a_folder_without_media_says_what_was_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "empty/x.pcx")
    with pytest.raises(UserError, match=r"no media in this folder, only \.pcx 1; looked for .*\.jpg.*\.csv"):
        find([str(tmp_path / "empty")])
