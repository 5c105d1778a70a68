"""Folders in CLIP_benchmark's WebDataset layout, which its own builder reads.

The builder decodes whatever it finds in a tar, pickles included, and Pillow starts other programs for some formats. So
`batches` gives it only the picture and the label of each example, after checking both.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import webdataset
from clip_benchmark.datasets.builder import build_wds_dataset
from torch.utils.data import DataLoader

from openimp.common.errors import UserError, counted
from openimp.common.modality import BadMedia
from openimp.common.safe_files import read_text, refuse_links
from openimp.data.tars import DAMAGE, members

SPLIT = "test"
LABELS = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
"""Extension of the label, by the type in dataset_type.txt."""
PICTURES = ("webp", "png", "jpg", "jpeg")
COMPRESSED = (b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ", b"]\0\0\x80", b"(\xb5/\xfd")
"""First bytes of files that webdataset unpacks."""
UNREADABLE = re.compile(r"[{}$#?]|::")
"""Characters that webdataset expands or cuts off in a path."""


@dataclass(frozen=True)
class ClipFolder:
    """A checked folder."""

    name: str  # as the user gave it
    path: Path
    kind: str  # a key of `LABELS`
    classes: list[str] = field(default_factory=list)  # none for retrieval
    templates: list[str] = field(default_factory=list)


def open_folder(name: str) -> ClipFolder:
    """Checks a local folder, or OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face Hub, whose test split is
    downloaded unless it is cached."""
    path = Path(name).resolve() if Path(name).is_dir() else _download(name)
    if found := UNREADABLE.search(str(path)):
        raise UserError(f"{path}: CLIP_benchmark cannot read a path with {found[0]!r}; rename the folder")
    refuse_links(path, ("*", f"{SPLIT}/*"))
    count, tars = _read(path, f"{SPLIT}/nshards.txt").strip(), {file.name for file in (path / SPLIT).glob("*.tar")}
    shards = int(count) if re.fullmatch("[1-9][0-9]{0,8}", count) else 0
    if not 0 < shards <= len(tars) or not all(f"{i}.tar" in tars for i in range(shards)):
        raise UserError(f"{path}: {SPLIT}/nshards.txt says {count[:20]!r}, but {SPLIT} has {counted(len(tars), 'tar')}")
    for i in range(shards):
        _check_tar(path / SPLIT / f"{i}.tar")
    kind = _read(path, "dataset_type.txt").strip().lower() if (path / "dataset_type.txt").exists() else "classification"
    if kind not in LABELS:
        raise UserError(f"{path}: dataset_type.txt: expected {', '.join(LABELS)}, found {kind[:20]!r}")
    if kind == "retrieval":
        return ClipFolder(name, path, kind)
    classes = _lines(path, "classnames.txt")
    templates = _lines(path, "zeroshot_classification_templates.txt")
    for template in templates:
        if not _is_template(template):
            where = f"{path}: zeroshot_classification_templates.txt"
            raise UserError(f"{where}: {template[:80]!r} needs {{c}} where the class goes, and no other braces")
    return ClipFolder(name, path, kind, classes, templates)


def _download(name: str) -> Path:
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if match is None:
        raise UserError(f"{name}: no such folder; a data set on the Hugging Face Hub is named OWNER/NAME")
    from huggingface_hub import snapshot_download

    wanted = ["*.txt", f"{SPLIT}/*.txt", f"{SPLIT}/*.tar"]
    try:
        return Path(snapshot_download(match[1], repo_type="dataset", revision=match[2], allow_patterns=wanted))
    except Exception as error:  # huggingface_hub raises its own errors, httpx's, or OSError.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0].removeprefix("Got: ")
        raise UserError(
            f"{name}: there is no local folder of this name, and the Hugging Face Hub did not provide it: {reason}"
        ) from None


def _check_tar(file: Path) -> None:
    """Refuses a tar that could make webdataset allocate more than its size: a compressed one, or sparse members."""
    try:
        with file.open("rb") as stream:
            if stream.peek(6).startswith(COMPRESSED):
                raise ValueError("it is compressed")
            for _, refused in members(stream):
                if refused:
                    raise ValueError(refused.reason)
    except DAMAGE as error:
        raise UserError(f"{file}: not a tar that is read: {error}") from None


def _read(path: Path, file: str) -> str:
    try:
        return read_text(path / file)
    except FileNotFoundError:
        raise UserError(f"{path}: {file} is missing") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: {file} is not a text in UTF-8") from None


def _lines(path: Path, file: str) -> list[str]:
    """The lines as the builder reads them."""
    lines = [line.strip() for line in _read(path, file).splitlines()]
    if not lines:
        raise UserError(f"{path}: {file} is empty")
    return lines


def _is_template(template: str) -> bool:
    """Whether `template.format(c=...)` fills in nothing else, and no width, which could fill the memory."""
    try:
        fields = [field for _, *field in Formatter().parse(template) if field[0] is not None]
    except ValueError:
        return False
    return bool(fields) and all(field == ["c", "", None] for field in fields)


def batches(
    folder: ClipFolder, transform: Callable[[Any], Any], check_picture: Callable[[bytes], None], batch_size: int
) -> tuple[DataLoader[Any], "Reader"]:
    """A loader of pairs of pictures (B, 3, H, W) and labels: (B,) classes, (B, classes) or lists of captions.

    `transform` makes tensors of Pillow pictures; `check_picture` raises BadMedia for bytes that Pillow must not decode.
    """
    reader = Reader(folder, check_picture)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "WebDataset.shardshuffle")  # The builder leaves the order to the default.
        dataset = build_wds_dataset(folder.name, transform, SPLIT, str(folder.path))
    # The builder's last three stages decode an example, make a tuple of it, and transform that.
    dataset.pipeline.insert(-3, webdataset.map(reader.check))
    return DataLoader(dataset.batched(batch_size), batch_size=None), reader


class Reader:
    """Checks examples before they are decoded, and counts and hashes them."""

    def __init__(self, folder: ClipFolder, check_picture: Callable[[bytes], None]) -> None:
        self.folder, self.check_picture = folder, check_picture
        self.pictures = self.captions = 0
        self._digest = hashlib.sha256()

    @property
    def data_hash(self) -> str:
        """A hash of the pictures and labels that were read, in order."""
        return self._digest.hexdigest()[:16]

    def check(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Returns only the picture and the label of an example, both undecoded. If one is bad, that is a UserError."""
        where = f"{self.folder.path}: {Path(sample['__url__']).name}[{sample['__key__']}]"
        label = LABELS[self.folder.kind]
        picture = next((extension for extension in PICTURES if extension in sample), "")
        if not picture or label not in sample:
            raise UserError(f"{where}: expected a picture (.{', .'.join(PICTURES)}) and a .{label}")
        try:
            self.check_picture(sample[picture])
            self._check_label(sample[label])
        except (BadMedia, ValueError) as error:
            raise UserError(f"{where}: {error}") from None
        self.pictures += 1
        for data in (sample[picture], sample[label]):
            self._digest.update(len(data).to_bytes(8) + data)
        return {key: sample[key] for key in ("__key__", "__url__", picture, label)}

    def _check_label(self, data: bytes) -> None:
        if self.folder.kind == "retrieval":
            captions = data.decode().splitlines()
            if not captions:
                raise ValueError("its .txt has no caption")
            self.captions += len(captions)
        elif self.folder.kind == "multilabel":
            stream = io.BytesIO(data)
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            if shape != (len(self.folder.classes),) or dtype.kind not in "biuf":
                raise ValueError(f"its .npy has the shape {shape} and the type {dtype}; expected a number per class")
        elif not 0 <= int(data) < len(self.folder.classes):
            raise ValueError("its .cls is the number of no line in classnames.txt")
