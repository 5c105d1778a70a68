"""What a study found, as a page of Markdown and pictures; needs matplotlib (`pip install openimp[plots]`)."""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from openimp.common.errors import UserError
from openimp.common.versions import processor
from openimp.study.outcome import Outcome
from openimp.study.schema import Study

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    raise UserError("studies draw with matplotlib, which is not installed: pip install 'openimp[plots]'") from None

INK, MUTED, ACCENT = "#222222", "#8a8a8a", "#1f6f8b"
COLOURS = (ACCENT, "#c2541a", "#6a4c93")
"""Of curves, as many as a study is likely to have."""
BAR = "\\|"
"""What Markdown shows as | within a table."""
Found = Mapping[str, Sequence[Outcome]]
"""By arm, an outcome a seed."""


def write_results(study: Study, found: Found, out: Path, title: str, command: str) -> None:
    """Writes TITLE.md and the pictures that it shows, all of them or none.

    Args:
        study: what was asked.
        found: what was found.
        out: the folder; made if it is not there.
        title: what the files are called.
        command: how to repeat it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{title}-", dir=out) as draft:
        page = _page(study, found, Path(draft), title, command)
        (Path(draft) / f"{title}.md").write_text(page, encoding="utf-8")
        for file in sorted(Path(draft).iterdir(), key=lambda file: file.suffix == ".md"):  # The page last.
            os.replace(file, out / file.name)


def _page(study: Study, found: Found, out: Path, title: str, command: str) -> str:
    """The page, whose pictures are written into `out`."""
    sections = [f"# {study.title}", study.question.strip()]
    sections += [_picture("Mean reciprocal rank of each arm, by evaluation set", draw_scores(found), out, title)]
    if len({sum(part.flops for part in parts) / len(parts) for parts in study.arms.values()}) > 1:
        curve = draw_against_flops(found, curves_of(study))
        sections += [_picture("Mean over the sets against training FLOPs", curve, out, f"{title}-flops")]
    sections += [_table(found), _explained(study)]
    if study.clip_benchmark:
        sections += ["## By CLIP_benchmark", *(_judged_table(found, name) for name in study.clip_benchmark)]
    cosines = {arm: pooled for arm, outcomes in found.items() if (pooled := _pooled(outcomes))}
    if cosines:
        maps = draw_cosines(cosines)
        sections += [
            "## The tasks' gradients",
            _picture("Cosine between the tasks' gradients on the encoder", maps, out, f"{title}-cosines"),
            _cosine_table(cosines),
            "The cosine between the gradients of two batches on all weights of the encoder: mean over the training and "
            "the seeds, and the share of the measurements below 0. A task's cosine with itself is that of two of its "
            "own batches.",
        ]
        used = {arm: outcomes[0].experts for arm, outcomes in found.items() if outcomes[0].experts}
        for arm, experts in used.items():
            name = f"{title}-experts-{arm}".replace(" ", "-").replace(",", "")
            sections += [_picture(f"Expert usage by modality: {arm}", draw_experts(experts), out, name)]
    sections += [study.findings.strip()] if study.findings else []
    sections += [f"Written by `{command}`, {date.today().isoformat()}: {_versions(found)}."]
    return "\n\n".join(sections) + "\n"


def draw_scores(found: Found) -> Any:
    """A panel for each evaluation set and one for their mean: a dot a seed, a bar to the mean."""
    panels = {"mean": _means(found)} | {name.replace("_", " "): _scores(found, name) for name in _sets(found)}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (2.2 + 2.6 * columns, rows * (0.75 + 0.3 * len(found)) + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, by_arm) in zip(axes.flat, panels.items()):
        for row, arm in enumerate(found):
            if not by_arm[arm]:
                continue
            seeds = [100 * value for value in by_arm[arm]]
            mean = statistics.mean(seeds)
            axis.barh(row, mean, height=0.62, color=ACCENT if title == "mean" else MUTED, alpha=0.35)
            axis.plot(seeds, [row] * len(seeds), "o", color=INK, markersize=3)
            axis.text(max(seeds), row, f"  {mean:.1f}", va="center", fontsize=8, color=INK)
        axis.set_title(title, fontsize=9)
        axis.set_yticks(range(len(found)), list(found), fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, 1.18 * axis.get_xlim()[1])
    axes[0][0].invert_yaxis()
    figure.supxlabel("mean reciprocal rank, %; a dot is a seed", fontsize=8)
    return figure


def draw_against_flops(found: Found, curves: Sequence[Sequence[str]]) -> Any:
    """The mean of each arm against the FLOPs that it took, on a logarithmic axis; a line through those of a curve."""
    figure, axis = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    points: list[tuple[float, float, str]] = []
    colours = iter(COLOURS)
    for curve in curves:
        arms = [arm for arm in curve if _means(found)[arm]]
        means = [[100 * value for value in _means(found)[arm]] for arm in arms]
        taken = [statistics.mean(o.flops for o in found[arm]) / 1e12 for arm in arms]
        middle, spread = list(map(statistics.mean, means)), [statistics.stdev(m) if len(m) > 1 else 0 for m in means]
        colour = next(colours, INK) if len(arms) > 1 else MUTED
        axis.errorbar(taken, middle, yerr=spread, fmt="o-", color=colour, linewidth=1, capsize=3)
        points += zip(middle, taken, arms)
    axis.set_xscale("log")
    axis.margins(x=0.35, y=0.08)
    bottom, top = axis.get_ylim()
    right = 1.1 * max(flops for _, flops, _ in points)
    label = top
    for mean, flops, arm in sorted(points, reverse=True):  # From above, each clear of the one before.
        label = min(mean, label - 0.045 * (top - bottom))
        line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "relpos": (0, 0.5)}
        axis.annotate(arm, (flops, mean), xytext=(right, label), va="center", fontsize=8, color=INK, arrowprops=line)
    axis.set_xlim(right=right * (right / axis.get_xlim()[0]) ** 0.75)
    spent: list[float] = []
    for _, flops, _ in sorted(points, key=lambda point: point[1]):
        if not spent or flops > 1.15 * spent[-1]:
            spent.append(flops)
    axis.set_xticks(spent, [f"{flops:.2g}" for flops in spent], fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel("training TFLOPs, logarithmic", fontsize=9)
    axis.set_ylabel("mean reciprocal rank over all sets, %", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_cosines(pooled: Mapping[str, Mapping[str, Sequence[float]]]) -> Any:
    """A heat map of the tasks' cosines for each arm, each mean over what was measured of a pair of tasks."""
    figure, axes = plt.subplots(1, len(pooled), figsize=(1 + 2.9 * len(pooled), 3), squeeze=False, layout="constrained")
    image: Any = None
    largest = max(abs(statistics.mean(values)) for cosines in pooled.values() for values in cosines.values())
    for axis, (arm, cosines) in zip(axes[0], pooled.items()):
        tasks = list(dict.fromkeys(name for pair in cosines for name in pair.split("|")))
        grid = np.full((len(tasks), len(tasks)), np.nan)
        for pair, values in cosines.items():
            a, b = (tasks.index(name) for name in pair.split("|"))
            grid[a, b] = grid[b, a] = statistics.mean(values)
            for x, y in {(a, b), (b, a)}:
                ink = "white" if abs(grid[a, b]) > 0.6 * largest else INK
                axis.text(x, y, f"{grid[a, b]:.2f}", ha="center", va="center", fontsize=9, color=ink)
        image = axis.imshow(grid, cmap="RdBu", vmin=-largest, vmax=largest)
        axis.set_title(arm, fontsize=9)
        axis.set_xticks(range(len(tasks)), tasks, fontsize=8)
        axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=8)
    return figure


