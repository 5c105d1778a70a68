"""Files are handed out only from folders that this user had indexed, or names."""

import os
import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from openimp.common.errors import UserError
from openimp.common.safe_files import file_state
from openimp.search import Hit, Index, build_index, open_index
from openimp.search.media_folders import recorded_folders
from openimp.search.server import create_app
from openimp.search.table import ITEMS, Items, import_lancedb
from tests.messages import refuses
from tests.served import serving

pytest.importorskip("lancedb")


@pytest.fixture
def media(media_folder, tmp_path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("0.png", "1.png", "0.wav"):
        shutil.copy(media_folder / name, folder)
    (folder / "lines.txt").write_text("a red square", encoding="utf-8")
    return folder


@pytest.fixture
def index(media, tiny_model_folder, tmp_path) -> Path:
    return build_index(tiny_model_folder, media, tmp_path / "x.index").folder


@pytest.fixture
def other_user(tmp_path, monkeypatch) -> None:
    """The index is somebody else's: this user's cache knows nothing of it."""
    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path / "cache of another"))


def statuses(index: Index) -> dict[str, set[int]]:
    """The answers to requests for the media and thumbnails of pictures and sounds, by the names of their files."""
    client = TestClient(create_app(index), base_url="http://127.0.0.1")
    hits = [hit for hit in index.sample(100) if hit.modality != "text"]
    return {
        Path(hit.path).name: {client.get(f"/{kind}/{hit.id}").status_code for kind in ("media", "thumbnails")}
        for hit in hits
    }


def point_to(index: Path, path: Path) -> Hit:
    """Changes the row of 0.png to another file, in the state that it has."""
    table = import_lancedb().connect(index).open_table(ITEMS)
    table.update("path LIKE '%0.png'", {"path": str(path), "state": file_state(path)})
    return next(hit for hit in open_index(index).sample(100) if hit.path == str(path))


def test_the_own_index_is_served_also_if_it_has_moved(index, media, tmp_path):
    assert set(map(frozenset, statuses(open_index(index)).values())) == {frozenset({200})}
    index.rename(tmp_path / "moved.index")
    moved = open_index(tmp_path / "moved.index")
    assert set(map(frozenset, statuses(moved).values())) == {frozenset({200})}
    assert not moved.shows_no_files


def test_folders_that_are_added_and_forgotten(index, media, media_folder, tiny_model_folder, tmp_path):
    more = Path(shutil.copytree(media_folder, tmp_path / "more"))
    build_index(tiny_model_folder, more, index)
    assert all(codes == {200} for codes in statuses(open_index(index)).values())
    build_index(tiny_model_folder, more, index, forget=media)
    hit = point_to(index, media / "1.png")
    with refuses():
        open_index(index).read(hit.id)


def test_the_index_of_somebody_else_shows_texts_and_scores_but_no_file(index, media, other_user, tmp_path):
    opened = open_index(index)
    assert opened.shows_no_files
    assert all(codes == {404} for codes in statuses(opened).values())
    page = TestClient(create_app(opened), base_url="http://127.0.0.1").get("/?q=a+red+square").text
    assert "4 results" in page
    assert page.count("is in no folder that you indexed here or named with --media") == 3
    assert page.count('class="score"') == 4
    with refuses():
        opened.read(opened.sample(1)[0].id)
    for folders in (media, [tmp_path]):
        assert all(codes == {200} for codes in statuses(open_index(index, media=folders)).values())
    assert all(codes == {404} for codes in statuses(open_index(index, media=f"{media}/none")).values())
    assert all(codes == {404} for codes in statuses(open_index(index, media=str(media)[:-1])).values())


@pytest.mark.parametrize("named", [False, True])
def test_no_file_outside_is_served_whatever_the_index_says(index, media, media_folder, tmp_path, monkeypatch, named):
    """Also if size and modification time are right, and the path is below the folder by its letters only."""
    if named:
        monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path / "cache of another"))
    outside = tmp_path / "outside"
    outside.mkdir()
    secret = Path(shutil.copy(media_folder / "0.png", outside))
    (media / "file.png").symlink_to(secret)
    (media / "folder").symlink_to(outside)
    for path in (secret, media / "file.png", media / "folder" / "0.png", media / ".." / "outside" / "0.png"):
        shutil.copytree(index, tmp_path / "copy.index", dirs_exist_ok=True)
        hit = point_to(tmp_path / "copy.index", path)
        opened = open_index(tmp_path / "copy.index", media=[media] if named else ())
        with pytest.raises(UserError, match="is in no folder that you indexed"):
            opened.read(hit.id)
        assert opened.read(next(hit.id for hit in opened.sample(9) if hit.path.endswith("1.png")))
        shutil.rmtree(tmp_path / "copy.index")


def test_an_update_of_somebody_elses_index_trusts_only_what_was_named(
    index, media, media_folder, tiny_model_folder, other_user, tmp_path
):
    before = open_index(index)._metadata.id
    own = Path(shutil.copytree(media_folder, tmp_path / "own"))
    build_index(tiny_model_folder, own, index)
    opened = open_index(index)
    assert opened._metadata.id != before, "another index of somebody else may have that id"
    assert recorded_folders(opened._metadata.id) == {os.path.realpath(own)}
    for hit in opened.sample(100):
        if Path(hit.path).parent == own:
            opened.check(hit)
        else:
            with pytest.raises(UserError, match="is in no folder that you indexed"):
                opened.check(hit)


def test_links_and_files_that_the_user_named_are_served(media, tiny_model_folder, tmp_path):
    (tmp_path / "link").symlink_to(media)
    for given in (tmp_path / "link", [media / "0.png", media / "1.png"]):
        index = build_index(tiny_model_folder, given, tmp_path / "named.index").folder
        assert all(codes == {200} for codes in statuses(open_index(index)).values())
        shutil.rmtree(index)


def test_an_index_of_an_older_version_has_no_id(index, tiny_model_folder, media):
    metadata = (index / "index.json").read_text()
    (index / "index.json").write_text(metadata.replace('"id"', '"no"').partition(',\n "no"')[0] + "\n}")
    assert open_index(index).shows_no_files
    build_index(tiny_model_folder, media, index)
    assert not open_index(index).shows_no_files
    assert Items(index).count(None) == 4


@pytest.mark.slow
def test_the_command_says_what_it_does_not_show(index, media, other_user, openimp, tmp_path):
    told = "you did not make this index on this machine, or openimp's cache was deleted, so only texts and scores"
    with serving(index) as server:
        assert server.ask("/").status == 200
    id = next(hit.id for hit in open_index(index).sample(9) if hit.path.endswith("0.png"))
    with serving(index, "--media", tmp_path / "media") as server:
        assert server.ask(f"/media/{id}").body == (media / "0.png").read_bytes()
    code, _, err = openimp("serve", index, "--media", tmp_path / "none")
    assert (code, err) == (2, f"openimp: --media {tmp_path / 'none'}: no such folder\n")
    code, _, err = openimp("serve", index, "--host", "192.0.2.1")
    assert (code, told in err) == (2, True)
