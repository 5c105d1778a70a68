"""Fine-tuning a model of open_clip in openimp's training loop.

torchrun runs this file on two ranks.
"""

import shutil
import sys
from pathlib import Path

import public
import pytest
import torch
from messages import refuses
from processes import run, torchrun
from safetensors.torch import load_file, save_file
from saved import assert_equal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import openimp
from openimp.checkpoint import dcp
from openimp.checkpoint.folder import checkpoints
from openimp.common.json_lines import read_lines
from openimp.data.loader import load_batches
from openimp.inference.join import embed_rows
from openimp.inference.publish import push
from openimp.parallel import distributed
from openimp.parallel.layout import full_tensor
from openimp.recipe.schema import Recipe
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer, train

CASES = {
    "fp32": ["optimizer={muon_lr: 0.02, warmup_steps: 1}"],
    "frozen": ["optimizer={muon_lr: 0.02, warmup_steps: 1, lr_scale: {encoder.visual: 0}}"],
    "bf16": ["train.precision=bf16"],
}


RECIPE = """
name: wrapped
sources: {pictures: {path: pictures, cache: memory}}
tasks:
  named: {source: pictures, inputs: {image: file, text: "a {label} square"}, batch_size: 8,
          views: [{image: {crop: 0.5}}],
          objectives: [{type: contrastive, positives_by: label}, {type: classification, label: label}]}
  paired: {source: pictures, inputs: {video: file, text: "{label}"}, batch_size: 8, views: [{video: {frames: 2}}],
           objectives: [{type: contrastive, positives_by: label}]}
alternation: {kind: intervals}
optimizer: {lr: 1e-3, ema_decay: 0.9}
train: {steps: 20, num_workers: 0, log_every: 1, save_every: 5, precision: fp32}
evaluation: {sets: {colours: {type: zero_shot, source: pictures, inputs: {image: file}, label: label}}}
"""
"""One task has a classification, one clips of one frame."""


def recipe_of(data: Path, name: str, *overrides: str) -> Recipe:
    return Recipe.load(data / "wrapped.yaml", [f"model.wrap={name}", *overrides])


@pytest.fixture(scope="module")
def data(little_data, tmp_path_factory) -> Path:
    """The pictures, clips of them, and a recipe."""
    data = Path(shutil.copytree(little_data, tmp_path_factory.mktemp("data") / "little"))
    (data / "wrapped.yaml").write_text(RECIPE)
    return data


@pytest.fixture(scope="module")
def name(tmp_path_factory) -> str:
    return public.write("clip", tmp_path_factory.mktemp("public") / "clip")


