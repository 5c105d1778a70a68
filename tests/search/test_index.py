"""Indexing: what is found, embedded, recognized again, skipped and removed, also after a kill."""

import io
import json
import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from filelock import FileLock
from PIL import ExifTags

import openimp
from openimp.checkpoint.folder import checkpoints
from openimp.common.errors import UserError
from openimp.common.modality import BadMedia
from openimp.common.safe_files import sha256, write_text
from openimp.encoding.engine import ItemEncoder
from openimp.modalities.image import Image
from openimp.modalities.video import Video
from openimp.recipe.schema import Recipe
from openimp.search import IndexResult, Query, build_index, open_index
from openimp.search.build import build_and_open
from openimp.search.folder import METADATA, read_metadata
from openimp.search.media import Media, media_of_recipe
from openimp.search.table import Items
from openimp.training.trainer import train
from tests.conftest import TEXTS
from tests.messages import refuses

pytest.importorskip("lancedb")


@pytest.fixture(autouse=True)
def files_are_old(monkeypatch) -> None:
    """Files that were modified just now are hashed at each update; test_index_freshness.py is about these."""
    monkeypatch.setattr("openimp.common.safe_files.RECENT", 0)


@pytest.fixture
def build(tiny_model_folder: Path, tmp_path: Path) -> Callable[..., IndexResult]:
    """Builds or updates an index of files and folders with a tiny model, by default `x.index`."""

    def run(*paths: Path, index: str = "x.index", **options: object) -> IndexResult:
        return build_index(tiny_model_folder, paths, tmp_path / index, **options)

    return run


