"""open_clip's towers in openimp's training loop: they learn from each kind of media, and are evaluated like IMP."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import openimp
from openimp.checkpoint.warm_start import open_warm_start
from openimp.common.json_lines import read_lines
from openimp.data.step_batches import StepBatches
from openimp.data.task_data import TaskData
from openimp.modalities.media import patchify
from openimp.recipe.file import RecipeLoader, override
from openimp.recipe.schema import Recipe
from openimp.report.write import write_report
from openimp.study.budget import flops_per_step
from openimp.study.two_towers import TWO_TOWERS, TwoTowers
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer, train
from tests.messages import refuses

RECIPE = """
name: towers
model: {width: 32, layers: 2, heads: 2, mlp_dim: 64, embed_dim: 48, qk_norm: true}
optimizer: {lr: 3e-3, muon_lr: 1e-2, warmup_steps: 4}
train: {steps: 24, num_workers: 0, log_every: 6, save_every: 1000}
"""
SEEN = {
    "image": """
modalities: {vision: {patch: [2, 8, 8], conv_channels: 8}}
sources: {data: {path: "openimp:stills.parquet", where: {split: test, vendor: twemoji}, cache: memory}}
tasks: {pairs: {source: data, inputs: {image: image, text: "{name}, {keywords*}"}, batch_size: 32,
                objectives: [{type: contrastive}], views: [{image: {size: 32, drop_tokens: 0.5}, text: {length: 8}}]}}
evaluation:
  sets: {both_ways: {type: retrieval, source: data, inputs: {image: image, text: "{name}, {keywords*}"},
                     view: {image: {size: 32}, text: {length: 12}}}}
""",
    "video": """
modalities: {vision: {patch: [2, 8, 8], conv_channels: 8}}
sources: {data: {path: "openimp:clips.parquet", where: {split: test}, cache: memory}}
tasks: {pairs: {source: data, inputs: {video: video, text: "{name}, {keywords*}"}, batch_size: 32,
                objectives: [{type: contrastive}],
                views: [{video: {size: 32, frames: 2, stride: 4, clips: 2}, text: {length: 8}}]}}
evaluation:
  sets: {both_ways: {type: retrieval, source: data, inputs: {video: video, text: "{name}, {keywords*}"},
                     view: {video: {size: 32, frames: 2, stride: 4, clips: 2}, text: {length: 12}}}}
""",
    "audio": """
modalities: {audio: {window: 1024, hop: 256, bins: 64}}
sources: {data: {path: "openimp:notes.parquet", where: {split: test}, cache: memory}}
tasks: {pairs: {source: data, inputs: {audio: audio, text: captions}, batch_size: 32,
                objectives: [{type: contrastive}],
                views: [{audio: {seconds: 2.048, drop_tokens: 0.5}, text: {length: 8}}]}}
evaluation:
  sets:
    both_ways: {type: retrieval, source: data, inputs: {audio: audio, text: captions},
                view: {audio: {seconds: 2.048}, text: {length: 12}}}
    named: {type: zero_shot, source: data, inputs: {audio: audio}, label: instrument, prompts: ["{}", "{} sound"],
            view: {audio: {seconds: 2.048}}}