def draw_experts(experts: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """For each sparse layer, which share of its gate weight each modality gives to each expert."""
    layers = len(next(iter(experts.values())))
    size = (1 + 3.2 * layers, 0.9 + 0.4 * len(experts))
    figure, axes = plt.subplots(1, layers, figsize=size, squeeze=False, layout="constrained")
    for i, axis in enumerate(axes[0]):
        grid = np.array([told[i]["gate"] for told in experts.values()])
        image = axis.imshow(grid, cmap="Blues", vmin=0, aspect="auto")
        axis.set_title(f"sparse layer {i + 1}", fontsize=9)
        axis.set_yticks(range(len(experts)), list(experts), fontsize=8)
        axis.set_xticks(range(grid.shape[1]), range(1, grid.shape[1] + 1), fontsize=8)
        axis.set_xlabel("expert", fontsize=8)
        figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)
    return figure


def curves_of(study: Study) -> list[list[str]]:
    """Arms that are the same but for their FLOPs, from few to many."""
    found: dict[str, list[str]] = {}
    for arm, parts in sorted(study.arms.items(), key=lambda item: sum(part.flops for part in item[1])):
        found.setdefault(repr([part.model_copy(update={"flops": 1.0}) for part in parts]), []).append(arm)
    return list(found.values())