@pytest.fixture
def folder(media_folder: Path, tmp_path: Path) -> Path:
    """Three files of each modality, a sound of 12 s, a text of three lines, and a broken picture."""
    top = Path(shutil.copytree(media_folder, tmp_path / "media"))
    for file in top.glob("*.txt"):  # Beside `0.png`, `0.txt` would be its caption.
        file.rename(top / f"text{file.name}")
    soundfile.write(top / "long.wav", np.sin(np.arange(12 * 8000) / 9), 8000)
    (top / "lines.txt").write_text("a red square\n\na green circle\n  noise  \n", encoding="utf-8")
    (top / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    return top


@pytest.fixture
def embedded(monkeypatch) -> Counter[str]:
    """Counts the items that are embedded, by modality."""
    counts: Counter[str] = Counter()
    encode = ItemEncoder.encode

    def counting(encoder, items):
        for key, result in encode(encoder, items):
            if not isinstance(result, BadMedia):
                counts[encoder.modality.name] += 1
            yield key, result

    monkeypatch.setattr(ItemEncoder, "encode", counting)
    return counts


def rows(index: Path) -> dict[str, dict]:
    return {row["id"]: row for row in Items(index).table.to_arrow().to_pylist()}


def paths(index: Path) -> set[str]:
    return {row["path"] for row in rows(index).values()}


def assert_equal(one: Path, other: Path) -> None:
    """The same rows, and vectors that are equal up to the rounding of another batch."""
    expected = rows(other)
    assert rows(one).keys() == expected.keys()
    for id, row in rows(one).items():
        assert row.pop("vector") == pytest.approx(expected[id].pop("vector"), abs=5e-3)
        assert row == expected[id]


def test_a_folder_becomes_rows_for_files_segments_and_lines(build, tiny_model_folder, folder, tmp_path, capsys):
    for name in ("notes.docx", "a.RAW", "b.raw", "Makefile"):
        (folder / name).write_bytes(b"PK")
    done = build(folder)
    assert (done.new, done.changed, done.moved, done.unchanged, done.removed) == (14, 0, 0, 0, 0)
    assert list(done.skipped) == [str(folder / "broken.png")]
    assert done.unknown == {".raw": 2, ".docx": 1, "": 1}
    printed = capsys.readouterr().out
    for sentence in (
        "17 items, exact search; files: 14 new",
        "1 file could not be read",
        "of other kinds than are read: .raw 2, without extension 1, .docx 1\n",
        str(folder / "broken.png"),
    ):
        assert sentence in printed
    by_file: dict[str, list] = {}
    for row in rows(tmp_path / "x.index").values():
        by_file.setdefault(Path(row["path"]).name, []).append(row)
    assert sorted((row["start"], row["end"]) for row in by_file["long.wav"]) == [(0, 6), (6, 12)]
    assert [row["text"] for row in by_file["lines.txt"]] == ["a red square", "a green circle", "noise"]
    model = openimp.load(tiny_model_folder)
    for name in ("0.png", "1.mp4", "2.wav"):
        (row,) = by_file[name]
        alone = model.encode(row["modality"], folder / name, normalize=True)[0].cpu().numpy()
        assert row["start"] is None
        assert row["vector"] == pytest.approx(alone, abs=5e-3)


def test_only_new_and_changed_files_are_embedded(build, folder, tmp_path, embedded):
    build(folder)
    embedded.clear()
    again = build(folder)
    assert (again.new, again.unchanged, embedded) == (0, 14, {})
    assert list(again.skipped) == [str(folder / "broken.png")], "a bad file is tried and named each time"

    shutil.copy(folder / "1.png", folder / "copy.png")
    shutil.copy(folder / "1.png", folder / "0.png")
    (folder / "lines.txt").write_text("noise\na", encoding="utf-8")
    (folder / "deep").mkdir()
    (folder / "2.wav").rename(folder / "deep" / "moved.wav")
    (folder / "text1.txt").unlink()
    os.utime(folder / "2.png")
    shutil.copy(folder / "2.png", folder / "broken.png")
    (folder / "2.mp4").write_bytes(b"no clip any more")
    done = build(folder)
    # "broken.png" and "copy.png" are new, "2.png" was only touched, and "2.mp4" cannot be read any more.
    assert (done.new, done.changed, done.moved, done.unchanged, done.removed) == (2, 2, 1, 9, 2)
    assert embedded == {"text": 2}, "known content is not embedded again"
    assert list(done.skipped) == [str(folder / "2.mp4")]
    assert str(folder / "2.mp4") not in paths(tmp_path / "x.index")
    build(folder, index="fresh.index")
    assert_equal(tmp_path / "x.index", tmp_path / "fresh.index")
    assert Items(tmp_path / "x.index").indexed() == {"id", "path", "sha256", "folded"}
    opened = open_index(tmp_path / "x.index")
    assert all(opened.hit(id).id == id for id in rows(tmp_path / "x.index")), "old and new ids are found"


def test_ctrl_c_says_how_to_go_on_and_an_index_without_items_is_not_searched(build, folder, tmp_path, capsys):
    def interrupted(items, _):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(folder, progress=interrupted)
    told = f"stopped: {tmp_path / 'x.index'} holds 0 items so far; the same command does the rest\n"
    assert capsys.readouterr().out == told
    with refuses():
        open_index(tmp_path / "x.index")


class Stopped(BaseException):
    """Ends a process, for these tests, right after it has written something."""


@pytest.mark.parametrize("write", ["remove", "replace"])
def test_stopped_after_any_write_it_ends_as_if_undisturbed(build, folder, tmp_path, monkeypatch, write):
    build(folder)
    shutil.move(folder / "2.png", folder / "broken.png")  # It was unreadable and now has known content.
    (folder / "0.png").write_bytes(b"no picture any more")
    PIL.Image.new("RGB", (40, 40), (9, 99, 199)).save(folder / "1.png")
    real = getattr(Items, write)

    def stop(*arguments):
        real(*arguments)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Items, write, stop)
        with pytest.raises(Stopped):
            build(folder)
    build(folder)
    build(folder, index="whole.index")
    assert_equal(tmp_path / "x.index", tmp_path / "whole.index")


def test_items_of_folders_without_files_stay_until_they_are_forgotten(build, folder, tmp_path, capsys):
    """The disk of a folder may not be mounted."""
    index = tmp_path / "x.index"
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        shutil.copy(folder / f"{'abc'.index(name)}.png", tmp_path / name / "0.png")
    roots = [tmp_path / name for name in "abc"]
    build(*roots)
    (roots[0] / "0.png").unlink()
    shutil.rmtree(roots[1])
    kept = build(*roots)
    assert (kept.removed, kept.unchanged, kept.items) == (0, 1, 3)
    shown = capsys.readouterr().err
    assert f"{roots[0]}: has no files now" in shown
    assert f"--forget {roots[1]} removes it" in shown
    assert build(roots[2], forget=roots[0]).removed == 1
    assert paths(index) == {str(root / "0.png") for root in roots[1:]}
    assert build(forget=[roots[1]]).removed == 1
    for forgotten in (roots[1], tmp_path / "never"):
        with refuses():
            build(roots[2], forget=[forgotten])
    with refuses():
        build(forget=roots[2], index="other.index")
    assert not (tmp_path / "other.index").exists()
    shutil.rmtree(roots[2])
    capsys.readouterr()
    assert build(roots[2]).items == 1
    assert f"--forget {roots[2]} removes it" in capsys.readouterr().err
    with refuses():
        build(tmp_path / "never", roots[2])
    assert paths(index) == {str(roots[2] / "0.png")}
    done = build(forget=roots[2])
    assert (done.removed, done.items) == (1, 0)


