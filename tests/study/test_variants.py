"""Trainers for studies, and peak memory."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from openimp.common.json_lines import read_lines
from openimp.study.variants import CONFLICT, SUMMED
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer, train
from tests.messages import refuses
from tests.trained import figures, recipe_of, trainer_of

ROUNDS = ["alternation.kind=intervals", "optimizer.max_grad_norm=null", "optimizer.ema_decay=null"]


def test_a_summed_round_applies_the_gradient_of_the_summed_losses(little_data, tmp_path):
    summed = trainer_of(little_data, tmp_path / "a", *ROUNDS, variant=SUMMED)
    alone = trainer_of(little_data, tmp_path / "b", *ROUNDS)
    batches = [alone.batches[step] for step in (0, 1)]
    assert {loaded.visit.task for loaded in batches} == {"named", "heard"}
    sum(alone.forward(loaded).total for loaded in batches).backward()
    expected = {name: p.grad for name, p in alone.model.named_parameters() if p.grad is not None}
    before = {name: p.detach().clone() for name, p in summed.model.named_parameters()}

    seen = {}
    really_step = summed.updater.queue_update

    def step(number):
        seen.update({name: p.grad.clone() for name, p in summed.model.named_parameters() if p.grad is not None})
        return really_step(number)

    summed.updater.queue_update = step
    summed.make_step(batches[0])
    assert all(torch.equal(p, before[name]) for name, p in summed.model.named_parameters())
    summed.make_step(batches[1])
    assert seen.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-3, atol=1e-5)
    assert not torch.equal(summed.model.encoder.norm.weight, before["encoder.norm.weight"])


def test_a_round_of_which_one_loss_is_not_finite_is_neither_applied_nor_saved(little_data, tmp_path):
    """The first task's loss is infinite, and its gradients are not."""
    training = trainer_of(little_data, tmp_path / "a", *ROUNDS, variant=SUMMED)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    batches = [training.batches[step] for step in (0, 1)]
    really_forward = training.forward

    def forward(loaded):
        losses = really_forward(loaded)
        return replace(losses, total=losses.total + math.inf) if loaded is batches[0] else losses

    training.forward = forward
    for loaded in batches:
        training.make_step(loaded)
    with refuses():
        training.confirm()
    changed = [name for name, p in training.model.named_parameters() if not torch.equal(p, before[name])]
    assert not changed
    training.save()
    training.checkpointing.wait()
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_cosines_compare_the_tasks_gradients_and_do_not_change_the_training(little_data, tmp_path):
    recipe = recipe_of(little_data, "train.steps=12")
    train(recipe, tmp_path / "plain")
    train(recipe, tmp_path / "measured", variant=CONFLICT)
    assert figures(tmp_path / "plain") == figures(tmp_path / "measured")
    lines = read_lines(tmp_path / "measured" / "conflict.jsonl")
    assert [line["step"] for line in lines] == list(range(12))
    assert set(lines[0]["cosine"]) == {"named|named", "named|heard", "heard|heard"}

    training = Trainer(set_up(recipe, tmp_path / "again", variant=CONFLICT))
    steps = {name: [v.step for v in training.batches.schedule if v.task == name][:2] for name in ("named", "heard")}
    vectors = {}
    for name, step in {"named": steps["named"][0], "heard": steps["heard"][1]}.items():
        training.model.zero_grad()
        training.forward(training.batches[step]).total.backward()
        gradients = torch.autograd.grad(
            training.forward(training.batches[step]).total, list(training.model.encoder.parameters()), allow_unused=True
        )
        vectors[name] = torch.cat([g.flatten() for g in gradients if g is not None])
    cosine = float(F.cosine_similarity(*vectors.values(), dim=0))
    assert lines[0]["cosine"]["named|heard"] == pytest.approx(cosine, abs=1e-3)
