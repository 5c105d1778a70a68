"""Documentation of the demo data: license texts and NOTICE, the data card's numbers, and the contact sheet.

build_demo_data.py calls it. The card and the sheet are made from the built Parquet files only.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch
from PIL import Image, ImageSequence

from openimp.common.safe_files import sha256
from openimp.modalities.audio import Audio, log_mel

NOTICE = """\
openimp's demo data is made from the works below, whose makers do not endorse it. License texts: LICENSES/.

stills.parquet
- Noto Emoji: Copyright Google LLC and contributors, https://github.com/googlefonts/noto-emoji, Apache License 2.0
  (noto-emoji.txt). Changed: recompressed from PNG to WebP.
- Twemoji: Copyright Twitter, Inc and other contributors, https://github.com/jdecked/twemoji, Creative Commons
  Attribution 4.0 (twemoji.txt). Changed: recompressed from PNG to WebP.
- Both come from the PNG files of emoji-data, Copyright (c) 2013 Cal Henderson, https://github.com/iamcal/emoji-data,
  whose own data (Unicode names, used as captions) is under the MIT License (emoji-data.txt).
- Fluent Emoji: Copyright (c) Microsoft Corporation, https://github.com/microsoft/fluentui-emoji, MIT License, packed
  by LobeHub, https://github.com/lobehub/fluent-emoji (fluent-emoji.txt). Changed: resized from 256 to 64 pixels,
  recompressed.
clips.parquet
- Animated Fluent Emoji: makers and license as above. Changed: cut to 8 frames, resized from 256 to 64 pixels,
  recompressed.
names, keywords, captions and groups in both
- emojibase, Copyright (c) 2017-2019 Miles Johnson, https://github.com/milesj/emojibase, MIT License (emojibase.txt).
  Changed: selected, shortcodes turned into plain words.
notes.parquet
- MuseScore_General SoundFont, Copyright (c) 2018-2021 S. Christian Collins, from Fluid (R3) GM by Frank Wen, its mono
  version by Michael Cowgill, and others named in musescore-general.txt; MIT License, parts CC0 or public domain.
  Changed: single notes rendered with FluidSynth, cut to 2 seconds, levelled, resampled to 16 kHz, compressed.

icons.parquet
- Icons of many sets. NOTICE-icons lists their authors and licenses.

Packages (name, version, license of the part used, sha256 of the archive):
"""


def write_licenses(demo: Path, sources: dict[str, list[str]], read: Callable[[str, str], str]) -> None:
    """Writes LICENSES/ and NOTICE. `read` returns the first file of a package whose path matches a pattern.

    The Fluent packages name the MIT License without its text, so the common text with their copyright holders is used.
    """
    common = Path("/usr/share/common-licenses")
    mit = read("emojibase-data", "LICENSE$")
    holders = "Copyright (c) Microsoft Corporation.\nCopyright (c) 2023 LobeHub"
    texts = {
        "noto-emoji": (common / "Apache-2.0").read_text(),
        "twemoji": (common / "CC-BY-4.0").read_text(),
        "emoji-data": read("emoji-datasource-google", "LICENSE$"),
        "emojibase": mit,
        "fluent-emoji": re.sub(r"Copyright \(c\).*", holders, mit, count=1),
        "musescore-general": read("musescore-general-soundfont-small", "/copyright$"),
    }
    (demo / "LICENSES").mkdir(exist_ok=True)
    for name, text in texts.items():
        (demo / f"LICENSES/{name}.txt").write_text(text)
    (demo / "NOTICE").write_text(NOTICE + "".join(f"  {name} {' '.join(rest)}\n" for name, rest in sources.items()))


def write_sums(demo: Path) -> None:
    """Writes SHA256SUMS of all Parquet files of the folder."""
    lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(demo.glob("*.parquet"))]
    (demo / "SHA256SUMS").write_text("".join(lines))


def markdown(head: list[str], rows: list[list[Any]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    cells = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def counts(demo: Path) -> Iterator[str]:
    """Yields the tables and sentences of the card's numbers."""
    tables = {name: pq.read_table(demo / f"{name}.parquet").to_pylist() for name in ("stills", "clips", "notes")}
    splits = ["train", "val", "test"]

    def row(title: str, rows: list[dict[str, Any]]) -> list[Any]:
        by_split = Counter(r["split"] for r in rows)
        return [title, *(by_split[s] for s in splits), len(rows)]

    stills, clips, notes = tables.values()
    emoji = list({r["emoji"]: r for r in stills}.values())
    families = list({r["concept"]: r for r in emoji}.values())
    vendors = [row(f"stills, {v}", [r for r in stills if r["vendor"] == v]) for v in ("noto", "fluent", "twemoji")]
    lines = [*vendors, row("clips", clips), row("notes", notes), row("emoji", emoji), row("concept families", families)]
    yield markdown(["", *splits, "all"], lines)

    captions = Counter(c for r in emoji for c in set(r["captions"]))
    shared = [r for r in emoji if any(captions[c] > 1 for c in r["captions"])]
    names = Counter(r["name"].lower() for r in emoji)
    trained = {c for r in emoji if r["split"] == "train" for c in r["captions"]}
    leaked = [r for r in emoji if r["split"] == "test" and trained.intersection(r["captions"])]
    per = Counter(r["instrument"] for r in notes)
    untested = set(per) - {r["instrument"] for r in notes if r["split"] == "test"}
    seconds = sorted(soundfile.info(io.BytesIO(r["audio"])).duration for r in notes)
    yield (
        f"- Emoji: {np.mean([len(r['captions']) for r in emoji]):.1f} captions and "
        f"{np.mean([len(r['keywords']) for r in emoji]):.1f} keywords on average. "
        f"{sum(n for n in names.values() if n > 1)} share their `name` with another emoji, "
        f"{len(shared)} share a caption with one; "
        f"{len(leaked)} test emoji have a caption that some train emoji has as well.\n"
        f"- Notes: {len(per)} instruments of {len({r['family'] for r in notes})} families, "
        f"{min(per.values())} to {max(per.values())} notes each; "
        f"median length {seconds[len(seconds) // 2]:.2f} s, longest {seconds[-1]:.2f} s. "
        f"Instruments without a test note: {', '.join(sorted(untested)) or 'none'}.\n"
    )