def test_a_folder_without_files_inside_of_one_with_files_is_tidied(build, folder, tmp_path, capsys):
    (folder / "trip").mkdir()
    shutil.copy(folder / "0.png", folder / "trip" / "0.png")
    build(folder, folder / "trip")
    shutil.rmtree(folder / "trip")
    capsys.readouterr()
    (folder / "1.png").unlink()
    assert build(folder, folder / "trip", folder / "1.png").removed == 2
    assert "has no files now" not in capsys.readouterr().err


def test_a_folder_without_media_is_named(build, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (folder / "0.txt").touch()  # A caption is no item, but it is not reported as missing either.
    build(folder / "0.png", folder / "0.txt")
    assert not capsys.readouterr().err
    assert build(folder / "1.png", tmp_path / "empty").new == 1
    assert f"{tmp_path / 'empty'}: has no files that can be indexed" in capsys.readouterr().err


def test_a_named_file_is_removed_if_its_folder_has_others(build, folder, tmp_path, capsys):
    (tmp_path / "disk").mkdir()
    alone = Path(shutil.copy(folder / "1.png", tmp_path / "disk"))
    build(folder / "0.png", folder / "2.png", alone)
    (folder / "0.png").unlink()
    alone.unlink()
    done = build(folder / "0.png", folder / "2.png", alone)
    assert (done.removed, done.items) == (1, 2)
    (notice,) = capsys.readouterr().err.splitlines()
    assert notice.startswith(f"{alone}: is gone, and its disk may not be mounted")


def test_words_find_a_recording_whose_beginning_cannot_be_read(build, folder, tmp_path, embedded):
    """All its segments have its text, so words are looked up in the first one that can be read."""
    samples = np.sin(np.arange(12 * 8000) / 9)
    samples[7] = np.nan
    soundfile.write(folder / "long.wav", samples, 8000, subtype="FLOAT")
    (folder / "long.txt").write_text("an owl at night", encoding="utf-8")
    assert "not finite" in build(folder).skipped[str(folder / "long.wav")]
    (hit,) = open_index(tmp_path / "x.index").search("owl", by="words")
    assert (Path(hit.path).name, hit.part) == ("long.wav", 0)
    assert hit.start > 0
    embedded.clear()
    (folder / "long.wav").rename(folder / "moved.wav")
    done = build(folder)
    assert (done.moved, embedded) == (1, {"text": 1}), "long.txt is an item now"
    assert "not finite" in done.skipped[str(folder / "moved.wav")]


def test_equal_files_that_move_together_are_moved(build, folder):
    for name in ("a", "b"):
        shutil.copy(folder / "0.png", folder / f"{name}.png")
    build(folder)
    (folder / "deep").mkdir(exist_ok=True)
    for name in ("a", "b"):
        (folder / f"{name}.png").rename(folder / "deep" / f"{name}.png")
    done = build(folder)
    assert (done.moved, done.new, done.removed) == (2, 0, 0)


def test_captions_are_found_although_only_their_media_are_named(build, media_folder, tmp_path):
    media = Path(shutil.copytree(media_folder, tmp_path / "media"))
    (media / "1.txt").rename(media / "1.TXT")
    build(*media.glob("*.png"))
    assert {row["text"] for row in rows(tmp_path / "x.index").values()} == {*TEXTS[:3]}


def test_an_index_whose_version_is_removed_is_opened_again(build, folder, tmp_path, monkeypatch):
    index = tmp_path / "x.index"
    build(folder)
    old = open_index(index)
    never_used = [open_index(index) for _ in range(4)]
    shutil.copy(folder / "1.png", folder / "0.png")
    (folder / "1.wav").unlink()
    build(folder)
    assert old.counts["audio"] == 5
    monkeypatch.setattr("openimp.search.table.KEEP_VERSIONS", timedelta(milliseconds=1))
    build(folder)
    assert len(old.search("noise", k=50)) == len(open_index(index).search("noise", k=50))
    assert old.counts["audio"] == 4
    assert len(never_used[0].search("noise", k=50)) == len(old.search("noise", k=50))
    assert never_used[1].has_words
    assert never_used[1].has_dates
    assert never_used[2].folders == old.folders
    assert len(never_used[3].vectors()) >= sum(old.counts.values())
    assert old.hits(hit.id for hit in old.search("noise", k=2))


def test_a_kill_while_the_table_is_created_is_no_damage(build, folder, tmp_path):
    build(folder / "0.png")
    shutil.rmtree(tmp_path / "x.index" / "items.lance")
    (tmp_path / "x.index" / "items.lance").mkdir()
    assert build(folder / "0.png").new == 1


def test_an_index_in_use_of_other_weights_or_of_another_format_is_refused(folder, tmp_path, tiny_recipe, write_tiny):
    model = write_tiny(tiny_recipe(), tmp_path / "model")
    index = tmp_path / "x.index"
    build = partial(build_index, model, [folder / "0.png"], index)
    build()
    with FileLock(index / ".lock"), refuses():
        build()
    shutil.rmtree(model)
    write_tiny(tiny_recipe({"init_temperature": 0.5}), model)
    for use in (partial(open_index, index), build):
        with refuses():
            use()
    write_text(index / METADATA, read_metadata(index).model_copy(update={"format": 1}).model_dump_json())
    for use in (partial(open_index, index), build):
        with refuses():
            use()


def copy_clip(clip: Path, copy: Path, tags: dict[str, str]) -> None:
    """Copies a clip, with other tags in its header."""
    with (
        av.open(str(clip)) as source,
        av.open(str(copy), "w", options={"movflags": "use_metadata_tags"}) as target,
    ):
        target.metadata.update(tags)
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)


