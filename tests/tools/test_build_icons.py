"""tools/build_icons.py names, splits and draws icons as docs/icons-card.md says, and so are the bundled ones."""

import hashlib
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from icon_splits import MIN_SETS, held_out_keys, key_of, mark_demo
from little import write_tar
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "src" / "openimp" / "data" / "demo"


def bar(x: int) -> dict:
    """An icon of a black bar at `x`."""
    return {"body": f'<path fill="currentColor" d="M{x} 2h3v20h-3z"/>'}


ALPHA = {
    "prefix": "alpha", "height": 24, "width": 24, "suffixes": {"outline": "Outline", "20-filled": "Filled"},
    "icons": {
        "house-outline": bar(0), "house-20-filled": bar(1), "arrow-left-24": bar(2), "arrow_right": bar(3),
        "chat-01": bar(4), "rotate-90": bar(5), "number-7": bar(6), "mouse2": bar(7), "heart-blue": bar(8),
        "traffic-light": bar(9), "road": {**bar(20), "width": 48},
        "secret": {**bar(10), "hidden": True}, "spinner": {"body": f"<g>{bar(11)['body']}<animate/></g>"},
        "facebook-round": bar(12), "acme": bar(13), "hand-skin-tone-3": bar(14), "x": bar(15), "a-1": bar(16),
        "one-two-three-four-five-six-seven": bar(17), "empty": {"body": ""}, "left-arrow-copy": bar(2),
    },
    "aliases": {"dwelling": {"parent": "house-outline"}, "abode": {"parent": "house-20-filled"},
                "streets": {"parent": "road"}},
    "categories": {"Brands": ["acme"]},
}  # fmt: skip
# Most names end in "fill", so it is style here.
TREES = [f"tree-{size}-fill" for size in (8, 12, 16, 20, 24, 28, 32, 40, 48)]
BETA = {"prefix": "beta", "icons": {name: bar(i) for i, name in enumerate(["house-fill", "sea-fill", *TREES])}}
RED = '<path fill="#f00" d="M2 2h{}v9h-9z"/>'
HELD_OUT_SET = {
    "prefix": "marketeq", "width": 16, "height": 16,
    "icons": {name: {"body": RED.format(i)} for i, name in enumerate(("house", "zeppelin-dock", "tree"), 4)},
}  # fmt: skip


def dot(name: str, radius: int) -> dict:
    """A set with a picture that no other set has."""
    return {"prefix": name, "icons": {"dot": {"body": f'<circle cx="8" cy="8" r="{radius}"/>'}}}