@pytest.fixture(scope="module")
def whole(data, name, tmp_path_factory) -> Path:
    """A finished run."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(recipe_of(data, name), run)
    return run


def weights(run: Path, part: str = "model") -> dict[str, Tensor]:
    return dcp.read(checkpoints(run)[-1] / part)


def assert_contains(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert not [key for key, value in theirs.items() if not torch.equal(ours[key], value)]


@pytest.mark.slow
def test_it_starts_from_the_public_weights_and_learns(whole, name, data, capsys):
    lines = read_lines(whole / "metrics.jsonl")
    losses = [sum(task["loss"] for task in line["tasks"].values()) for line in lines]
    first, last = sum(losses[:6]), sum(losses[-6:])
    assert last < 0.9 * first
    before = openimp.load(name, "cpu", "fp32")
    trainer = Trainer(set_up(recipe_of(data, name), whole.with_name("fresh")))
    assert f"starts from {name}; loaded: " in capsys.readouterr().out
    assert_contains(trainer.model.state_dict(), before.imp.state_dict())
    untrained, result = read_lines(whole / "results.jsonl")
    assert (untrained["step"], result["step"]) == (0, len(lines))
    assert result["top1"] > result["chance"]


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_exactly_without_the_public_model(whole, data, tmp_path):
    folder = tmp_path / "clip"
    own = public.write("clip", folder)
    recipe = recipe_of(data, own)
    part = Trainer(set_up(recipe, tmp_path / "run"))
    for step in range(12):  # The run dies after a checkpoint of an earlier step.
        part.make_step(part.batches[step])
        if step == 6:
            part.confirm_and_gather_bad_examples()
            part.save(wait=True)
    part.log.metrics.close()
    folder.rename(tmp_path / "gone")
    assert train(recipe, tmp_path / "run", resume=True)
    for kind in ("model", "ema", "optimizer"):
        assert_equal(weights(tmp_path / "run", kind), weights(whole, kind))
    model = openimp.load(tmp_path / "run")
    assert torch.equal(model.encode_text("a red square"), openimp.load(whole).encode_text("a red square"))


def test_further_training_starts_from_a_run(whole, data, name, tmp_path):
    trainer = Trainer(set_up(recipe_of(data, name, f"train.init={whole}"), tmp_path / "run"))
    assert_contains(weights(whole, "ema"), trainer.model.state_dict())
    plain = recipe_of(data, name, "model.wrap=null", "tasks.paired.views=[{}]", f"train.init={whole}")
    with refuses():
        set_up(plain, tmp_path / "other")


def test_a_run_of_pictures_alone_can_be_continued_with_texts(data, name, tmp_path):
    task = "source: pictures, inputs: {image: file}, batch_size: 8, objectives: [{type: classification, label: label}]"
    alone = recipe_of(data, name, f"tasks={{only: {{{task}}}}}", "evaluation={}", "train.steps=1")
    assert train(alone, tmp_path / "alone")
    trainer = Trainer(set_up(recipe_of(data, name, f"train.init={tmp_path / 'alone'}"), tmp_path / "run"))
    assert trainer.batches[0].batch.tokens["text"].values.shape == (8, 16)


def test_a_model_of_another_name_cannot_be_the_initial_one(data, name, tmp_path):
    openimp.load(name)  # The cache has it under this name.
    (tmp_path / "link").symlink_to(name.rpartition(":")[2])
    Trainer(set_up(recipe_of(data, f"open_clip:local-dir:{tmp_path / 'link'}"), tmp_path / "linked"))
    other = public.write("oblong", tmp_path / "oblong")
    with refuses():
        Trainer(set_up(recipe_of(data, name, f"train.init={other}"), tmp_path / "run"))


def test_one_tower_learns_the_vectors_of_the_other_that_is_frozen(data, name, tmp_path):
    """LiT (arXiv 2111.07991), by distillation."""
    embed_rows(name, str(data / "pictures"), tmp_path / "rows.parquet", "image", "file", "vector")
    objectives = (
        "tasks.named.objectives=[{type: distill, of: text, to: vector}, {type: distill, of: image, to: vector}]"
    )
    changes = [
        "sources.pictures={path: " + f"{tmp_path / 'rows.parquet'}, root: {data / 'pictures'}}}",
        objectives,
        "tasks.named.views=[{image: {crop: 1}}]",
        "tasks.paired.weight=0",
        "optimizer={lr: 0.01, lr_scale: {encoder.visual: 0}, ema_decay: 0.9, warmup_steps: 1}",
    ]
    recipe = recipe_of(data, name, *changes)
    assert train(recipe, tmp_path / "run")
    lines = [line["tasks"]["named"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert lines[-1]["text:vector"] < 0.5 * lines[0]["text:vector"]
    assert max(line["image:vector"] for line in lines) < 0.01, "the teacher's vectors are the model's own"
    before, after = openimp.load(name).imp.state_dict(), weights(tmp_path / "run")
    for key, value in before.items():
        learned = not key.startswith(("encoder.visual.", "scale."))
        assert torch.equal(value, after[key]) != (learned and not key.endswith("bias")) or key.endswith("bias"), key
        assert learned or not any(part.startswith(f"{key}|") for part in weights(tmp_path / "run", "optimizer")), key


def test_layer_decay_is_refused(data, name, tmp_path):
    with refuses():
        Trainer(set_up(recipe_of(data, name, "optimizer.layer_decay=0.5"), tmp_path / "run"))


def test_the_counted_flops_and_parameters_are_those_of_the_model(data, name, tmp_path):
    trainer = Trainer(set_up(recipe_of(data, name), tmp_path / "run"))
    for step in range(2):
        loaded = trainer.batches[step]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            trainer.make_step(loaded)
        assert counter.get_total_flops() == trainer.log.costs[loaded.visit.task, loaded.visit.view].flops


def test_the_card_says_whose_model_it_is_and_whether_openimp_trained_it(whole, name, tmp_path):
    cards = []
    for number, model in enumerate((name, whole)):
        push(model, "me/model", to=tmp_path / str(number))
        cards.append((tmp_path / str(number) / "README.md").read_text())
    as_published, tuned = cards
    assert "with its public weights, in the format of openimp, which did not train it" in as_published
    assert "fine-tuned with openimp from its public weights" in tuned
    for card in cards:
        assert "The model is open_clip:local-dir:clip" in card
        assert "trained with openimp, which implements IMP" not in card
        assert "arxiv:2305.06324" not in card


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["siglip", "bert", "resnet", "coca"])
def test_other_architectures_train(kind, data, tmp_path):
    own = public.write(kind, tmp_path / kind)
    objectives = "tasks.named.objectives=[{type: contrastive, loss: sigmoid, positives_by: label}]"
    recipe = recipe_of(data, own, objectives, "evaluation={}", "train.steps=4", "train.save_every=2")
    assert train(recipe, tmp_path / "run")
    before, after = openimp.load(own).imp.state_dict(), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert not {key for key in changed if "running" in key}, "statistics of batch norms stay"
    assert any("visual" in key for key in changed)
    assert any("text" in key or "transformer" in key for key in changed)
    assert {"scale.logit_scale", "scale.logit_bias"} <= changed


@pytest.mark.slow
def test_two_ranks_compute_what_one_computes(data, name, tmp_path):
    """Losses, gradients, and what Muon does to the matrices; in bf16, where FSDP2 rounds the weights, the losses."""
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    run(*torchrun(2, __file__, data, name, ranks), check=True)
    for case, changes in CASES.items():
        expected = steps_of(Trainer(set_up(recipe_of(data, name, *changes), tmp_path / f"one {case}")))
        found = load_file(ranks / f"{case}.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            # By norms: ranks add up in another order, so a number that is nearly 0 may have another last digit.
            limit = 0.02 if case == "bf16" else 1e-5
            if key.endswith("update"):  # Orthogonal in bf16: each number may differ by more, all together by little.
                limit = 0.05
                assert value.norm() > 0
            assert (found[key] - value).norm() <= limit * value.norm(), f"{case}, {key}"


def steps_of(trainer: Trainer) -> dict[str, Tensor]:
    """The losses and gradients of a step of each task, and the updates of the hidden matrices by both steps."""
    found, exact = {}, trainer.recipe.train.precision == "fp32"
    batches = [*load_batches(trainer.batches, 0, 2)]
    for loaded in batches:
        losses = trainer.forward(loaded)
        losses.total.backward()
        found[f"{loaded.visit.task} loss"] = distributed.all_reduce_mean(losses.total.detach())
        for name, parameter in trainer.model.named_parameters():
            if exact and parameter.grad is not None:
                found[f"{loaded.visit.task} {name}"] = full_tensor(parameter.grad).clone()
        trainer.model.zero_grad()
    matrices = [matrix for matrix in trainer.model.hidden_matrices() if exact and matrix.requires_grad]
    before = [full_tensor(matrix.detach()).clone() for matrix in matrices]
    for loaded in batches:
        trainer.make_step(loaded)
    trainer.confirm()
    after = [full_tensor(matrix.detach()) for matrix in matrices]
    return found | {f"{i} update": new - old for i, (new, old) in enumerate(zip(after, before))}


def main(data: Path, name: str, out: Path) -> None:
    distributed.start()
    for case, changes in CASES.items():
        found = steps_of(Trainer(set_up(recipe_of(data, name, *changes), out / case)))
        if distributed.rank() == 0:
            save_file(found, out / f"{case}.safetensors")
    distributed.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