@pytest.fixture
def dated(media_folder: Path, tmp_path: Path) -> Path:
    """A photo and a clip whose headers tell when and where they were taken, a photo that does not, and a text."""
    top = tmp_path / "dated"
    top.mkdir()
    exif = PIL.Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2024:05:31 18:30:00"
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    gps[ExifTags.GPS.GPSLatitudeRef], gps[ExifTags.GPS.GPSLatitude] = "S", (33.0, 51.0, 31.2)
    gps[ExifTags.GPS.GPSLongitudeRef], gps[ExifTags.GPS.GPSLongitude] = "E", (151.0, 12.0, 36.0)
    PIL.Image.open(media_folder / "0.png").save(top / "sydney.jpg", exif=exif)
    broken = PIL.Image.Exif()
    broken[ExifTags.Base.DateTime] = "0000:00:00 00:00:00"
    broken.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (1.0, 2.0)
    PIL.Image.open(media_folder / "1.png").save(top / "unknown.jpg", exif=broken)
    told = {"creation_time": "2025-01-02T03:04:05.000000Z", "location": "+48.8577+002.2950/"}
    copy_clip(media_folder / "0.mp4", top / "paris.mp4", told)
    (top / "text.txt").write_text("a red square")
    for name in ("unknown.jpg", "text.txt"):
        seconds = datetime(2023, 6, 7, 8, 9, 10).timestamp()
        os.utime(top / name, (seconds, seconds))
    return top


def test_items_have_the_date_and_place_that_their_files_tell(build, dated, tmp_path):
    build(dated)
    found = {Path(row["path"]).name: row for row in rows(tmp_path / "x.index").values()}
    recorded = datetime.fromisoformat("2025-01-02T03:04:05+00:00").astimezone().replace(tzinfo=None).isoformat()
    assert {name: row["date"] for name, row in found.items()} == {
        "sydney.jpg": "2024-05-31T18:30:00",
        "paris.mp4": recorded,
        "unknown.jpg": "2023-06-07T08:09:10",
        "text.txt": "2023-06-07T08:09:10",
    }
    places = {name: (row["latitude"], row["longitude"]) for name, row in found.items() if row["latitude"] is not None}
    assert places.keys() == {"sydney.jpg", "paris.mp4"}
    assert places["sydney.jpg"] == pytest.approx((-33.8587, 151.21), abs=1e-4)
    assert places["paris.mp4"] == pytest.approx((48.8577, 2.295), abs=1e-4)


def test_headers_that_tell_nonsense_tell_nothing(media_folder, tmp_path):
    video, image = Video(Video.Config()), Image(Image.Config())
    for tags, expected in (
        ({"creation_time": "soon", "location": "+99.0000+500.0000/"}, (None, None)),
        ({"location": "+48.8577-002.2950CRSWGS_84/"}, (None, (48.8577, -2.295))),
    ):
        copy_clip(media_folder / "0.mp4", tmp_path / "clip.mp4", tags)
        assert video.recorded(tmp_path / "clip.mp4") == expected
    exif = PIL.Image.Exif()
    exif[ExifTags.Base.DateTime] = "2024:05:31 18:30:00"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "0000:00:00 00:00:00"
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    gps[ExifTags.GPS.GPSLatitude] = gps[ExifTags.GPS.GPSLongitude] = (0.0, 0.0, 0.0)
    PIL.Image.open(media_folder / "0.png").save(tmp_path / "photo.png", exif=exif)
    assert image.recorded(tmp_path / "photo.png") == (datetime(2024, 5, 31, 18, 30), None)
    assert image.recorded(media_folder / "0.png") == (None, None)


