"""The bundled icons are split, and their sources named, as docs/icons-card.md says."""

import hashlib
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tools.icon_splits import MIN_SETS, held_out_keys, key_of, mark_demo

DEMO = Path(__file__).resolve().parents[2] / "src" / "openimp" / "data" / "demo"


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
