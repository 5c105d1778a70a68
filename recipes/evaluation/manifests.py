"""Converts the published lists of a data set to a manifest of its test rows, for the recipes beside this file.

    python manifests.py ucf101 ucfTrainTestlist > ucf101.jsonl
    python manifests.py hmdb51 testTrainMulti_7030_splits > hmdb51.jsonl
    python manifests.py msrvtt MSRVTT_JSFUSION_test.csv > msrvtt.jsonl
    python manifests.py coco dataset_coco.json > coco.jsonl

It needs only Python's standard library, and opens no media files.
"""

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def ucf101(folder: Path) -> Iterator[Row]:
    """Reads testlist01.txt to testlist03.txt, with one clip per line: `ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi`."""
    lists = {split: (folder / f"testlist0{split}.txt").read_text(encoding="utf-8") for split in (1, 2, 3)}
    return in_splits((file, split) for split, text in lists.items() for file in text.split())


def hmdb51(folder: Path) -> Iterator[Row]:
    """Reads one file per class and split, such as brush_hair_test_split1.txt: lines `NAME.avi 2`, with 2 for test."""
    found = []
    for path in sorted(folder.glob("*_test_split[123].txt")):
        label, _, split = path.stem.rpartition("_test_split")
        lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        found += [(f"{label}/{name}", int(split)) for name, part in lines if part == "2"]
    return in_splits(found)


def in_splits(tests: Iterable[tuple[str, int]]) -> Iterator[Row]:
    """One row per file: its class, which is the name of its folder, and the test splits that it is in."""
    splits: dict[str, list[int]] = {}
    for file, split in tests:
        splits.setdefault(file, []).append(split)
    return ({"file": file, "label": file.split("/")[0], "splits": found} for file, found in splits.items())


def msrvtt(file: Path) -> Iterator[Row]:
    """Reads the list of the test set 1k-A, a CSV file with one clip and its caption per line."""
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            yield {"file": f"{row['video_id']}.mp4", "caption": row["sentence"]}


def coco(file: Path) -> Iterator[Row]:
    """Reads Karpathy's list; one row per caption of a test picture."""
    for image in json.loads(file.read_text(encoding="utf-8"))["images"]:
        for sentence in image["sentences"] if image["split"] == "test" else ():
            yield {"file": f"{image['filepath']}/{image['filename']}", "caption": sentence["raw"].strip()}


if __name__ == "__main__":
    makers = {"ucf101": ucf101, "hmdb51": hmdb51, "msrvtt": msrvtt, "coco": coco}
    if len(sys.argv) != 3 or sys.argv[1] not in makers:
        sys.exit(f"usage: python manifests.py {'|'.join(makers)} LISTS > MANIFEST")
    try:
        rows = list(makers[sys.argv[1]](Path(sys.argv[2])))
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"{sys.argv[2]}: cannot be read as the lists of {sys.argv[1]}: {error!r}")
    if not rows:
        sys.exit(f"{sys.argv[2]}: lists no test rows of {sys.argv[1]}")
    for row in rows:
        print(json.dumps(row))
