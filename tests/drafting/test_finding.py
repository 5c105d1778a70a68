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
    return [candidate.source for candidate in find([str(path) for path in paths])]


def test_the_tables_of_a_folder_and_its_subfolders_are_its_sources(tmp_path):
    touch(
        *(tmp_path / name for name in ("a.csv", "x-0.tar", "x-1.tar", "in/b.parquet", ".hidden.csv", "deep/er/c.csv"))
    )
    touch(tmp_path / "photos/cat/0.jpg", tmp_path / "about.json")
    assert [source["path"].removeprefix(f"{tmp_path}/") for source in sources(tmp_path)] == [
        "a.csv", "in/b.parquet", "x-*.tar",
    ]  # fmt: skip


def test_shards_are_one_pattern_only_if_it_matches_nothing_else(tmp_path):
    touch(tmp_path / "x-0.tar", tmp_path / "x-1.tar", tmp_path / "x-last.tar")
    assert sources(tmp_path) == [{"path": f"{tmp_path}/x-{shard}.tar"} for shard in ("0", "1", "last")]


@pytest.mark.parametrize("test", ["test", "val"])
def test_paths_that_differ_in_the_name_of_a_split_are_one_source(tmp_path, test):
    touch(tmp_path / "one/train.csv", tmp_path / f"one/{test}.csv")
    touch(tmp_path / "two/train/cat/0.jpg", tmp_path / f"two/{test}/cat/1.jpg")
    touch(tmp_path / "three/train-00-of-02.parquet", tmp_path / "three/train-01-of-02.parquet")
    touch(tmp_path / f"three/{test}-00-of-01.parquet")
    touch(tmp_path / "four/train/list.csv", tmp_path / f"four/{test}/list.csv")
    paths = [str(tmp_path / name) for name in ("one", "two", "three", "four")]
    assert {c.source["path"]: (c.held_out or {}).get("path") for c in find(paths)} == {
        f"{tmp_path}/one/train.csv": f"{tmp_path}/one/{test}.csv",
        f"{tmp_path}/two/train": f"{tmp_path}/two/{test}",
        f"{tmp_path}/three/train-*-of-*.parquet": f"{tmp_path}/three/{test}-00-of-01.parquet",
        f"{tmp_path}/four/train/list.csv": f"{tmp_path}/four/{test}/list.csv",
    }


def test_the_validation_split_is_evaluated_and_the_test_split_is_left(tmp_path):
    touch(*(tmp_path / f"{split}.csv" for split in ("train", "val", "test")))
    (candidate,) = find([str(tmp_path)])
    assert candidate.held_out == {"path": f"{tmp_path}/val.csv"}


def test_subfolders_that_have_only_subfolders_are_sources_of_their_own(tmp_path):
    touch(tmp_path / "all/pictures/cat/0.jpg", tmp_path / "all/pictures/dog/1.jpg", tmp_path / "all/sounds/cat/0.wav")
    assert sources(tmp_path) == [{"path": f"{tmp_path}/all/{kind}"} for kind in ("pictures", "sounds")]


def test_each_kind_of_media_in_a_folder_is_a_source_and_other_files_are_counted(tmp_path):
    touch(
        *(tmp_path / name for name in ("cat/0.jpg", "cat/1.PNG", "cat/0.wav", "cat/0.txt", "cat/x.heic", "loose.jpg"))
    )
    (audio, image) = find([str(tmp_path)])
    assert audio.source == {"path": str(tmp_path), "where": {"extension": ["wav"]}}
    assert image.source == {"path": str(tmp_path), "where": {"extension": ["jpg", "png"]}}
    assert (audio.left_out, image.left_out) == (".heic 1, .jpg 1", "")


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
