"""Accuracy, average precision, and their confidence intervals.

Shape suffixes: N examples, K classes, R resamples, P examples that have a class.
"""

from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 10_000
"""Number of bootstrap samples for an interval of accuracies."""
RANKED_RESAMPLES = 200
"""Number of bootstrap samples for an interval of average precisions, which are slower to compute."""
WEIGHTS = 2**22
"""Number of example weights that are drawn at once. It limits the memory for an interval of average precisions."""


def accuracy(hit_N: np.ndarray, truth_N: np.ndarray, classes: int) -> dict[str, Any]:
    """Top-1 with its 95 % interval, top-1 averaged over the classes, and chance.

    `hit_N`: whether the class of an example, `truth_N`, was predicted. `classes`: how many there are to choose from.
    """
    return {
        "n": len(hit_N),
        "candidates": classes,
        "top1": float(hit_N.mean()),
        "interval": interval(hit_N),
        "per_class": float(np.mean([hit_N[truth_N == i].mean() for i in np.unique(truth_N)])),
        "chance": 1 / classes,
    }


def interval(hit_N: np.ndarray, weight_N: np.ndarray | None = None) -> list[float]:
    """The 95 % bootstrap interval [low, high] of the weighted mean of hits, with a fixed seed.

    It covers the choice of examples, which it takes to be independent, and not the seed of the training. If all
    examples are hits, or none is, its width is 0. Drawing N hits with replacement is a binomial draw, so that is what
    is drawn. Examples of equal weight are resampled among themselves.
    """
    rng = np.random.default_rng(0)
    weight_N = np.ones(len(hit_N)) if weight_N is None else weight_N
    total_R = np.zeros(RESAMPLES)
    for weight in np.unique(weight_N):
        hits = hit_N[weight_N == weight]
        total_R += weight * rng.binomial(len(hits), hits.mean(), RESAMPLES)
    return [float(x) for x in np.quantile(total_R / weight_N.sum(), [0.025, 0.975])]


def share_interval(share: float, n: int) -> list[float]:
    """The `interval` of `n` examples if only their share of hits is known."""
    return interval(np.arange(n) < round(share * n))


def average_precision(score_NK: np.ndarray, hot_NK: np.ndarray) -> dict[str, Any]:
    """Mean average precision (mAP), its 95 % interval over the examples, and chance.

    The average precision of a class is scikit-learn's `average_precision_score`: the mean, over the examples of the
    class, of the share of such examples among all examples with at least the same score. mAP is the mean over the
    classes that have an example. The interval is the Bayesian bootstrap's (Rubin, 1981): it draws weights for the
    examples, which leaves no class without an example, as resampling could. A score of NaN ranks last.
    """
    rankings = [_ranking(score, hot) for score, hot in zip(score_NK.T, hot_NK.T) if hot.any()]
    rng = np.random.default_rng(0)
    map_R = np.ones(0)  # The first one is not resampled: all its weights are 1.
    while (left := 1 + RANKED_RESAMPLES - len(map_R)) > 0:
        weight_NR = rng.standard_exponential((len(hot_NK), min(left, max(1, WEIGHTS // len(hot_NK)))))
        if not len(map_R):
            weight_NR[:, 0] = 1
        means = np.mean([_average_precision(ranking, weight_NR) for ranking in rankings], axis=0)
        map_R = np.append(map_R, means)
    return {
        "n": len(hot_NK),
        "candidates": hot_NK.shape[1],
        "map": float(map_R[0]),
        "interval": [float(x) for x in np.quantile(map_R[1:], [0.025, 0.975])],
        # In random order, the average precision is about the share of examples that have the class.
        "chance": float(np.mean([len(ranking.hit_P) / len(hot_NK) for ranking in rankings])),
    }


class _Ranking(NamedTuple):
    """The examples of one class, from the highest score to the lowest."""

    example_N: np.ndarray  # the number of each example
    hit_P: np.ndarray  # the places of those that have the class
    # Examples that tie are ranked together, at the last of their places.
    last_hit_P: np.ndarray  # among those that have the class
    last_P: np.ndarray  # among all


def _ranking(score_N: np.ndarray, hot_N: np.ndarray) -> _Ranking:
    order_N = np.argsort(-score_N, kind="stable")
    cost_N = -score_N[order_N]
    hit_P = np.flatnonzero(hot_N[order_N])
    cost_P = cost_N[hit_P]
    last_hit_P = np.searchsorted(cost_P, cost_P, side="right") - 1
    last_P = np.searchsorted(cost_N, cost_P, side="right") - 1
    return _Ranking(order_N.astype(np.int32), hit_P, last_hit_P, last_P)


def _average_precision(ranking: _Ranking, weight_NR: np.ndarray) -> np.ndarray:
    """(R,) the average precision of one class, once per column of weights."""
    weight_NR = weight_NR[ranking.example_N]
    weight_PR = weight_NR[ranking.hit_P]
    right_PR = weight_PR.cumsum(0)[ranking.last_hit_P]
    seen_PR = weight_NR.cumsum(0)[ranking.last_P]
    return (weight_PR * right_PR / seen_PR).sum(0) / weight_PR.sum(0)
