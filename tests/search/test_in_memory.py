"""Vectors that are compared in memory."""

from pathlib import Path

import numpy as np
import pytest

from openimp.search.table import Items, schema


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 300 random vectors, of which some are missing, in several files and with removed rows."""
    folder = tmp_path_factory.mktemp("table")
    items, rng = Items(folder, 16), np.random.default_rng(0)
    empty = {field.name: None for field in schema(16)}
    for start in range(0, 300, 100):
        rows = []
        for i in range(start, start + 100):
            vector = rng.normal(size=16)
            known = {"vector": None if i % 10 == 3 else vector / np.linalg.norm(vector)}
            rows.append(empty | {"id": str(i), "path": str(i), "modality": ("image", "audio")[i % 2]} | known)
        items.replace([], rows)
    items.remove(["5", "105", "299"])
    return folder


@pytest.mark.parametrize("where", [None, "modality = 'audio'", "modality IN ('image', 'text')", "path = 'none'"])
def test_vectors_in_memory_are_compared_as_by_lancedb(folder: Path, monkeypatch, where):
    items = Items(folder)
    vector = 3 * np.random.default_rng(1).normal(size=16).astype(np.float32)
    for k in (1, 5, 1000):
        in_memory = items.nearest(vector, k, where)
        with monkeypatch.context() as change:
            change.setattr("openimp.search.table.IN_MEMORY_BYTES", 0)
            by_lancedb = items.nearest(vector, k, where)
        assert [row["id"] for row in in_memory] == [row["id"] for row in by_lancedb]
        assert [row.keys() for row in in_memory] == [row.keys() for row in by_lancedb]
        # LanceDB computes in fp16.
        distances = [row["_distance"] for row in by_lancedb]
        assert [row["_distance"] for row in in_memory] == pytest.approx(distances, abs=1e-3)