def test_a_search_may_be_limited_to_dates(build, dated, tmp_path, openimp, capfd):
    build(dated)
    capfd.readouterr()
    days = ("--since", "2024-05-31", "--until", "2024-05-31")
    code, printed, _ = openimp("search", tmp_path / "x.index", "a", *days, "--json")
    assert code == 0
    assert [Path(json.loads(line)["path"]).name for line in printed.splitlines()] == ["sydney.jpg"]
    index = open_index(tmp_path / "x.index", "cpu")

    def found(since=None, until=None):
        return {Path(hit.path).name for hit in index.search("a", since=since, until=until)}

    assert found("2024-05-31", "2024-05-31") == {"sydney.jpg"}
    assert found(datetime(2024, 6, 1, 12)) == {"paris.mp4"}
    assert found(until="2024-05-31") == {"sydney.jpg", "unknown.jpg", "text.txt"}
    for wrong in ("31.05.2024", "2024-02-31"):
        with refuses():
            found(wrong)


def test_a_file_that_disappears_while_it_is_read_is_skipped(build, folder, tmp_path, monkeypatch):
    def hash_and_remove(file):
        digest = sha256(file)
        if file.name == "0.png":
            file.unlink()
        return digest

    monkeypatch.setattr("openimp.search.parts.sha256", hash_and_remove)
    done = build(folder)
    assert done.skipped[str(folder / "0.png")] == "No such file or directory"
    assert done.new == 13


def test_named_pipes_are_skipped_and_do_not_stop_the_update(build, folder):
    for name in ("pipe.png", "notes.txt", "0.txt"):
        os.mkfifo(folder / name)
    done = build(folder)
    assert done.new == 14
    reasons = {Path(path).name: reason for path, reason in done.skipped.items()}
    assert reasons["pipe.png"] == reasons["notes.txt"] == "not a file"
    assert reasons["0.png"] == "0.txt: not a file", "a caption may not be one either"


def test_links_out_of_the_folder_are_not_followed(build, folder, tmp_path):
    (tmp_path / "private.txt").write_text("noise", encoding="utf-8")
    (folder / "link.txt").symlink_to(tmp_path / "private.txt")
    (folder / "0.txt").symlink_to(tmp_path / "private.txt")
    (folder / "inside.txt").symlink_to(folder / "text0.txt")
    done = build(folder)
    outside = "is a link out of the folders that are indexed"
    assert done.skipped[str(folder / "link.txt")] == outside
    assert done.skipped[str(folder / "0.png")] == f"0.txt: {outside}", "a caption may not be one either"
    found = rows(tmp_path / "x.index").values()
    assert [row["text"] for row in found if row["path"] == str(folder / "0.png")] == ["0"]  # its name
    assert str(folder / "inside.txt") in {row["path"] for row in found}


def test_an_index_that_cannot_be_written_is_one_sentence_and_continues(build, folder, tmp_path):
    build(folder / "0.png")
    transactions = tmp_path / "x.index" / "items.lance" / "_transactions"
    shutil.rmtree(transactions)
    transactions.write_text("no folder")
    with pytest.raises(UserError, match="the index cannot be written"):
        build(folder)
    transactions.unlink()
    assert build(folder).items == len(rows(tmp_path / "x.index")) > 1


