"""The page of a study: tables and plots in Markdown. It needs matplotlib (`pip install openimp[plots]`)."""

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openimp.common.errors import counted
from openimp.common.safe_files import write_text
from openimp.common.versions import processor
from openimp.study.outcome import Outcome, Outcomes, mean_and_deviation, scores_by_set
from openimp.study.plots import draw_against_flops, draw_scores, plot_style
from openimp.study.schema import Study

SCORES = {"mrr": "Mean reciprocal rank", "accuracy": "Accuracy"}


def write_results(study: Study, outcomes: Outcomes, out: Path, name: str, command: str) -> None:
    """Writes NAME.md and its plots into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with plot_style():
        page = _page(study, outcomes, out, name, command)
    write_text(out / f"{name}.md", page)


def _page(study: Study, outcomes: Outcomes, folder: Path, name: str, command: str) -> str:
    """Returns the page and saves its plots into `folder`."""

    def plot(caption: str, figure: Any, suffix: str = "") -> str:
        figure.savefig(folder / f"{name}{suffix}.png", facecolor="white")
        return f"![{caption}]({name}{suffix}.png)"

    sections = [f"# {study.title}", study.question.strip()]
    score = SCORES[study.score]
    sections += [plot(f"{score} of each arm, by evaluation set", draw_scores(outcomes, score.lower()))]
    means = scores_by_set(outcomes)[""]
    flops_factors = {
        statistics.mean(model.flops_factor for model in models) for arm, models in study.arms.items() if means[arm]
    }
    if len(flops_factors) > 1:
        curves = draw_against_flops(outcomes, curves_of(study), score.lower())
        sections += [plot("Mean over all sets against training FLOPs", curves, "-flops")]
    listed_seeds = f"{counted(len(study.seeds), 'seed')} ({', '.join(map(str, study.seeds))})"
    sections += [
        _score_table(outcomes),
        f"{score} in percent, averaged over both directions of a retrieval set: mean and standard deviation over "
        f"{listed_seeds}. TFLOPs count forward and backward passes and the optimizer. Peak memory is the most that "
        "one update allocates beyond weights, optimizer state and batch. The minutes of training were measured on a "
        "shared machine and are only a rough guide.",
    ]
    cosines = {arm: pooled for arm, seeds in outcomes.items() if (pooled := _pool_cosines(seeds))}
    if cosines:
        sections += [
            "## The tasks' gradients",
            _cosine_table(cosines),
            "Each cell is the cosine between the gradients of two batches with respect to all encoder weights: its "
            "mean over the training and the seeds, and the share of measurements below 0. For a task and itself, both "
            "batches are from that task.",
        ]
    sections += [study.findings.strip()] if study.findings else []
    sections += [f"Written by `{command}`, {date.today().isoformat()}: {_versions(outcomes)}."]
    return "\n\n".join(sections) + "\n"


def curves_of(study: Study) -> list[list[str]]:
    """Groups of arms that differ only in their FLOPs, each in ascending order of FLOPs."""
    curves: dict[str, list[str]] = {}
    for arm, models in sorted(study.arms.items(), key=lambda item: sum(model.flops_factor for model in item[1])):
        all_but_flops = repr([model.model_copy(update={"flops_factor": 1.0}) for model in models])
        curves.setdefault(all_but_flops, []).append(arm)
    return list(curves.values())


def _score_table(outcomes: Outcomes) -> str:
    columns = scores_by_set(outcomes)
    means = {arm: statistics.mean(scores) for arm, scores in columns[""].items() if scores}
    rows = []
    for arm, seeds in outcomes.items():
        cells = [_spread(by_arm[arm]) for by_arm in columns.values()]
        if means.get(arm) == max(means.values()):
            cells[0] = f"**{cells[0]}**"
        cells += [
            f"{seeds[0].steps:,}",
            _teraflops(statistics.mean(seed.flops for seed in seeds)),
            f"{seeds[0].parameters / 1e6:.2f}M",
            f"{seeds[0].memory / 2**20:,.0f} MiB",
            f"{statistics.mean(seed.seconds for seed in seeds) / 60:.1f}",
        ]
        rows.append([arm, *cells])
    costs = ["steps", "TFLOPs", "parameters", "peak memory", "minutes"]
    return _markdown(["arm", *((title or "mean").replace("_", " ") for title in columns), *costs], rows)


def _cosine_table(cosines_by_arm: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    rows = []
    for pair in dict.fromkeys(pair for cosines in cosines_by_arm.values() for pair in cosines):
        row = [pair.replace("|", " and ")]
        for cosines in cosines_by_arm.values():
            values = cosines.get(pair)
            if values:
                negative_share = statistics.mean(value < 0 for value in values)
                row.append(f"{statistics.mean(values):.3f} ({negative_share:.0%} below 0)")
            else:
                row.append("")
        rows.append(row)
    return _markdown(["tasks", *cosines_by_arm], rows)


def _pool_cosines(seeds: Sequence[Outcome]) -> dict[str, list[float]]:
    """The cosines of all seeds by pair of tasks. A seed may lack a pair if one of its tasks is rare."""
    pairs = dict.fromkeys(pair for seed in seeds for pair in seed.cosines)
    return {pair: [cosine for seed in seeds for cosine in seed.cosines.get(pair, [])] for pair in pairs}


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _spread(scores: Sequence[float]) -> str:
    """Mean and standard deviation. An arm without the set has an empty cell."""
    if not scores:
        return ""
    mean, deviation = mean_and_deviation(scores)
    return f"{mean:.1f} ± {deviation:.1f}" if len(scores) > 1 else f"{mean:.1f}"


def _teraflops(flops: float) -> str:
    """FLOPs in TFLOPs, with at least two decimals and three significant digits."""
    decimals = max(2, 14 - math.floor(math.log10(flops)))
    return f"{flops / 1e12:.{decimals}f}"


def _versions(outcomes: Outcomes) -> str:
    versions = sorted(set().union(*(seed.versions for seeds in outcomes.values() for seed in seeds)))
    return (
        f"openimp {' and '.join(versions)}, torch {version('torch')}, Python {platform.python_version()}; {processor()}"
    )
