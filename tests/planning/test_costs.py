"""The planned costs against what a training step really computes."""

from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from openimp.common.json_lines import read_lines
from openimp.data.loader import load_batches
from tests.trained import trainer_of


@pytest.mark.parametrize(
    ("moe", "memory"),
    [
        ("null", "{chunk_size: 2}"),
        ("{experts: 2, layers: 1}", "{activation_checkpointing: true}"),
        ("{experts: {vision: 2, text: 4, audio: 3}, layers: 2}", "{}"),
    ],
)
def test_what_a_run_records_is_what_its_steps_compute(little_data, tmp_path, moe, memory):
    """Counted on the real steps in fp32, where nothing chooses another attention. Repeated passes count in HFU only."""
    changes = ["train={steps: 6, log_every: 6, num_workers: 0, precision: fp32}", "optimizer.muon_lr=1e-2"]
    changes += [f"memory={memory}", "tasks.named.inputs.text={column: label, draw: 3}"]
    training = trainer_of(little_data, tmp_path / "run", *changes, "model.bias=true", f"model.moe={moe}")
    computed = dict.fromkeys(training.recipe.tasks, 0)
    tokens = dict.fromkeys(training.recipe.tasks, 0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for loaded in load_batches(training.batches, 0):
            with FlopCounterMode(display=False) as counter:
                training.make_step(loaded)
            computed[loaded.visit.task] += counter.get_total_flops()
            tokens[loaded.visit.task] += sum(prod(each.values.shape[:2]) for each in loaded.batch.tokens.values())
    training.confirm_and_gather_bad_examples()
    training.log.close()
    line = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert {task: totals["flops"] for task, totals in line["totals"].items()} == computed
    assert {task: totals["tokens"] for task, totals in line["totals"].items()} == tokens
    costs = [training.log.step_costs[visit.task, visit.view] for visit in training.batches.schedule]
    model_flops = sum(cost.model_flops for cost in costs)
    hardware_flops = sum(computed.values()) - sum(cost.optimizer_flops for cost in costs)
    assert line["mfu"] * line["seconds"] == pytest.approx(model_flops / training.log.peak_flops)
    if memory == "{}":
        assert "hfu" not in line
        assert model_flops == hardware_flops
    else:
        assert line["hfu"] * line["seconds"] == pytest.approx(hardware_flops / training.log.peak_flops)
        forward_flops = sum(cost.forward_flops for cost in costs)
        assert 0.5 * forward_flops < hardware_flops - model_flops <= forward_flops