def test_bad_input_is_one_sentence(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bad.png", "bad.xyz"):
        Path(name).write_bytes(b"no picture")
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine", encoding="utf-8")
    for path, out in (("bad.xyz", "x.index"), ("bad.png", "x.index"), ("bad.png", "full"), ("bad.png", None)):
        with refuses():
            build_index(tiny_model_folder, [path], out)
    assert Path("full/mine.txt").read_text(encoding="utf-8") == "mine"


def test_a_run_indexes_the_media_of_its_recipe_and_new_texts_without_them(own_data, tmp_path, embedded):
    """Files of sources are indexed as files, and equal rows only once."""
    run = tmp_path / "run"
    train(Recipe.load(own_data / "recipe.yaml", ["train.steps=1"]), run)
    with refuses():
        open_index(run)
    embedded.clear()
    done = build_index(run)
    assert done.folder == run / "search.index"
    assert (done.new, embedded) == (39, {"image": 24, "audio": 15})
    for name in (done.folder, run):
        assert open_index(name).counts == {"image": 24, "audio": 15}

    embedded.clear()
    lines = (own_data / "sounds.jsonl").read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"caption": "a tone with another name"})
    lines.append(json.dumps(json.loads(lines[1]) | {"caption": "a second caption"}))
    (own_data / "sounds.jsonl").write_text("\n".join(lines))
    done = build_index(run)
    assert (done.changed, done.unchanged, embedded) == (2, 37, {})
    texts = {os.path.relpath(row["path"], own_data): row["text"] for row in rows(done.folder).values()}
    assert (texts["0.wav"], texts["2.wav"]) == ("a tone with another name", "a high tone")
    assert texts["1.wav"] == "a middle tone; a second caption"
    assert texts["pictures/red/0.png"] == "a red square"

    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(own_data / "1.wav", other / "copy.wav")
    assert build_index(run, [other]).items == 40
    (own_data / "pictures" / "red" / "0.png").unlink()
    done = build_index(run)
    assert (done.removed, done.items) == (1, 39)  # The other folder's item stays.
    index = open_index(run)
    assert len(index.search("a red square", k=50, under="pictures")) == 23
    assert [hit.path for hit in index.search("a tone", k=50, under=other)] == [str(other / "copy.wav")]
    assert {*index.folders} >= {"pictures", "sounds"}

    named = tmp_path / "named.index"
    assert build_index(run, [own_data / "pictures"], named).items == 23
    (own_data / "pictures" / "red" / "1.png").unlink()
    done = build_index(run, None, named)
    assert (done.removed, done.items) == (1, 37), "also an item of the time when its folder was named"

    moved = run.rename(tmp_path / "moved")
    assert open_index(moved).search("a red square")
    assert open_index(moved / "search.index").search("a red square")


def test_a_modality_that_is_compared_with_no_other_is_neither_indexed_nor_searched_with(own_data, tmp_path):
    """Here pictures have classes only."""
    named = "{source: pictures, inputs: {image: file}, objectives: [{type: classification, label: label}]}"
    heard = "{source: sounds, inputs: {audio: sound, text: caption}, objectives: [{type: contrastive}]}"
    for name, tasks in (("both", f"{{named: {named}, heard: {heard}}}"), ("classes", f"{{named: {named}}}")):
        changes = [f"tasks={tasks}", "modalities={}", "train={steps: 1}", "evaluation={}"]
        train(Recipe.load(own_data / "recipe.yaml", changes), tmp_path / name)
    done = build_index(tmp_path / "both")
    assert done.items == 15
    with refuses():
        open_index(done.folder).search([Query("image", own_data / "pictures" / "red" / "0.png"), "a tone"])
    with refuses():
        build_index(tmp_path / "classes")


