"""Documentation of the icons: NOTICE and license texts, the data card's numbers, and the contact sheet."""

import io
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from tools.demo_data_docs import markdown, replace_counts
from tools.icon_names import digest
from tools.icon_sets import PACKAGE, SHA256, VERSION, set_split

SPLITS = ["train", "val", "test"]
NOTICE = f"""\
icons.parquet is made from the icon sets below, whose makers do not endorse it. They come from the npm package
{PACKAGE} {VERSION} (sha256 {SHA256}).
License texts: LICENSES/icons-*.txt. Changed in all sets: icons selected, their names shortened to words of their
content, rendered to 32 x 32 pixels on white (black if the icon has no colors of its own), compressed as WebP.

"""
SHOWN_SETS = [
    "lucide", "material-symbols", "fa7-solid", "game-icons", "tabler", "hugeicons", "streamline-pixel", "fluent-color",
    "streamline-plump-color", "streamline-freehand-color", "picon", "at-icons", "dinkie-icons", "glyphs-poly",
    "icon-park", "marketeq",
]  # fmt: skip
SHOWN_ICONS = 12


def write_notice(
    path: Path, licenses: Path, rows: list[dict[str, Any]], about: dict[str, dict[str, Any]], texts: Path
) -> None:
    """Writes a line per set, and copies the license texts that are needed."""
    counts, lines = Counter(row["set"] for row in rows), []
    for name, number in sorted(counts.items()):
        title, author, license = about[name]["name"], about[name]["author"], about[name]["license"]
        source, terms = (f", {entry['url']}" if entry.get("url") else "" for entry in (author, license))
        made = f"{title} by {author['name']}{source}"
        lines.append(f"- {name}: {made}. {license['title']} ({license['spdx']}){terms}. {number} icons.\n")
    path.write_text(NOTICE + "".join(lines))
    licenses.mkdir(exist_ok=True)
    for spdx in sorted({row["license"] for row in rows}):
        file = licenses / f"icons-{spdx}.txt"
        if not file.exists():
            shutil.copyfile(texts / file.name, file)


def counts(corpus: Path, bundled: Path) -> Iterator[str]:
    """Yields the tables of the card's numbers."""
    columns = ["name", "set", "license", "color", "split", "set_split"]
    tables = {
        "all": pq.read_table(corpus / "icons.parquet", columns=columns).to_pylist(),
        "bundled": pq.read_table(bundled / "icons.parquet", columns=columns).to_pylist(),
    }
    groups = [(s, n) for s in SPLITS for n in SPLITS]
    head = ["set_split", "split of the name"] + [f"{what}, {k}" for k in tables for what in ("icons", "names")]
    lines: list[list[Any]] = []
    for group in groups:
        line: list[Any] = list(group)
        for rows in tables.values():
            of = [row["name"] for row in rows if (row["set_split"], row["split"]) == group]
            line += [len(of), len(set(of))]
        lines.append(line)
    total: list[Any] = ["all", ""]
    for rows in tables.values():
        total += [len(rows), len({row["name"] for row in rows})]
    yield markdown(head, [*lines, total])
    sizes = [(corpus / "icons.parquet").stat().st_size, (bundled / "icons.parquet").stat().st_size]
    of_sets = len({row["set"] for row in tables["all"]})
    colored = [sum(row["color"] for row in rows) for rows in tables.values()]
    color_sets = len({row["set"] for row in tables["all"] if row["color"]})
    yield (
        f"All icons have {sizes[0] / 1e6:.1f} MB, the bundled ones {sizes[1] / 1e6:.1f} MB. Of the {of_sets} sets, "
        f"{color_sets} are in color: {colored[0]:,} icons, of which {colored[1]:,} are bundled.\n"
    )
    per = Counter(row["name"] for row in tables["all"])
    yield (
        f"Of the {len(per):,} names, {sum(n == 1 for n in per.values()):,} have one icon and "
        f'{sum(n >= 10 for n in per.values()):,} have ten or more; the most frequent is "{per.most_common(1)[0][0]}" '
        f"({per.most_common(1)[0][1]} icons).\n"
    )


def write_card(corpus: Path, bundled: Path, card: Path) -> None:
    """Replaces the numbers between the card's two `counts` markers."""
    replace_counts(card, "\n".join(counts(corpus, bundled)))


def write_contact_sheet(corpus: Path, path: Path) -> None:
    """Draws some sets, a row each: icons that a hash chooses, with their names. The held-out sets are the last rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = pq.read_table(corpus, filters=[("set", "in", SHOWN_SETS)]).to_pylist()
    figure, axes = plt.subplots(len(SHOWN_SETS), SHOWN_ICONS, figsize=(14, 17), layout="constrained")
    for name, line in zip(SHOWN_SETS, axes, strict=True):
        of = sorted((row for row in rows if row["set"] == name), key=lambda row: digest(row["name"]))
        of = [row for row in of if max(map(len, row["name"].split())) <= 12 and len(row["name"]) <= 22]
        line[0].text(-0.25, 0.5, f"{name}\n({set_split(name)})", transform=line[0].transAxes, ha="right", va="center")
        for row, axis in zip(of, line, strict=False):
            axis.imshow(Image.open(io.BytesIO(row["image"])), interpolation="nearest")
            axis.set_title("\n".join(wrap(row["name"], 13)), fontsize=8.5, y=-0.06, pad=0, va="top")
            axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)
