"""Writes the results of a run of recipes/demo.yaml and of openimp:base into README.md, and draws the demo's picture.

    .venv/bin/python -m tools.write_results runs/demo

The picture needs matplotlib (`pip install openimp[plots]`). It shows unseen test items that are evenly spaced in the
data and not selected by result.
"""

import argparse
import io
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image

import openimp
from openimp.common.json_lines import read_lines
from openimp.data.sources import open_source
from openimp.data.tables import Table
from openimp.data.templates import fill
from openimp.inference.model import Model
from openimp.modalities.audio import log_mel

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- results: written by tools/write_results.py -->", "<!-- end of results -->"
TITLES = {
    "unseen_concept": "still of an unseen concept by a seen artist",
    "unseen_concept_and_artist": "still of an unseen concept by an unseen artist",
    "unseen_artist": "still of a seen concept by an unseen artist",
    "unseen_icon_set": "icon from an unseen set, of a seen name",
    "clips": "clip of an unseen concept",
    "notes": "unseen note of a seen instrument",
}
SHOWN = 6
"""Number of items of each kind in the picture."""


def last_results(run: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last results of a run, by set and by what is searched."""
    lines = read_lines(run / "results.jsonl")
    last = max(line["step"] for line in lines)
    return by_set_and_target([line for line in lines if line["step"] == last])


def by_set_and_target(results: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(result["set"], result["task"].split(" -> ")[-1]): result for result in results}


def with_interval(result: dict[str, Any]) -> str:
    """R@1 and its interval."""
    low, high = result["interval"]
    return f"{result['r1']:.1%} ({low:.1%} to {high:.1%})"


def write_table(run: Path, readme: Path) -> None:
    """Writes the last results of the demo, and what openimp:base reaches, between the markers."""
    results = last_results(run)
    of_base = by_set_and_target(openimp.evaluate("openimp:base", sets=TITLES))
    rows = [
        "| test | queries | candidate texts | chance R@1 | demo: R@1 | demo: R@5 | demo: median rank "
        "| `openimp:base`: R@1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        found = results[name, "text"]
        rows.append(
            f"| {title} | {found['n']} | {found['candidates']} | {found['chance']:.2%} | {with_interval(found)} "
            f"| {found['r5']:.1%} | {found['median_rank']:g} | {with_interval(of_base[name, 'text'])} |"
        )
    spent = read_lines(run / "metrics.jsonl")
    seconds = sum(line["seconds"] for line in spent)
    wait = sum(line["seconds"] * line["data_wait"] for line in spent) / seconds
    flops = sum(units["flops"] for units in spent[-1]["totals"].values())
    rows += [
        "",
        f"Demo: {found['step']:,} steps, {flops / 1e12:.1f} trillion FLOPs; training took {seconds:.0f} s "
        f"({wait:.1%} waiting for data); seed {openimp.Recipe.load(run / 'recipe.yaml').seed}, "
        f"{torch.get_num_threads()} threads, torch {version('torch')}, Python {platform.python_version()}, "
        f"openimp {found['openimp']}.",
    ]
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{START}\n" + "\n".join(rows) + f"\n{END}{after}", encoding="utf-8")


def write_picture(run: Path, file: Path) -> None:
    """Draws test items with their names above, and below the three texts of the set that the model ranks first."""
    model = openimp.load(run)
    kinds = ["unseen_artist", "clips", "notes"]
    figure, axes = plt.subplots(len(kinds), SHOWN, figsize=(11, 7.8), facecolor="white")
    for row, name in zip(axes, kinds):
        options = model.recipe.evaluation.sets[name]
        table = open_source(name, model.recipe.sources[options.source])
        assert isinstance(table, Table)
        _show_set(row, model, table, options)
    titles = ["stills of seen\nconcepts by an\nunseen artist", "clips of unseen\nconcepts", "unseen notes"]
    for row, title in zip(axes, titles):
        row[0].set_ylabel(title, fontsize=10, labelpad=14)
    figure.tight_layout(h_pad=3)
    figure.savefig(file, dpi=110)


def _show_set(row: list[Axes], model: Model, table: Table, options: Any) -> None:
    (name, spec), (reader, text) = options.inputs.items()
    rows = table.rows(list(range(len(table))))
    chosen = [rows[i] for i in np.linspace(0, len(rows) - 1, SHOWN).round().astype(int)]
    texts = [fill(text.columns, item, None) for item in rows]
    named = dict(zip(texts, (item.get("name") or item["instrument"] for item in rows)))
    vectors = model.encode(reader, list(named), towards=name, normalize=True)
    media = [item[spec.columns[0]] for item in chosen]
    closest = (model.encode(name, media, towards=reader, normalize=True) @ vectors.T).topk(3).indices
    for axis, item, value, best in zip(row, chosen, media, closest.tolist()):
        _show_item(axis, value, model)
        right = item.get("name") or item["instrument"]
        axis.set_title(right if len(right) < 26 else right[:24] + "…", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        for line, index in enumerate(best):
            guess = named[list(named)[index]]
            hit = guess == right
            axis.text(
                0.5, -0.07 - 0.13 * line, guess if len(guess) < 26 else guess[:24] + "…", transform=axis.transAxes,
                ha="center", va="top", fontsize=8, color="#12702a" if hit else "#555", weight="bold" if hit else None,
            )  # fmt: skip


def _show_item(axis: Axes, value: bytes, model: Model) -> None:
    if value[:4] == b"OggS":
        audio = model.modalities["audio"]
        wave = torch.from_numpy(audio.encode_input(value, model.views["audio"])).float()
        axis.imshow(log_mel(wave[:1], audio.config)[0].T, origin="lower", aspect="auto", cmap="magma")
        return
    with Image.open(io.BytesIO(value)) as picture:
        picture.seek(getattr(picture, "n_frames", 1) // 2)
        plain = Image.new("RGBA", picture.size, "white")
        plain.alpha_composite(picture.convert("RGBA"))
        axis.imshow(plain.convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    write_table(run, ROOT / "README.md")
    write_picture(run, ROOT / "docs/images/demo-results.png")


if __name__ == "__main__":
    main()
