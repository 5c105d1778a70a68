"""benchmarks/gpu.py runs; without a GPU, on the CPU with tiny models."""

from dataclasses import replace

import pytest

from benchmarks import gpu

pytestmark = pytest.mark.slow


def test_trainings_on_one_rank_and_on_several_are_measured(tmp_path):
    manifest = gpu.make_data(tmp_path)
    todo = {setting.name: setting for setting in gpu.settings(2)}
    eager, chunks = todo["IMP-B"], todo["IMP-B, gradient caching"]
    chosen = [eager, chunks, todo["IMP-MoE-B, experts on different GPUs"]]
    found = [gpu.measure(setting, manifest, tmp_path / str(i)) for i, setting in enumerate(chosen)]
    for setting, measured in zip(chosen, found):
        assert isinstance(measured, gpu.Measured), measured
        assert measured.examples_per_s > 0
        assert measured.saved > 0
        assert measured.planned > 0
        assert gpu.agrees(setting, measured, found[0])
        assert len(gpu.row(setting, measured, True)) == 12
    assert not gpu.agrees(eager, replace(found[0], first_loss=1.1 * found[0].first_loss), found[0])
    assert gpu.embedding_rate(tmp_path / "0" / "run", tmp_path / "pictures", tmp_path / "vectors.parquet") > 0
    assert "embeds 9 pictures/s" in gpu.report([], 1, 9.0)


def test_a_training_that_fails_is_a_row(tmp_path):
    setting = gpu.Setting("broken", "imp_b", changes={"memory": {"nothing": 1}})
    found = gpu.measure(setting, gpu.make_data(tmp_path), tmp_path / "run")
    assert isinstance(found, str)
    assert "nothing" in found
    assert not gpu.agrees(setting, found, found)
    assert len(gpu.row(setting, found, False)) == 12
