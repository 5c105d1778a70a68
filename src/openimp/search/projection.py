"""The map: two coordinates per item."""

from importlib.util import find_spec

import numpy as np

from openimp.search.umap import NEIGHBORS, umap

MAX_POINTS = 50_000
"""Items on the map at most; of more, an evenly spaced part is shown."""
GRID = 65_535
"""Coordinates are whole numbers from 0 to this, which is precise enough and short."""


def method(count: int) -> str:
    """The method that computes the coordinates of this many items.

    UMAP if `umap-learn` is installed and they are more than the neighbors that it considers, otherwise PCA.
    """
    return "UMAP" if count > NEIGHBORS and find_spec("umap") else "PCA"


def project(vectors: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Projects vectors (N, Z) to whole numbers (N, 2) from 0 to `GRID`.

    The mean of each group (N,), such as all pictures, is subtracted first. Otherwise most of the variance is the gap
    between modalities (arXiv 2203.02053), and the map shows nothing else.
    """
    centered = vectors.astype(np.float32)
    for group in np.unique(groups):
        centered[groups == group] -= centered[groups == group].mean(0)
    points = umap(centered) if method(len(centered)) == "UMAP" else _pca(centered)
    low, high = points.min(0), points.max(0)
    # The same scale on both axes keeps distances comparable; the shorter axis is in the middle.
    size = max(float((high - low).max()), 1e-12)
    return np.round((points - (low + high) / 2) / size * GRID + GRID / 2).astype(int)


def _pca(centered: np.ndarray) -> np.ndarray:
    """The two directions of largest variance."""
    _, axes = np.linalg.eigh(centered.T @ centered)  # in order of variance
    return centered @ axes[:, ::-1][:, :2]
