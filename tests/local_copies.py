"""Small made data in the layouts of local copies of CIFAR-10 and of the Free Spoken Digit Dataset."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.little import png
from tests.recordings import sound_file

PHOTOS = ["airplane", "automobile", "bird"]
DIGITS = ["zero", "one", "two"]
SPEAKERS = ["george", "theo"]


def picture(number: int) -> dict[str, bytes | None]:
    return {"bytes": png(number), "path": None}


def sound(number: int) -> dict[str, bytes | None]:
    return {"bytes": sound_file(0.3 * np.sin(np.arange(4000) * 0.05 * (1 + number % 3)), 8000), "path": None}


def write(folder: Path) -> None:
    """Writes cifar10-train.parquet, cifar10-test.parquet and fsdd.parquet."""
    for split, rows in (("train", 24), ("test", 12)):
        photos = {
            "img": [picture(i) for i in range(rows)],
            "label": [i % 3 for i in range(rows)],
            "name": [PHOTOS[i % 3] for i in range(rows)],
        }
        pq.write_table(pa.table(photos), folder / f"cifar10-{split}.parquet")
    digits = {
        "audio": [sound(i) for i in range(36)],
        "name": [DIGITS[i % 3] for i in range(36)],
        "speaker": [SPEAKERS[i // 3 % 2] for i in range(36)],
        "split": ["train"] * 24 + ["test"] * 12,
    }
    pq.write_table(pa.table(digits), folder / "fsdd.parquet")
