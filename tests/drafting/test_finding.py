"""Which sources are found below a path."""

import pytest
from PIL import Image

from openimp.drafting.finding import find
from tests.messages import refuses

LEFT = "is left for a last test"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def touch(folder):
    """Makes empty files."""

    def make(*names):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()

    return make


def paths(*places):
    return [candidate.source["path"] for candidate in find([*places] or ["."])]


def found(*places):
    """By place, why a candidate is not used, or the path of its held-out part."""
    return {
        candidate.place: candidate.problem or (candidate.held_out and candidate.held_out["path"])
        for candidate in find(places)
    }


def test_the_tables_of_a_folder_and_its_subfolders_are_its_sources(touch):
    touch("a.csv", "x-0.tar", "x-1.tar", "in/b.parquet", ".hidden.csv", "deep/er/c.csv", "photos/cat/0.jpg", "a.json")
    assert paths() == ["a.csv", "in/b.parquet", "x-*.tar"]


def test_shards_are_one_pattern_only_if_it_matches_nothing_else(touch):
    touch("x-0.tar", "x-1.tar", "x-last.tar")
    assert paths() == ["x-0.tar", "x-1.tar", "x-last.tar"]


@pytest.mark.parametrize("test", ["test", "val"])
def test_paths_that_differ_in_the_name_of_a_split_are_one_source(touch, test):
    touch("one/train.csv", f"one/{test}.csv", "two/train/cat/0.jpg", f"two/{test}/cat/1.jpg")
    touch("three/train-00-of-02.parquet", "three/train-01-of-02.parquet", f"three/{test}-00-of-01.parquet")
    touch("four/train/list.csv", f"four/{test}/list.csv")
    touch("five/train_1.csv", "five/train_2.csv", f"five/{test}.csv")
    touch("cv [1]/cv-valid-train-0.csv", "cv [1]/cv-valid-train-1.csv", f"cv [1]/cv-valid-{test}.csv")
    assert found("one", "two", "three", "four", "five", "cv [1]") == {
        "one/train.csv": f"one/{test}.csv",
        "two/train": f"two/{test}",
        "three/train-*-of-*.parquet": f"three/{test}-00-of-01.parquet",
        "four/train/list.csv": f"four/{test}/list.csv",
        "five/train_*.csv": f"five/{test}.csv",
        "cv [1]/cv-valid-train-*.csv": f"cv [1]/cv-valid-{test}.csv",
    }


def test_the_validation_split_is_evaluated_and_the_test_split_is_left(touch):
    touch("train.csv", "val.csv", "test.csv")
    assert found(".") == {"train.csv": "val.csv", "test.csv": LEFT}


def test_subfolders_that_have_only_subfolders_are_sources_of_their_own(touch):
    touch("all/pictures/cat/0.jpg", "all/pictures/dog/1.jpg", "all/sounds/cat/0.wav")
    assert paths() == ["all/pictures", "all/sounds"]


def test_folders_beside_splits_and_folders_without_media_are_named(touch, folder):
    touch("a/train/cat/0.jpg", "a/train/dog/0.jpg", "a/test/cat/1.jpg", "a/annotations/x.json", "a/unlabeled/0.jpg")
    touch("b/train/cat/0.jpg", "b/test/cat/1.jpg", "b/__MACOSX/train/cat/._0.jpg")
    (folder / "b/empty").mkdir()  # As is b/__MACOSX, without hidden files.
    touch("c/train/0.jpg", "c/plane/0.jpg")  # Classes of which one is called like a split.
    touch("d/train/cat/0.jpg", "d/val/cat/1.jpg", "d/extra/cat/2.jpg")
    touch("e/dogs_train/a/0.jpg", "e/dogs_val/a/1.jpg", "e/cats_train/a/0.jpg", "e/cats_val/a/1.jpg")
    beside = "is beside folders of splits"
    assert found("a", "b", "c", "d", "e") == {
        "a/train": "a/test",
        "b/train": "b/test",
        "c": None,
        "d/train": "d/val",
        "d/extra": beside,
        "e/dogs_train": "e/dogs_val",
        "e/cats_train": "e/cats_val",
        "a/annotations": beside,
        "a/unlabeled": beside,
    }