""",
}
STEPS = 24


def recipe_of(seen: str, *overrides: str) -> Recipe:
    """Small towers that overfit to the test part of the bundled data."""
    data = yaml.load(RECIPE + SEEN[seen], RecipeLoader)
    for change in overrides:
        override(data, change)
    return Recipe.build(data)


def trainer(recipe: Recipe, folder: Path, **options: Any) -> Trainer:
    return Trainer(set_up(recipe, folder / "run", variant=TWO_TOWERS, **options))


@pytest.fixture(scope="module", params=SEEN)
def trained(request, tmp_path_factory) -> tuple[Recipe, Path]:
    """A finished run on one kind of media."""
    recipe = recipe_of(request.param)
    run = tmp_path_factory.mktemp("runs") / request.param
    assert train(recipe, run, variant=TWO_TOWERS)
    return recipe, run


@pytest.mark.slow
def test_the_towers_learn_and_are_evaluated_on_every_set(trained):
    recipe, run = trained
    lines = read_lines(run / "metrics.jsonl")
    totals = lines[-1]["totals"]["pairs"]
    assert (totals["steps"], totals["examples"]) == (STEPS, STEPS * 32)
    assert totals["flops"] == STEPS * flops_per_step(recipe, TWO_TOWERS)["pairs"]
    losses = [line["tasks"]["pairs"]["loss"] for line in lines]
    assert len(losses) == STEPS // 6
    assert losses[-1] < losses[0] - 0.15
    results = read_lines(run / "results.jsonl")
    assert {result["set"] for result in results} == set(recipe.evaluation.sets)
    assert all(result["step"] == STEPS for result in results)
    for result in results:
        assert result.get("r10", result.get("top5")) > 2 * result["chance"], result["task"]


def test_the_counted_cost_equals_a_real_step(tmp_path):
    training = trainer(recipe_of("image"), tmp_path)
    loaded = training.batches[0]
    # The counter does not count the CPU's fused attention, but the two matrix products of the math backend.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        training.make_step(loaded)
    assert counter.get_total_flops() == training.log.step_costs["pairs", 0].flops


def test_the_towers_have_the_recipes_sizes(tmp_path):
    model = trainer(recipe_of("image"), tmp_path).model
    assert isinstance(model, TwoTowers)
    visual = model.encoder.visual
    assert (visual.image_size, visual.patch_size, visual.patch_dropout.prob) == ((32, 32), (8, 8), 0.5)
    assert model.encoder.context_length == 12  # The longest of all views.
    for tower in (visual.transformer, model.encoder.transformer):
        assert (tower.width, len(tower.resblocks), tower.resblocks[0].attn.num_heads) == (32, 2, 2)
        assert tower.resblocks[0].mlp.c_fc.out_features == 64


@pytest.mark.parametrize("seen", SEEN)
def test_the_towers_get_the_examples_of_imp_unpatched(seen, tmp_path):
    # The towers drop patches in the model, not in the loader.
    recipe = recipe_of(seen, f"tasks.pairs.views.0.{seen}.drop_tokens=0")
    training = trainer(recipe, tmp_path)
    modality = recipe.make_modalities()[seen]
    loaded = training.batches[3]
    unpatched = StepBatches(TaskData(recipe, {**training.data.modalities, seen: modality}))[3]
    assert unpatched.rows == loaded.rows
    batch = loaded.batch
    theirs = unpatched.batch
    assert torch.equal(theirs.tokens["text"].values, batch.tokens["text"].values)
    whole = batch.tokens[seen].values.view(-1, *training.model.shape)
    patch = modality.config.patch if seen == "video" else modality.config.patch[-2:]
    cut = patchify(whole if seen == "video" else whole[:, 0], patch, margin=modality.config.margin)
    torch.testing.assert_close(cut, theirs.tokens[seen].values, rtol=0, atol=0)


def test_a_clip_is_the_mean_of_its_frames_and_a_sound_is_a_gray_image(tmp_path):
    for seen in ("video", "audio"):
        training = trainer(recipe_of(seen), tmp_path / seen)
        model, tokens = training.model.eval(), training.batches[0].batch.tokens[seen]
        frames, height, width, channels = model.shape
        values = tokens.values.view(-1, frames, height, width, channels)
        values = values.float() / 127.5 - 1 if seen == "video" else values
        with torch.no_grad():
            found = model.project(model.encode(seen, tokens).features, seen, "text")
            pictures = [values[:, t].permute(0, 3, 1, 2) for t in range(frames)]
            pictures = [picture.repeat(1, 3 // channels, 1, 1) for picture in pictures]
            vectors = [model.encoder.encode_image(picture, normalize=True) for picture in pictures]
        mean = torch.nn.functional.normalize(sum(vectors), dim=-1)
        torch.testing.assert_close(found, mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", ["image"], indirect=True)
def test_only_a_study_loads_the_towers(trained):
    recipe, run = trained
    for use in (
        lambda: openimp.load(run),
        lambda: write_report(run),
        lambda: open_warm_start(Recipe.build(recipe.to_dict() | {"train": {"init": str(run)}}), {}),
    ):
        with refuses():
            use()
    with refuses():
        train(recipe, run, resume=True)


def test_unsupported_recipes_are_refused_before_anything_is_written(tmp_path):
    for change in (
        "model.moe={layers: 1}",
        "tasks.pairs.objectives=[{type: contrastive, positives_by: name}]",
        "tasks.pairs.inputs.text={column: keywords, draw: 2}",
        "tasks.pairs.views=[{image: {size: 32}}, {image: {size: 64}}]",
        "tasks.pairs.views=[{image: {size: 32}}, {image: {size: 32, drop_tokens: 0.5}}]",
        "tasks.more={source: data, inputs: {image: image, text: name}, objectives: [{type: contrastive}]}",
    ):
        with refuses():
            train(recipe_of("image", "evaluation={}", change), tmp_path / "run", variant=TWO_TOWERS)
    assert not (tmp_path / "run").exists()
