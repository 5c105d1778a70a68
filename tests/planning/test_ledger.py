"""The ledger against what a training step really computes."""

from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from openimp.common.json_lines import read_lines
from openimp.data.loader import load_batches
from openimp.recipe.schema import Recipe
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer


@pytest.mark.parametrize(
    "moe", ["null", "{experts: 2, layers: 1}", "{experts: {vision: 2, text: 4, audio: 3}, layers: 2}"]
)
def test_what_a_run_records_is_what_its_steps_compute(little_data, tmp_path, moe):
    """Counted on the real steps in fp32, where nothing chooses another attention."""
    changes = ["train.precision=fp32", "train.steps=6", "train.log_every=6", "optimizer.muon_lr=1e-2"]
    recipe = Recipe.load(little_data / "recipe.yaml", [*changes, "model.bias=true", f"model.moe={moe}"])
    training = Trainer(set_up(recipe, tmp_path / "run"))
    computed, tokens = dict.fromkeys(recipe.tasks, 0), dict.fromkeys(recipe.tasks, 0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for loaded in load_batches(training.batches, 0):
            with FlopCounterMode(display=False) as counter:
                training.make_step(loaded)
            computed[loaded.visit.task] += counter.get_total_flops()
            tokens[loaded.visit.task] += sum(prod(each.values.shape[:2]) for each in loaded.batch.tokens.values())
    training.settle()
    training.log.metrics.close()
    line = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert {task: totals["flops"] for task, totals in line["totals"].items()} == computed
    assert {task: totals["tokens"] for task, totals in line["totals"].items()} == tokens
    model_flops = sum(training.log.costs[visit.task, visit.view].model_flops for visit in training.batches.schedule)
    assert model_flops < sum(computed.values())
    assert line["mfu"] * line["seconds"] == pytest.approx(model_flops / training.log.metrics.peak)
    assert "hfu" not in line


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["{chunk_size: 2}", "{activation_checkpointing: true}"])
def test_repeated_passes_count_in_hfu_and_not_in_mfu(little_data, tmp_path, memory):
    """Counted while training in fp32, where nothing chooses another attention."""
    lines = []
    counted = []
    for name, options in (("once", "{}"), ("repeated", memory)):
        changes = ["train.precision=fp32", "train.steps=4", "train.log_every=4", "evaluation={}", f"memory={options}"]
        training = Trainer(set_up(Recipe.load(little_data / "recipe.yaml", changes), tmp_path / name))
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            training.train()
        counted.append(counter.get_total_flops())
        forward = sum(training.log.costs[visit.task, visit.view].forward_flops for visit in training.batches.schedule)
        lines += read_lines(tmp_path / name / "metrics.jsonl")
        for kind in lines[-1].keys() & {"mfu", "hfu"}:
            lines[-1][kind] *= lines[-1]["seconds"] * training.log.metrics.peak
    once, repeated = lines
    assert once["mfu"] == pytest.approx(counted[0])
    assert "hfu" not in once
    assert repeated["mfu"] == pytest.approx(counted[0])
    assert repeated["hfu"] == pytest.approx(counted[1])
    assert 0.5 * forward < counted[1] - counted[0] <= forward, "torch repeats no product that nothing needs"