SETS = {
    "alpha": (ALPHA, {"category": "UI 24px", "license": "MIT"}),
    "beta": (BETA, {"category": "Thematic", "license": "CC-BY-4.0"}),
    "marketeq": (HELD_OUT_SET, {"category": "UI Multicolor", "license": "Apache-2.0", "palette": True}),
    "copyleft": (dot("copyleft", 4), {"category": "UI 24px", "license": "GPL-3.0-or-later"}),
    "faces": (dot("faces", 5), {"category": "Emoji", "license": "MIT"}),
    "retired": (dot("retired", 6), {"category": "Material", "license": "MIT", "hidden": True}),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What is built from a package with the layout of @iconify/json."""
    pytest.importorskip("resvg_py")
    out = tmp_path_factory.mktemp("out")
    members = {}
    about = {}
    for name, (data, more) in SETS.items():
        members[f"package/json/{name}.json"] = json.dumps(data).encode()
        license = {"title": more["license"], "spdx": more["license"], "url": f"https://example.org/{name}/LICENSE"}
        author = {"name": f"Maker of {name}", "url": f"https://example.org/{name}"}
        about[name] = {**more, "name": name.title(), "author": author, "license": license}
    members["package/collections.json"] = json.dumps(about).encode()
    package = write_tar(out / "package.tgz", members)
    subprocess.run([sys.executable, ROOT / "tools" / "build_icons.py", out, "--package", package], check=True)
    return out


@pytest.fixture(scope="module")
def icons(out):
    return pq.read_table(out / "icons.parquet").to_pylist()


def test_names_are_words_of_content_and_each_has_one_picture(icons):
    names = [icon["name"] for icon in icons if icon["set"] == "alpha"]
    # One alias names the variant of the house that is not used under the name of house.
    assert ("abode" in names) != ("dwelling" in names)
    assert set(names) - {"abode", "dwelling"} == {
        "house", "arrow right", "chat", "rotate 90", "number 7", "mouse", "heart blue", "traffic light", "road",
        *{"arrow left", "left arrow copy"}.intersection(names),
    }  # fmt: skip
    assert len(names) == 11
    assert [icon["name"] for icon in icons if icon["set"] == "beta"] == ["house", "sea", "tree"]


def test_only_sets_with_a_permissive_license_and_a_wanted_category_are_used(icons):
    assert {(icon["set"], icon["license"], icon["color"]) for icon in icons} == {
        ("alpha", "MIT", False), ("beta", "CC-BY-4.0", False), ("marketeq", "Apache-2.0", True)
    }  # fmt: skip


def test_pictures_are_whole_and_on_white(icons):
    pictures = {(i["set"], i["name"]): np.asarray(Image.open(io.BytesIO(i["image"])).convert("RGB")) for i in icons}
    assert {picture.shape for picture in pictures.values()} == {(32, 32, 3)}
    assert len({picture.tobytes() for picture in pictures.values()}) == len(icons)
    # 48 x 24: a third of a pixel of the icon's grid is one of the picture, which is padded above and below.
    road = pictures["alpha", "road"].min(axis=-1)
    assert (road[:8] == 255).all()
    assert (road[-8:] == 255).all()
    assert (road[12:20, 14] == 0).all()
    assert tuple(pictures["marketeq", "house"][10, 6]) == (255, 0, 0)


def test_splits_follow_the_emoji_and_the_sets(icons):
    splits = {(icon["set"], icon["name"]): (icon["set_split"], icon["split"]) for icon in icons}
    assert splits["alpha", "heart blue"] == ("train", "test")  # The emoji "blue heart" is a test emoji.
    assert splits["marketeq", "zeppelin dock"] == ("test", "test")  # Never trained on.
    for name in ("house", "tree"):
        assert splits["marketeq", name] == ("test", splits["beta", name][1])
    place = int.from_bytes(hashlib.sha256(b"house").digest()[:8], "big") / 2**64
    assert place >= 0.1
    assert splits["alpha", "house"] == ("train", "train")


def test_the_demo_uses_names_of_many_sets_that_are_not_related_to_held_out_emoji():
    def rows(name, number, set_split="train"):
        return [{"name": name, "set": f"{set_split}{i}", "set_split": set_split} for i in range(number)]

    icons = [
        *rows("star", MIN_SETS),
        *rows("star", 1, "test"),
        *rows("bus", MIN_SETS, "test"),
        *2 * rows("sea", MIN_SETS - 1),
    ]
    related = ["shields", "shield off", "lightbulb", "alarm light bulb"]
    icons += [row for name in (*related, "light", "bulb") for row in rows(name, MIN_SETS)]
    mark_demo(icons, ["shield", "bulb light"])
    assert Counter(row["name"] for row in icons if row["demo"]) == {
        "star": MIN_SETS + 1,
        "light": MIN_SETS,
        "bulb": MIN_SETS,
    }


def test_the_notice_names_every_author_and_the_license_texts_are_there(out):
    notice = (out / "NOTICE").read_text()
    assert "Beta by Maker of beta, https://example.org/beta. CC-BY-4.0" in notice
    assert "copyleft" not in notice
    texts = {file.name for file in (out / "LICENSES").iterdir()}
    assert texts == {"icons-Apache-2.0.txt", "icons-CC-BY-4.0.txt", "icons-MIT.txt"}


@pytest.fixture(scope="module")
def bundled():
    columns = ["name", "set", "license", "color", "demo", "split", "set_split"]
    return pq.read_table(DEMO / "icons.parquet", columns=columns).to_pylist()


def test_no_bundled_icon_for_training_has_the_name_of_an_emoji_that_is_held_out(bundled):
    stills = pq.read_table(DEMO / "stills.parquet", columns=["name", "concept", "captions", "split"]).to_pylist()
    held_out = {"test": set(), "val": set()}
    for still in stills:
        if still["split"] != "train":
            held_out[still["split"]] |= {key_of(t) for t in (still["name"], still["concept"], *still["captions"])}
    found = Counter()
    for icon in bundled:
        key = key_of(icon["name"])
        if key in held_out["test"] | held_out["val"]:
            assert icon["split"] == ("test" if key in held_out["test"] else "val"), icon["name"]
            found[icon["split"]] += 1
    assert found["test"] > 50
    assert held_out_keys(DEMO).keys() >= held_out["test"] | held_out["val"]


def test_bundled_names_are_seen_or_new_as_their_splits_say(bundled):
    trained = {icon["name"] for icon in bundled if (icon["set_split"], icon["split"]) == ("train", "train")}
    keys = {key_of(name) for name in trained}
    for icon in bundled:
        if icon["split"] == "train":
            assert icon["name"] in trained
        else:
            assert key_of(icon["name"]) not in keys
    by_set = {split: {i["set"] for i in bundled if i["set_split"] == split} for split in ("train", "val", "test")}
    assert sum(map(len, by_set.values())) == len(set().union(*by_set.values()))
    assert len(by_set["test"]) == 8
    assert len({icon["set"] for icon in bundled if icon["color"] and icon["set_split"] == "test"}) == 3


def test_bundled_data_has_its_checksums_and_notices(bundled):
    sums = dict(line.split()[::-1] for line in (DEMO / "SHA256SUMS").read_text().splitlines())
    assert sums == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in DEMO.glob("*.parquet")}
    notice = (DEMO / "NOTICE-icons").read_text()
    for name, number in Counter(icon["set"] for icon in bundled).items():
        assert f"\n- {name}: " in notice
        assert f" {number} icons.\n" in notice
    for license in {icon["license"] for icon in bundled}:
        assert (DEMO / "LICENSES" / f"icons-{license}.txt").exists()
