"""Optimizers: which of the two updates what, and the schedule."""

import itertools
import math
import re

import pytest
import torch

from openimp.common.json_lines import read_lines
from openimp.parallel.muon import Muon
from openimp.training.optimizers import LRSchedule
from tests.trained import recipe_of, trainer_of


def test_muon_updates_the_hidden_matrices_and_adamw_the_rest(little_data, tmp_path):
    changes = ["optimizer={muon_lr: 1e-2, muon_momentum: 0.8}", "model.bias=true", "modalities.vision.conv_channels=8"]
    training = trainer_of(little_data, tmp_path / "run", *changes)
    adamw, muon = training.updater.optimizers
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(muon, Muon)
    assert muon.momentum == 0.8
    names = {parameter: name for name, parameter in training.model.named_parameters()}
    of_muon = [names[p] for group in muon.param_groups for p in group["params"]]
    assert sorted(of_muon) == sorted(names[p] for p in training.model.hidden_matrices())
    blocks = r"encoder.blocks.\d.(attention.(qkv|out)|mlp.(up|down))"
    stems = r"stems.\w+.(before|after|embed.out)"
    hidden = rf"({blocks}|{stems}|projections.[\w-]+.(up|down)).weight|.*experts.(up_EDF|down_EFD)"
    assert all(re.fullmatch(hidden, name) for name in of_muon)
    shared = [p for optimizer in (adamw, muon) for group in optimizer.param_groups for p in group["params"]]
    assert len(shared) == len(set(shared)) == len(names)
    decayed = {names[p] for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    kernels = {"stems.vision.embed.convolution.weight", "stems.audio.embed.weight", "classifiers.pictures:label.weight"}
    assert decayed == kernels | {"encoder.blocks.1.mlp.router.weight_ED"}, "no biases, also not those of the experts"


def test_the_learning_rate_follows_the_flops_of_views_that_follow_one_after_the_other(little_data, tmp_path):
    """And the lines of the metrics tell it."""
    views = "tasks.named.views=[{image: {size: 16}, text: {length: 8}}, {image: {size: 64}, text: {length: 8}}]"
    changes = [views, "tasks.heard.weight=0", "train.steps=10", "optimizer={lr: 0.1, warmup_steps: 2}"]
    changes += ["train.log_every=1", "evaluation={}", "alternation.views=sequence"]
    training = trainer_of(little_data, tmp_path / "run", *changes)
    small, large = (training.log.step_costs["named", view].flops for view in (0, 1))
    assert large > 5 * small
    done = [0.0]  # FLOPs since the warm-up
    for step in range(2, 10):
        done.append(done[-1] + (small if step < 5 else large))
    expected = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * flops / done[-1])) for flops in done[:-1])]
    assert training.train()
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["lr"] for line in lines] == pytest.approx([0.1 * factor for factor in expected])
    assert lines[5]["lr"] > 0.09, "half of the steps are done, but not half of the work"


def test_the_learning_rate_rises_and_falls(little_data, tmp_path):
    """One step in twenty warms up unless told otherwise."""
    recipe = recipe_of(little_data, "optimizer.warmup_steps=null", "train.steps=80")
    lr_factor = LRSchedule(recipe, lambda step: step)
    assert [lr_factor(step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert lr_factor(5) < 1
    changes = ["optimizer={lr: 0.1, muon_lr: 0.3, warmup_steps: 4, min_lr_ratio: 0.2}", "train.steps=12"]
    training = trainer_of(little_data, tmp_path / "run", *changes)
    rates = [training.updater.lr_factor(step) for step in range(12)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[8] == pytest.approx(0.2 + 0.8 * 0.5)
    assert all(one > other for one, other in itertools.pairwise(rates[4:]))
    assert training.updater.lr_factor(12) == pytest.approx(0.2)
    training.make_step(training.batches[0])
    groups = [group for optimizer in training.updater.optimizers for group in optimizer.param_groups]
    assert [group["lr"] for group in groups] == pytest.approx([0.025, 0.025, 0.075])