def write_card(demo: Path, card: Path) -> None:
    """Replaces the numbers of the card."""
    replace_counts(card, "\n".join(counts(demo)))


def replace_counts(card: Path, numbers: str) -> None:
    """Replaces what is between the card's two `counts` markers."""
    before, start, rest = card.read_text().partition("<!-- counts -->\n")
    _, end, after = rest.partition("<!-- /counts -->")
    if not end:
        raise SystemExit(f"{card} lacks its <!-- counts --> markers")
    card.write_text(before + start + numbers + end + after)


def spectrogram(audio: bytes) -> np.ndarray:
    """Returns the log-mel spectrogram (64 bins, time) of the two seconds of a note, with a frame every 10 ms."""
    modality = Audio(Audio.Config(window=400, hop=160, bins=64, patch=(8, 64)))
    wave = modality.encode_input(audio, Audio.View(seconds=2.0, clips=1))
    return log_mel(torch.from_numpy(wave[:1]), modality.config)[0].T.numpy()


def write_contact_sheet(demo: Path, path: Path) -> None:
    """Draws some concepts (in each row, three stills and the frames of a clip) and some notes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stills, clips, notes = (pq.read_table(demo / f"{n}.parquet").to_pylist() for n in ("stills", "clips", "notes"))
    concepts = ["1F602", "1F996", "1F468-200D-1F373", "1F680", "1F6A2", "1F97A"]
    instruments = ["acoustic grand piano", "violin", "xylophone", "church organ", "trumpet", "helicopter"]
    picture = {(r["emoji"], r["vendor"]): r for r in stills}
    video = {r["emoji"]: r["video"] for r in clips}
    vendors = ("noto", "fluent", "twemoji")

    def white(image: Image.Image) -> Image.Image:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)

    figure = plt.figure(figsize=(13, 10.5), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[6, 2.6])
    above, below = halves
    # An empty narrow column separates stills and frames.
    axes = above.subplots(len(concepts), 12, width_ratios=[1, 1, 1, 0.3] + [1] * 8)
    for axis in axes.flat:
        axis.axis("off")
    for row, emoji in zip(axes, concepts, strict=True):
        first = picture[emoji, "noto"]
        title = f"{first['name']}\n({first['split']})"
        row[0].text(-0.15, 0.5, title, transform=row[0].transAxes, ha="right", va="center")
        images = [Image.open(io.BytesIO(picture[emoji, vendor]["image"])) for vendor in vendors]
        frames = [frame.copy() for frame in ImageSequence.Iterator(Image.open(io.BytesIO(video[emoji])))]
        for axis, image in zip([*row[:3], *row[4:]], [*images, *frames], strict=False):
            axis.imshow(white(image))
    for axis, title in zip([*axes[0, :3], *axes[0, 4:]], [*vendors, *(f"frame {i}" for i in range(8))], strict=True):
        axis.set_title(title, fontsize=10)
    axes = below.subplots(1, len(instruments), sharey=True)
    for axis, instrument in zip(axes, instruments, strict=True):
        of = [r for r in notes if r["instrument"] == instrument]
        note = of[len(of) // 2]
        axis.imshow(spectrogram(note["audio"]), origin="lower", aspect="auto", cmap="magma", extent=(0, 2, 0, 64))
        axis.set_title(f"{instrument}\n{note['note']} ({note['split']})", fontsize=10)
        axis.set_xlabel("seconds")
    axes[0].set_ylabel("mel band")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