def test_names_of_splits_may_have_numbers_and_other_words(touch):
    touch("coco/train2017/0.jpg", "coco/val2017/1.jpg", "coco/annotations/x.json")
    touch("mine/imgs_train/0.jpg", "mine/imgs_val/1.jpg")
    touch("classes/bullet_train/0.jpg", "classes/test tube/1.jpg")  # They differ in more than the split.
    assert found("coco", "mine", "classes") == {
        "coco/train2017": "coco/val2017",
        "coco/annotations": "is beside folders of splits",
        "mine/imgs_train": "mine/imgs_val",
        "classes": None,
    }


def test_a_table_beside_those_of_a_split_is_not_trained_on(touch):
    """In Common Voice, validated.tsv has the rows of all splits."""
    touch("train.tsv", "dev.tsv", "test.tsv", "validated.tsv", "other/more.csv")
    assert found(".") == {
        "train.tsv": "dev.tsv",
        "other/more.csv": None,
        "test.tsv": LEFT,
        "validated.tsv": "is beside the tables of a split",
    }
    assert [*found(".")][:2] == ["train.tsv", "other/more.csv"], "those that are used come first"
    named = found("train.tsv", "dev.tsv", "validated.tsv")
    assert named == {"train.tsv": "dev.tsv", "validated.tsv": None}, "tables that are named are meant"


def test_a_split_for_evaluation_whose_training_split_is_not_found_is_not_trained_on(touch):
    touch("a/labels_train.csv", "a/test_data.csv", "b/test.csv", "c/test/cat/0.jpg")
    assert found("a", "b", "c") == {
        "a/labels_train.csv": None,
        "b/test.csv": None,
        "c/test": None,
        "a/test_data.csv": "no training splits have a matching name",
    }
    assert paths("a/labels_train.csv", "a/test_data.csv") == ["a/labels_train.csv", "a/test_data.csv"]
    touch("dev/train.csv", "dev/captions.csv", "two/train.csv", "two/training.csv", "two/test.csv")
    assert {*paths("dev")} == {"dev/train.csv", "dev/captions.csv"}
    assert found("two") == {
        "two/train.csv": None,
        "two/training.csv": None,
        "two/test.csv": "2 training splits have a matching name",
    }


def test_further_splits_are_neither_trained_on_nor_measured(touch):
    for name in ("train", "val", "valid", "test", "eval"):
        touch(f"a/{name}/cat/0.jpg", f"a/{name}/dog/0.jpg")
    assert found("a") == {"a/train": "a/val", "a/eval": LEFT, "a/test": LEFT, "a/valid": LEFT}


def test_each_kind_of_media_in_a_folder_is_a_source_and_other_files_are_counted(touch):
    touch("in/cat/0.jpg", "in/cat/1.PNG", "in/cat/0.wav", "in/cat/0.txt", "in/cat/x.raw", "in/loose.jpg")
    (audio, image) = find(["in"])
    assert audio.source == {"path": "in", "where": {"extension": ["wav"]}}
    assert image.source == {"path": "in", "where": {"extension": ["jpg", "png"]}}
    assert (audio.left_out, image.left_out) == (".jpg 1, .raw 1", "")


def test_links_are_not_followed_and_a_folder_without_media_says_what_was_looked_for(touch, folder):
    touch("secret/a.csv")
    (folder / "data").mkdir()
    (folder / "data/linked").symlink_to(folder / "secret")
    with refuses():
        find(["data"])
    with refuses():
        find([""])
    with refuses():
        find(["date.csv"])
    touch("table-1.csv")
    assert [candidate.source["path"] for candidate in find(["table-[0-9].csv"])] == ["table-[0-9].csv"]
    Image.new("RGB", (4, 4)).save(folder / "data/x.pcx")
    with refuses():
        find(["data"])
    touch("saved/data-00000-of-00001.arrow", "saved/state.json")
    with refuses():
        find(["saved"])
