"""Fine-tuning controls: frozen parts, and the learning rate by part and by depth."""

from pathlib import Path

import pytest
import torch

from openimp.checkpoint import dcp
from openimp.checkpoint.folder import checkpoints
from openimp.recipe.schema import Recipe
from openimp.training.trainer import Trainer, train

FROZEN = "optimizer.lr_scale={stems: 0, encoder.blocks.0: 0, projections.text-to-vision: 0}"
"""The second block is trained, and so are the stems' layers after the encoder."""


def recipe_of(folder: Path, *changes: str) -> Recipe:
    return Recipe.load(folder / "recipe.yaml", ["evaluation={}", *changes])


def training_of(folder: Path, run: Path, *changes: str) -> Trainer:
    return Trainer(recipe_of(folder, *changes), run, resume=False)


@pytest.mark.parametrize("options", ["muon_lr: 0.01", "zero_missing_grads: true", "ema_decay: 0.9"])
def test_a_frozen_part_keeps_its_weights_and_has_no_optimizer_state(little_data, tmp_path, options):
    scale = "{stems: 0, stems.text.after: 1, encoder.blocks.0: 0, projections.text-to-vision: 0}"
    changes = [f"optimizer={{{options}, warmup_steps: 1, lr_scale: {scale}}}", "train.steps=6"]
    training = training_of(little_data, tmp_path / "run", *changes)
    frozen = ("stems.", "encoder.blocks.0.", "projections.text-to-vision.")
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    assert training.train()
    saved = checkpoints(tmp_path / "run")[-1]
    after, state = dcp.read(saved / "model"), dcp.read(saved / "optimizer")
    for name, tensor in before.items():
        kept = name.startswith(frozen) and not name.startswith("stems.text.after")
        assert torch.equal(after[name], tensor) == kept or (not kept and name.endswith("bias")), name
        assert not kept or not any(key.startswith(f"{name}|") for key in state), name
        if (saved / "ema").exists() and kept:
            assert torch.equal(dcp.read(saved / "ema")[name], tensor), name
    assert len(state) > 10
    assert train(recipe_of(little_data, *changes[:1], "train.steps=6"), tmp_path / "run", resume=True)