def test_all_captions_of_a_row_are_its_text_whatever_reads_it_first(own_data):
    lines = [json.loads(line) for line in (own_data / "sounds.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["captions"] = [line["caption"], f"a second caption {i}"]
    (own_data / "sounds.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tasks = """tasks={
      classes: {source: sounds, inputs: {audio: sound}, objectives: [{type: classification, label: caption}]},
      heard: {source: sounds, inputs: {audio: sound, text: captions}, objectives: [{type: contrastive}]}}"""
    assert f"{lines[0]['caption']}; a second caption 0" in {item.text() for item in media_of(own_data, tasks)}


def test_a_row_without_a_caption_has_the_text_of_its_class(own_data):
    for i, file in enumerate(sorted((own_data / "pictures").rglob("*.png"))):
        if i:
            file.with_suffix(".txt").write_text(f"caption {i}")
    tasks = """tasks={named: {source: pictures, inputs: {image: file, text: text},
      objectives: [{type: contrastive}, {type: classification, label: label}]}}"""
    (path,) = [item.path for item in media_of(own_data, tasks) if item.text() == "blue"]
    assert path.endswith("blue/0.png")


def test_the_class_of_a_task_without_texts_is_the_text_of_its_items(own_data):
    task = "{source: pictures, inputs: {image: file}, objectives: [{type: classification, label: label}]}"
    texts = {item.text() for item in media_of(own_data, f"tasks={{named: {task}}}")}
    assert texts == {"red", "green", "blue", "white"}


def media_of(data: Path, tasks: str) -> list[Media]:
    """The media of a recipe with other tasks, which need not be trained for this."""
    recipe = Recipe.load(data / "recipe.yaml", [tasks, "modalities={}", "evaluation={}"])
    return list(media_of_recipe(recipe, recipe.make_modalities()))


def test_a_run_that_saves_while_its_media_are_indexed_can_be_searched(own_run, tmp_path, monkeypatch):
    newest = checkpoints(own_run)[-1]
    hidden = newest.rename(tmp_path / "hidden")
    compact = Items.compact

    def compact_after_save(items):
        hidden.rename(newest)
        compact(items)

    monkeypatch.setattr(Items, "compact", compact_after_save)
    assert build_and_open(own_run, allow_sources=False).search("a red square", k=3)
    assert checkpoints(own_run)[-1] == newest


def test_case_and_accents_do_not_count_whatever_the_ending(build, media_folder, tmp_path):
    """An English ending is removed from "resume", but not from "résumé"."""
    (tmp_path / "in").mkdir()
    decomposed = unicodedata.normalize("NFD", "größe")
    names = ["Résumé", "Straße am See", "protégé", "école", "Ёлка", "한국", decomposed]
    for name in names:
        shutil.copy(media_folder / "0.png", tmp_path / "in" / f"{name}.png")
    build(tmp_path / "in")
    index = open_index(tmp_path / "x.index")
    queries = ["resume", "STRASSE", "proteges", "Ecole", "елка", "한국", "größe"]
    for name, query in zip(names, queries):
        for text in (name, query):
            assert [Path(hit.path).stem for hit in index.search(text, by="words")] == [name], text


def test_a_text_beside_media_is_their_caption_and_no_item(build, media_folder, tmp_path, embedded):
    index = tmp_path / "x.index"
    media = tmp_path / "media"
    media.mkdir()
    for name in ("0.png", "0.wav", "1.png", "2.png"):
        shutil.copy(media_folder / name, media)
    shutil.copy(media_folder / "1.png", media / "1 again.PNG")
    for name, text in (("0", "a caption"), ("1", "another"), ("2", "\ufeffnoise\nand more\n"), ("alone", "noise\na")):
        (media / f"{name}.txt").write_text(text, encoding="utf-8")
    assert build(media).new == 6

    def texts() -> dict[str, str | None]:
        found = [row for row in rows(index).values() if row["modality"] != "text"]
        assert all(open_index(index).read(row["id"]) for row in found), "none has changed since it was indexed"
        return {Path(row["path"]).name: row["text"] for row in found}

    captions = {"0.png": "a caption", "0.wav": "a caption", "1.png": "another", "2.png": "noise\nand more"}
    assert texts() == captions | {"1 again.PNG": "1 again"}
    assert [row["path"] for row in rows(index).values() if row["modality"] == "text"] == [str(media / "alone.txt")] * 2

    embedded.clear()
    (media / "0.txt").write_text("a new caption", encoding="utf-8")
    (media / "1.txt").unlink()
    (media / "2.txt").write_bytes(b"\xff\xfe")
    (media / "1 again.txt").write_text("again", encoding="utf-8")
    done = build(media)
    assert (done.changed, done.unchanged, done.items) == (5, 1, 7), "a changed caption counts"
    assert embedded == {}, "media are not embedded again"
    captions = {"0.png": "a new caption", "0.wav": "a new caption", "1.png": "1", "2.png": "2", "1 again.PNG": "again"}
    assert texts() == captions
    again = build(media)
    assert again.unchanged == 6
    for skipped in (done.skipped, again.skipped):  # An unreadable caption is named each time.
        assert list(skipped) == [str(media / "2.png")]
        assert skipped[str(media / "2.png")].startswith("2.txt: no UTF-8 text")
    (media / "2.txt").write_text(" \n", encoding="utf-8")
    assert not build(media).skipped
    assert texts() == captions, "an empty caption is none"
    build(media)  # LanceDB merges what the update left.
    before = Items(index).table.version
    build(media)
    assert Items(index).table.version == before, "nothing is written again"

    (media / "0.png").unlink()
    (media / "0.wav").unlink()
    done = build(media)
    assert (done.new, done.removed, embedded) == (1, 2, {"text": 1}), "a text whose media are gone is an item"


def test_a_copy_keeps_its_media_type_if_the_original_changes(build, media_folder, tmp_path):
    """The copy's caption changes in the same update, so its hash is known, but its rows must be made anew."""
    for name in ("a.png", "b.png"):
        shutil.copy(media_folder / "0.png", tmp_path / name)
    build(tmp_path)
    shutil.copy(media_folder / "1.png", tmp_path / "a.png")
    (tmp_path / "b.txt").write_text("a caption", encoding="utf-8")
    build(tmp_path)
    assert [row["media_type"] for row in rows(tmp_path / "x.index").values()] == ["image/png"] * 2


def test_a_run_whose_sources_are_streams_has_no_media_to_index(tiny_recipe, write_tiny, tmp_path):
    recipe = tiny_recipe(sources={"all": {"path": f"{tmp_path}/*.tar", "stream": True}})
    with refuses():
        build_index(write_tiny(recipe, tmp_path / "model"), None, tmp_path / "x.index", allow_sources=True)


def test_rows_of_a_source_are_read_again_by_their_number(tiny_recipe, write_tiny, media_folder, tmp_path, embedded):
    pictures = [(media_folder / f"{i % 3}.png").read_bytes() for i in range(4)]
    data = {"image": pictures, "text": ["one", "two", "three", "one again"]}
    pq.write_table(pa.table(data), tmp_path / "all.parquet")
    task = {"source": "all", "inputs": {"image": "image", "text": "text"}, "objectives": [{"type": "contrastive"}]}
    tasks = {"named": {**task, "views": [{"image": {"size": 32}}]}}
    recipe = tiny_recipe(folder=tmp_path, tasks=tasks, modalities={"vision": {"patch": [2, 8, 8]}})
    build = partial(build_index, write_tiny(recipe, tmp_path / "model"), None, tmp_path / "x.index")
    reopen = partial(open_index, tmp_path / "x.index", allow_sources=True)
    with refuses():
        build()
    done = build(allow_sources=True)
    assert (done.new, done.items, embedded) == (3, 3, {"image": 3}), "equal rows are one item"
    index = reopen()
    hits = index.search("one", k=5)
    with refuses():
        open_index(tmp_path / "x.index").read(hits[0].id)
    texts = ["one; one again", "two", "three"]
    assert {hit.path: hit.text for hit in hits} == {f"all/{i}/image": text for i, text in enumerate(texts)}
    build(allow_sources=True)
    assert [hit.text for hit in reopen().search("again", by="words")] == texts[:1]
    for hit in hits:
        assert index.read(hit.id) == pictures[int(hit.path.split("/")[1])]
    assert [hit.path for hit in index.search("one", under="all/1/image")] == ["all/1/image"]

    # All rows move up, and the first one is new.
    fresh = io.BytesIO()
    PIL.Image.new("RGB", (30, 30), (9, 99, 199)).save(fresh, "PNG")
    shifted = [fresh.getvalue(), *pictures[:3]]
    pq.write_table(pa.table({"image": shifted, "text": list("abcd")}), tmp_path / "all.parquet")
    with refuses():
        reopen().read(hits[0].id)
    embedded.clear()
    done = build(allow_sources=True)
    assert (done.changed, done.new, embedded) == (3, 1, {"image": 1})
    index = reopen()
    assert [index.read(hit.id) for hit in sorted(index.search("one"), key=lambda hit: hit.path)] == shifted


def test_rows_without_vectors_make_no_index_approximate(tmp_path, monkeypatch):
    """LanceDB cannot divide no vectors into partitions."""
    monkeypatch.setattr("openimp.search.table.APPROXIMATE_ROWS", 10)
    items = Items(tmp_path, 16)
    items.replace([], [{"id": str(i), "vector": None, "text": "unknown"} for i in range(20)])
    items.compact()
    assert not items.approximate


def test_a_large_index_is_searched_approximately(tmp_path, monkeypatch):
    """60,000 items of two modalities with a gap between them."""
    rng = np.random.default_rng(0)
    is_text = np.arange(60_000) % 2
    centers = rng.normal(size=(40, 16))
    vectors = centers[rng.integers(0, 40, 60_000)] + 0.5 * rng.normal(size=(60_000, 16))
    vectors += 9 * rng.normal(size=(2, 16))[is_text]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    items = Items(tmp_path, 16)
    modalities = ("image", "text")
    items.replace([], [{"id": str(i), "modality": modalities[i % 2], "vector": vectors[i]} for i in range(60_000)])
    items.compact()
    assert items.approximate

    def nearest(i: int, where: str | None = None) -> set[int]:
        return {int(row["id"]) for row in items.nearest(vectors[i], 10, where)}

    def best(cosines: np.ndarray) -> set[int]:
        return set(np.argsort(-cosines)[:10].tolist())

    found = [len(nearest(i) & best(vectors @ vectors[i])) for i in range(20)]
    assert np.mean(found) >= 9.8
    assert items.nearest(vectors[0], 1)[0]["_distance"] == pytest.approx(0, abs=1e-3)
    monkeypatch.setattr("openimp.search.table.SEARCHED_PARTITIONS", 1)
    assert nearest(7, "id IN ('5', '1234', '2999')") == {5, 1234, 2999}, "a filter may need all partitions"
    pictures = best(np.where(is_text, -1, vectors @ vectors[1]))
    assert len(nearest(1, "modality = 'image'") & pictures) >= 9, "only texts are in its partitions"
