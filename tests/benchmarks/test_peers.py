"""benchmarks/peers.py trains its arms; their figures depend on the machine."""

import re

import pytest

from benchmarks import peers
from tests import local_copies

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("data", "files", "arms"),
    [
        (
            "photos",
            ["cifar10-train.parquet", "cifar10-test.parquet"],
            [
                "openimp, by the names of the classes",
                "AdamW instead of Muon",
                "classification loss alone, without texts",
                "timm's ViT, its usual augmentation",
            ],
        ),
        ("speech", ["fsdd.parquet"], ["openimp; without theo", "convolutional network; without theo"]),
        (
            "drafts",
            ["cifar10-train.parquet", "cifar10-test.parquet", "fsdd.parquet"],
            ["photos, drafted recipe", "digits, drafted recipe"],
        ),
    ],
)
def test_each_arm_is_trained_and_tested(monkeypatch, tmp_path, capsys, data, files, arms):
    local_copies.write(tmp_path)
    paths = [str(tmp_path / file) for file in files]
    monkeypatch.setattr("sys.argv", ["peers.py", data, *paths, "--smoke", "--seeds", "1", "--only", *arms])
    peers.main()
    output = capsys.readouterr().out
    rows = re.findall(r"^\| (.*) \| [\d.]+ \| 1 \| [\d.]+ \|$", output, re.MULTILINE)
    assert rows == arms
    assert output.count("; mean over the held-out speakers | ") == (2 if data == "speech" else 0)