def _picture(about: str, figure: Any, out: Path, name: str) -> str:
    figure.savefig(out / f"{name}.png", dpi=130, facecolor="white")
    plt.close(figure)
    return f"![{about}]({name}.png)"


def _table(found: Found) -> str:
    head = ["arm", "mean", *(name.replace("_", " ") for name in _sets(found))]
    head += ["steps", "TFLOPs", "parameters", "peak memory", "ms a step"]
    rows = []
    means, scores = _means(found), [_scores(found, name) for name in _sets(found)]
    best = max(statistics.mean(values) for values in means.values() if values)
    for arm, outcomes in found.items():
        mean = _spread(means[arm])
        rows.append(
            [
                arm,
                f"**{mean}**" if means[arm] and statistics.mean(means[arm]) == best else mean,
                *(_spread(by_arm[arm]) for by_arm in scores),
                f"{outcomes[0].steps:,}",
                f"{statistics.mean(o.flops for o in outcomes) / 1e12:.2f}",
                f"{outcomes[0].parameters / 1e6:.2f}M",
                f"{outcomes[0].memory / 2**20:,.0f} MiB",
                f"{statistics.median(o.seconds / o.steps for o in outcomes) * 1e3:.0f}",
            ]
        )
    return _markdown(head, rows)


def _judged_table(found: Found, name: str) -> str:
    judged = {arm: outcomes for arm, outcomes in found.items() if any(key[0] == name for key in outcomes[0].judged)}
    figures = [figure for known, figure in next(iter(judged.values()))[0].judged if known == name]
    rows = [
        [arm, *(_spread([o.judged[name, figure] for o in outcomes]) for figure in figures)]
        for arm, outcomes in judged.items()
    ]
    head = [name.replace("_", " "), *(figure.replace("_retrieval_recall@", " R@") for figure in figures)]
    told = (
        "Recall in per cent by `clip_benchmark.metrics.zeroshot_retrieval.evaluate`, unmodified: image R@k finds the "
        "picture of a text, text R@k the text of a picture."
    )
    return f"{_markdown(head, rows)}\n\n{told}"


def _explained(study: Study) -> str:
    seeds = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''} ({', '.join(map(str, study.seeds))})"
    return (
        f"Mean reciprocal rank in per cent, both directions averaged: mean and standard deviation over {seeds}. TFLOPs "
        "are those of forward and backward passes, counted. Peak memory is what one update allocates at most, beyond "
        "weights, moments and batch. Milliseconds are of a shared machine, and only a hint."
    )


def _cosine_table(pooled: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    rows = []
    for pair in dict.fromkeys(pair for cosines in pooled.values() for pair in cosines):
        cells = []
        for values in (cosines.get(pair, []) for cosines in pooled.values()):
            below = statistics.mean(value < 0 for value in values) if values else 0
            cells.append(f"{statistics.mean(values):.3f} ({below:.0%} below 0)" if values else "")
        rows.append([pair.replace("|", " and "), *cells])
    return _markdown(["tasks", *pooled], rows)


def _pooled(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """By pair of tasks, the cosines of all seeds, in each of which a rare task may be missing."""
    pairs = dict.fromkeys(pair for o in outcomes for pair in o.cosines)
    return {pair: [value for o in outcomes for value in o.cosines.get(pair, [])] for pair in pairs}


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', BAR) for cell in line)} |" for line in lines)


def _sets(found: Found) -> list[str]:
    """All evaluation sets, for an arm may lack those that its tasks have no modality for."""
    return list(dict.fromkeys(name for outcomes in found.values() for name in outcomes[0].scores))


def _scores(found: Found, name: str) -> dict[str, list[float]]:
    """By arm, the figure of one set with each seed; nothing for an arm that has no modality for it."""
    return {arm: [o.scores[name] for o in outcomes if name in o.scores] for arm, outcomes in found.items()}


def _means(found: Found) -> dict[str, list[float]]:
    """By arm, the mean over all sets with each seed; nothing for an arm that lacks one."""
    sets = set(_sets(found))
    return {arm: [o.mean for o in outcomes if o.scores.keys() == sets] for arm, outcomes in found.items()}


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, in per cent."""
    if len(values) < 2:
        return f"{values[0] * 100:.1f}" if values else ""
    return f"{statistics.mean(values) * 100:.1f} ± {statistics.stdev(values) * 100:.1f}"


def _versions(found: Found) -> str:
    trained = sorted(set().union(*(o.versions for outcomes in found.values() for o in outcomes)))
    return (
        f"openimp {' and '.join(trained)}, torch {version('torch')}, Python {platform.python_version()}; "
        f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    )
