"""The notebooks in examples/ run, with few steps of training."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file, tmp_path):
    notebook = nbformat.read(file, as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells), "it was committed with its outputs"
    trained = 0
    for cell in notebook.cells:
        cell.source, replaced = re.subn(r"^STEPS = \d+$", "STEPS = 21", cell.source, flags=re.MULTILINE)
        trained += replaced
    assert trained == 1
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
