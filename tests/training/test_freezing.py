"""Fine-tuning controls: frozen parts, and the learning rate by part and by depth."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from openimp.checkpoint import dcp
from openimp.checkpoint.folder import checkpoints
from openimp.data.loader import load_batches
from openimp.planning.memory import step_memory
from openimp.study.variants import peak_memory
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer
from tests.messages import refuses
from tests.saved import copies
from tests.trained import recipe_of, trainer_of

CLASSES = {"pictures:label": ["blue", "green", "red", "white"]}
ONE_TASK = ["tasks.heard.weight=0", "tasks.named.views=[{image: {size: 16}, text: {length: 8}}]"]


@pytest.mark.parametrize("options", ["muon_lr: 0.01, ema_decay: 0.9", "zero_missing_grads: true"])
def test_a_frozen_part_keeps_its_weights_and_has_no_optimizer_state(little_data, tmp_path, capsys, options):
    scale = "{stems: 0, stems.text.after: 1, encoder.blocks.0: 0, projections.text-to-vision: 0}"
    changes = [f"optimizer={{{options}, warmup_steps: 1, lr_scale: {scale}}}", "train.steps=6", "evaluation={}"]
    training = trainer_of(little_data, tmp_path / "run", *changes)
    size = sum(weight.numel() for weight in training.model.parameters() if not weight.requires_grad)
    assert f"{size / 1e6:.2f}M of them frozen" in capsys.readouterr().out
    frozen = ("stems.", "encoder.blocks.0.", "projections.text-to-vision.")
    before = copies(training.model.state_dict())
    assert training.train()
    saved = checkpoints(tmp_path / "run")[-1]
    after = dcp.read(saved / "model")
    state = dcp.read(saved / "optimizer")
    for name, tensor in before.items():
        kept = name.startswith(frozen) and not name.startswith("stems.text.after")
        assert torch.equal(after[name], tensor) == kept or (not kept and name.endswith("bias")), name
        assert not kept or not any(key.startswith(f"{name}|") for key in state), name
        if (saved / "ema").exists():
            assert torch.equal(dcp.read(saved / "ema")[name], tensor) == kept or name.endswith("bias"), name
    assert len(state) > 10


@pytest.mark.parametrize(("trained", "kind"), [("encoder.blocks.1.attention.qkv", "Muon"), ("temperatures", "AdamW")])
def test_one_of_two_optimizers_may_have_nothing_to_update(little_data, tmp_path, trained, kind):
    parts = ("stems", "encoder", "projections", "temperatures", "classifiers")
    scale = {part: 0 for part in parts} | {trained: 1}
    options = f"optimizer={{muon_lr: 0.01, warmup_steps: 0, lr_scale: {json.dumps(scale)}}}"
    training = trainer_of(little_data, tmp_path / "run", options, "train.steps=6", "evaluation={}")
    before = copies(training.model.state_dict())
    assert kind in [type(optimizer).__name__ for optimizer in training.updater.optimizers]
    assert training.train()
    for name, tensor in training.model.state_dict().items():
        learned = name.startswith(trained) and not name.endswith("bias")
        assert torch.equal(tensor, before[name]) != learned, name


@pytest.mark.parametrize("scale", ["{stems: 0, encoder.blocks.0: 0}", "{encoder: 0, stems: 0}"])
@pytest.mark.parametrize("memory", ["{}", "{chunk_size: 4, activation_checkpointing: true}"])
def test_counted_flops_are_those_of_a_step(little_data, tmp_path, scale, memory):
    changes = [*ONE_TASK, f"optimizer.lr_scale={scale}", f"memory={memory}"]
    training = trainer_of(little_data, tmp_path / "run", *changes)
    with FlopCounterMode(display=False) as counter:
        training.make_step(next(iter(load_batches(training.batches, 0))))
    cost = training.log.step_costs["named", 0]
    assert cost.flops == counter.get_total_flops()
    full = trainer_of(little_data, tmp_path / "full", *ONE_TASK, f"memory={memory}").log.step_costs["named", 0]
    assert cost.flops < full.flops
    assert cost.forward_flops == full.forward_flops


def test_frozen_parts_need_less_memory_and_the_plan_says_how_much(little_data, tmp_path):
    wide = [*ONE_TASK, "model.width=128", "model.mlp_dim=512", "model.layers=6", "tasks.named.batch_size=32",
            "train.steps=6", "train.precision=fp32", "train.log_every=6"]  # fmt: skip
    measured = []
    for scale in ("{}", "{stems: 0, encoder: 0, encoder.blocks.5: 1}"):
        recipe = recipe_of(little_data, "evaluation={}", *wide, f"optimizer.lr_scale={scale}")
        measured.append(peak_memory(Trainer(set_up(recipe, tmp_path / scale))))
        planned = step_memory(
            recipe, recipe.make_modalities(), CLASSES, "named", 0, precision="fp32", on_gpu=False
        ).peak.total()
        assert planned == pytest.approx(measured[-1], rel=0.15)
    assert measured[1] < 0.5 * measured[0]


def test_each_layer_has_its_learning_rate(little_data, tmp_path):
    changes = ["optimizer={muon_lr: 0.01, lr: 0.001, layer_decay: 0.5, lr_scale: {projections: 3, stems.audio: 0}}"]
    training = trainer_of(little_data, tmp_path / "run", *changes, "model.modality_specific_layers=1", "model.layers=4")
    adamw, muon = training.updater.optimizers
    names = {parameter: name for name, parameter in training.model.named_parameters()}
    rates = {names[p]: group["peak"] / 0.001 for group in adamw.param_groups for p in group["params"]}
    rates |= {names[p]: factor for p, factor in muon.lr_factors.items()}
    assert len(rates) == sum(not name.startswith("stems.audio") for name in names.values())
    for name, rate in rates.items():
        depth = {"encoder.own.": 4, "encoder.blocks.0.": 3, "encoder.blocks.2.": 1, "encoder.norm.": 1, "stems.": 5}
        (expected,) = [0.5**n for start, n in depth.items() if name.startswith(start)] or [1]
        if name.startswith("encoder.blocks.1."):
            expected = 0.25
        expected = 1 if ".after." in name else 3 if name.startswith("projections.") else expected
        assert rate == expected, name


def test_a_step_of_a_slower_part_is_smaller(little_data, tmp_path):
    """In the first step, because there the size of AdamW's and Muon's updates depends on the learning rate only."""
    moved = {}
    for scale in (1, 0.25):
        changes = [f"optimizer={{muon_lr: 0.01, warmup_steps: 0, weight_decay: 0, lr_scale: {{encoder: {scale}}}}}"]
        training = trainer_of(little_data, tmp_path / str(scale), *changes)
        before = copies(training.model.state_dict())
        training.make_step(next(iter(load_batches(training.batches, 0))))
        moved[scale] = {name: x - before[name] for name, x in training.model.state_dict().items()}
    assert sum(bool(change.any()) for change in moved[1].values()) > 20
    for name, change in moved[1].items():
        factor = 0.25 if name.startswith("encoder.") else 1
        torch.testing.assert_close(moved[0.25][name], factor * change, rtol=1e-2, atol=1e-6)


def test_what_cannot_be_frozen_is_refused(little_data, tmp_path):
    for scale in (
        "{stems.visoin: 0}",
        "{stems.image: 0}",
        "{encoder.text: 0}",
        "{stems: 0, encoder: 0, projections: 0, temperatures: 0}",
    ):
        with refuses():
            trainer_of(little_data, tmp_path / "run", f"optimizer.lr_scale={scale}")
