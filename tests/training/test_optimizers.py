"""Optimizers: which of the two updates what, and the schedule."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from openimp.parallel.muon import Muon
from openimp.recipe.schema import Recipe
from openimp.training.optimizers import lr_schedule, set_learning_rate
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer


def training_of(folder: Path, run: Path, *changes: str) -> Trainer:
    return Trainer(set_up(Recipe.load(folder / "recipe.yaml", changes), run))


def test_muon_updates_the_hidden_matrices_and_adamw_the_rest(little_data, tmp_path):
    training = training_of(little_data, tmp_path / "run", "optimizer.muon_lr=1e-2", "model.bias=true")
    adamw, muon = training.updater.optimizers
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(muon, Muon)
    names = {parameter: name for name, parameter in training.model.named_parameters()}
    of_muon = [names[p] for group in muon.param_groups for p in group["params"]]
    assert sorted(of_muon) == sorted(names[p] for p in training.model.hidden_matrices())
    blocks = r"encoder.blocks.\d.(attention.(qkv|out)|mlp.(up|down))"
    hidden = rf"({blocks}|stems.\w+.(before|after)|projections.[\w-]+.(up|down)).weight|.*experts.(up_EDF|down_EFD)"
    assert all(re.fullmatch(hidden, name) for name in of_muon)
    shared = [p for optimizer in (adamw, muon) for group in optimizer.param_groups for p in group["params"]]
    assert len(shared) == len(set(shared)) == len(names)
    decayed = {names[p] for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    kernels = {"stems.vision.embed.weight", "stems.audio.embed.weight", "classifiers.pictures:label.weight"}
    assert decayed == kernels | {"encoder.blocks.1.mlp.router.weight_ED"}, "no biases, also not those of the experts"


def test_the_learning_rate_rises_and_falls(little_data, tmp_path):
    """One step in twenty warms up unless told otherwise."""
    recipe = Recipe.load(little_data / "recipe.yaml", ["optimizer.warmup_steps=null", "train.steps=80"])
    assert [lr_schedule(recipe, step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert lr_schedule(recipe, 5) < 1
    changes = ["optimizer={lr: 0.1, muon_lr: 0.3, warmup_steps: 4, min_lr_ratio: 0.2}", "train.steps=12"]
    training = training_of(little_data, tmp_path / "run", *changes)
    rates = [lr_schedule(training.recipe, step) for step in range(12)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[8] == pytest.approx(0.2 + 0.8 * 0.5)
    assert all(one > other for one, other in itertools.pairwise(rates[4:]))
    assert lr_schedule(training.recipe, 12) == pytest.approx(0.2)
    set_learning_rate(training.updater.optimizers, rates[8])
    peaks = [group["lr"] / rates[8] for optimizer in training.updater.optimizers for group in optimizer.param_groups]
    assert peaks == pytest.approx([0.1, 0.1, 0.3])
