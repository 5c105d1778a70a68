"""UMAP in a process of its own: `python -m openimp.search.umap` reads vectors and writes their coordinates.

In the server's process, UMAP would hold the lock of the interpreter while numba compiles it, and would keep its memory
afterwards. The libraries that it loads could also change how torch computes there.
"""

import io
import subprocess
import sys

import numpy as np

from openimp.common.errors import UserError

NEIGHBORS = 15
"""Neighbors of an item that UMAP considers: its default."""


def umap(vectors: np.ndarray) -> np.ndarray:
    """UMAP (arXiv 1802.03426) of the cosines of vectors (N, Z), as (N, 2). The same vectors give the same map.

    UserError if the process fails.
    """
    # -P: with -m alone, Python would import modules from the working directory, which may be a folder of others.
    done = subprocess.run([sys.executable, "-P", "-m", __name__], input=_to_bytes(vectors), capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        reason = next((line for line in reversed(lines) if line.strip()), f"it ended with {done.returncode}")
        raise UserError(f"the map cannot be computed with UMAP: {reason[:300]}")
    return _from_bytes(done.stdout)


def main() -> None:
    """Reads vectors from standard input, and writes coordinates to standard output."""
    from umap import UMAP

    options = {"n_neighbors": NEIGHBORS, "metric": "cosine", "random_state": 0, "n_jobs": 1}
    points = UMAP(n_components=2, **options).fit_transform(_from_bytes(sys.stdin.buffer.read()))
    sys.stdout.buffer.write(_to_bytes(points))


def _to_bytes(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def _from_bytes(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)


if __name__ == "__main__":
    main()
