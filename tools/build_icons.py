"""Builds a corpus of icons with names from the icon sets of the npm package @iconify/json.

    python -m tools.build_icons OUT                     # download, verify, build OUT/icons.parquet and OUT/NOTICE
    python -m tools.build_icons OUT --package PACKAGE   # the same from a .tgz that you have
    python -m tools.build_icons OUT --bundle --card --contact-sheet   # for maintainers, from OUT/icons.parquet

It takes about three minutes on one core. Besides openimp's dependencies it needs resvg_py (`pip install resvg_py`), and
npm for the download (104 MB). A second run writes the same bytes, but other releases of the libraries may not. The
bundled file comes from resvg_py 0.5.0, Pillow 13.0.0 and pyarrow 26.0.1. docs/icons-card.md describes the corpus.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from openimp.common.progress import track
from tools.demo_data_docs import write_sums
from tools.icon_docs import write_card, write_contact_sheet, write_notice
from tools.icon_names import named_icons
from tools.icon_sets import fetch, read_about, read_sets, set_split
from tools.icon_splits import add_splits, choose, held_out_keys, mark_demo

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "src/openimp/data/demo"
SIZE = 32
TEXT = ("name", "set", "license", "split", "set_split")
FLAGS = ("color", "demo")
SCHEMA = pa.schema([
    ("image", pa.binary()), *((column, pa.bool_()) for column in FLAGS), *((column, pa.string()) for column in TEXT)
])  # fmt: skip


def render(icon: dict[str, Any]) -> np.ndarray:
    """Returns the picture (SIZE, SIZE, 3) of an icon, its longer side as long as the picture's, black on white."""
    import resvg_py  # --bundle and the others do without.

    left, top, width, height = icon.get("left", 0), icon.get("top", 0), icon["width"], icon["height"]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="black" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    side = {"width" if width >= height else "height": SIZE}
    png = resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True, **side)
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2))
    return np.asarray(square)


def webp(pixels: np.ndarray) -> bytes:
    """Returns a lossless WebP file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", lossless=True, method=6)
    return out.getvalue()


def icon_rows(package: Path) -> list[dict[str, Any]]:
    """Returns the rows of all sets, sorted by set and name, without blank pictures and repeated ones.

    Of equal pictures in several sets, one of a set for training is kept.
    """
    sets, rows, seen = read_sets(package), [], set()
    makers = {name: about["author"]["name"] for name, (about, _) in sets.items()}
    shared = {makers[name] for name in sets if set_split(name) == "train"}
    if leaked := sorted(name for name in sets if set_split(name) != "train" and makers[name] in shared):
        raise SystemExit(f"held-out sets whose makers have sets for training: {', '.join(leaked)}")
    for name in track(sorted(sets, key=lambda name: (set_split(name) != "train", name)), "rendering sets"):
        about, data = sets[name]
        for icon_name, icon in named_icons(data):
            pixels = render(icon)
            if np.ptp(pixels) == 0 or pixels.tobytes() in seen:
                continue
            seen.add(pixels.tobytes())
            rows.append({
                "image": webp(pixels), "color": bool(about.get("palette")), "name": icon_name, "set": name,
                "license": about["license"]["spdx"], "set_split": set_split(name),
            })  # fmt: skip
    return sorted(rows, key=lambda row: (row["set"], row["name"]))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows in order. Only text is compressed, because pictures already are."""
    pq.write_table(
        pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=2048, use_dictionary=list(TEXT),
        write_statistics=list(TEXT), compression={"image": "none"} | dict.fromkeys((*FLAGS, *TEXT), "zstd"),
    )  # fmt: skip


def build(package: Path, out: Path) -> None:
    """Builds the corpus and its NOTICE."""
    rows = icon_rows(package)
    held_out = held_out_keys(DEMO)
    add_splits(rows, held_out)
    mark_demo(rows, held_out)
    write_parquet(out / "icons.parquet", rows)
    write_notice(out / "NOTICE", out / "LICENSES", rows, read_about(package), DEMO / "LICENSES")
    print(f"{out / 'icons.parquet'}: {len(rows):,} icons, {len({row['name'] for row in rows}):,} names")


def bundle(package: Path, out: Path) -> None:
    """Writes a subset into the bundled demo data."""
    rows = choose(pq.read_table(out / "icons.parquet").to_pylist())
    write_parquet(DEMO / "icons.parquet", rows)
    write_notice(DEMO / "NOTICE-icons", DEMO / "LICENSES", rows, read_about(package), DEMO / "LICENSES")
    write_sums(DEMO)


def main() -> None:
    """Builds the corpus, or what the options ask for from the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the corpus")
    parser.add_argument("--package", type=Path, help=".tgz of the package: do not download it")
    parser.add_argument("--bundle", action="store_true", help="write the subset into src/openimp/data/demo")
    parser.add_argument("--card", action="store_true", help="refresh the numbers in docs/icons-card.md")
    parser.add_argument("--contact-sheet", action="store_true", help="redraw docs/images/icons.png")
    args = parser.parse_args()
    out = args.out.resolve()
    asked = args.bundle or args.card or args.contact_sheet
    out.mkdir(parents=True, exist_ok=True)
    if not asked:
        build(args.package or fetch(out), out)
    elif not (out / "icons.parquet").exists():
        parser.error(f"{out} has no icons.parquet: run without options first")
    if args.bundle:
        bundle(args.package or fetch(out), out)
    if args.card:
        write_card(out, DEMO, ROOT / "docs/icons-card.md")
    if args.contact_sheet:
        write_contact_sheet(out / "icons.parquet", ROOT / "docs/images/icons.png")


if __name__ == "__main__":
    main()
