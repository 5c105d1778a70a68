"""Splits of the icons by name and by set, and the subset that is bundled."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from math import sqrt
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tools.icon_names import digest

TEST, VAL = 0.08, 0.02

BUNDLED_BYTES = 11_250_000
"""Of pictures, so that they and the rest of the bundled icons are at most 12 MB."""
BUNDLED_ROWS = {
    ("train", "test"): 2000, ("test", "train"): 2000, ("test", "test"): 2000,
    ("train", "val"): 500, ("val", "train"): 500, ("val", "val"): 500,
}  # fmt: skip
"""Rows of evaluation in the bundled subset, by (set_split, split)."""

MIN_SETS = 8
"""Number of sets for training that must have a name for the demo to use it."""

Row = dict[str, Any]


def key_of(text: str) -> str:
    """Returns the words of a name in a fixed order: "arrow left" and "Left-Arrow" have the same key."""
    return " ".join(sorted(set(re.findall(r"[^\W_]+", re.sub("['’]", "", text.lower())))))


def held_out_keys(demo: Path) -> dict[str, str]:
    """Returns {key: split} of the names, concepts and captions of the bundled emoji that are held out."""
    columns, keys = ["name", "concept", "captions", "split"], {}
    tables = [pq.read_table(demo / f"{file}.parquet", columns=columns) for file in ("stills", "clips")]
    rows = [row for table in tables for row in table.to_pylist() if row["split"] != "train"]
    for row in sorted(rows, key=lambda row: row["split"], reverse=True):  # A key of both val and test is test.
        keys |= {key_of(text): row["split"] for text in (row["name"], row["concept"], *row["captions"])}
    return keys


def split_of(key: str, held_out: dict[str, str]) -> str:
    """Returns the split of a name: that of the emoji with the same key if it is held out, else by hash."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return held_out.get(key) or ("test" if place < TEST else "val" if place < TEST + VAL else "train")


def add_splits(rows: list[Row], held_out: dict[str, str]) -> None:
    """Adds the split of each row's name. A name that only held-out sets have is never trained on: it is not `train`."""
    set_splits = defaultdict(set)
    for row in rows:
        set_splits[key_of(row["name"])].add(row["set_split"])
    for row in rows:
        key = key_of(row["name"])
        row["split"] = split_of(key, held_out)
        if row["split"] == "train" and "train" not in set_splits[key]:
            row["split"] = "test" if "test" in set_splits[key] else "val"


def mark_demo(rows: list[Row], held_out: Iterable[str]) -> None:
    """Adds whether the demo may use a row: at least `MIN_SETS` sets for training have its name, and the name is not
    related to a held-out emoji.

    A name is related if it contains all words of one of the keys `held_out` ("shield off" and "shield"), or has the
    same letters ("lightbulb" and "bulb light"). An s at the end of a word does not count.
    """
    keys = [words_of(key) for key in held_out]
    letters = {"".join(sorted("".join(key))) for key in keys}
    sets = defaultdict(set)
    for row in rows:
        if row["set_split"] == "train":
            sets[row["name"]].add(row["set"])
    wanted = set()
    for name in (name for name, of in sets.items() if len(of) >= MIN_SETS):
        words = words_of(name)
        if "".join(sorted("".join(words))) not in letters and not any(key <= words for key in keys):
            wanted.add(name)
    for row in rows:
        row["demo"] = row["name"] in wanted


def words_of(text: str) -> set[str]:
    """The words of a name, without an s at their end."""
    return {word.removesuffix("s") or word for word in key_of(text).split()}


def one_per_name(rows: list[Row]) -> Iterator[Row]:
    """Yields one row per name. The sets take turns."""
    waiting, taken = defaultdict(list), set()
    for row in sorted(rows, key=lambda row: digest(row["name"]), reverse=True):
        waiting[row["set"]].append(row)
    while waiting:
        for name in sorted(waiting):
            while waiting[name] and waiting[name][-1]["name"] in taken:
                waiting[name].pop()
            if waiting[name]:
                row = waiting[name].pop()
                taken.add(row["name"])
                yield row
            else:
                del waiting[name]


def varied(rows: list[Row]) -> Iterator[Row]:
    """Yields the rows in an order whose every beginning has about sqrt(n) rows of a name with n rows.

    Of the rows of a name, the next is that of the set with the fewest rows so far.
    """
    by_name, taken = defaultdict(list), Counter()
    for row in rows:
        by_name[row["name"]].append(row)
    turns = (
        (i / sqrt(len(of)), digest(name, str(i)), name) for name, of in by_name.items() for i in range(1, len(of) + 1)
    )
    for _, _, name in sorted(turns):
        row = min(by_name[name], key=lambda row: (taken[row["set"]], row["set"]))
        by_name[name].remove(row)
        taken[row["set"]] += 1
        yield row


def choose(rows: list[Row]) -> list[Row]:
    """Returns the rows to bundle, in order: some of each held-out group, and as many for training as fit."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["set_split"], row["split"]].append(row)
    # A name that two sets for training have is among the first that are chosen below, so it is seen.
    counts = Counter(row["name"] for row in groups["train", "train"])
    chosen = []
    for group, number in BUNDLED_ROWS.items():
        of = [row for row in groups[group] if group[1] != "train" or counts[row["name"]] >= 2]
        chosen += [row for row, _ in zip(one_per_name(of), range(number))]
    left = BUNDLED_BYTES - sum(len(row["image"]) for row in chosen)
    for row in varied(groups["train", "train"]):
        if (left := left - len(row["image"])) < 0:
            break
        chosen.append(row)
    return sorted(chosen, key=lambda row: (row["set"], row["name"]))
