"""The planned costs against what a training step really computes."""

from math import prod

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from openimp.common.json_lines import read_lines
from openimp.data.batch import head_key
from openimp.data.loader import load_batches
from openimp.planning.costs import costs, mixture
from openimp.recipe.schema import Recipe
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer

D, LAYERS, F, Z, B = 32, 3, 64, 24, 10
IMAGE_TOKENS, DROPPED, PATCH, TEXT_TOKENS, CLASSES = 16, 8, 2 * 8 * 8 * 3, 8, 5
MOE = {"experts": 4, "layers": 2}


def recipe_of(moe: dict | None, bias: bool) -> Recipe:
    stills = f"""{{source: all, inputs: {{image: image, text: text}}, batch_size: {B}, objectives: [
        {{type: contrastive}}, {{type: classification, of: image, label: kind}}],
        views: [{{image: {{size: 32}}, text: {{length: {TEXT_TOKENS}}}}},
                {{image: {{size: 32, drop_tokens: 0.5}}, text: {{length: {TEXT_TOKENS}}}, weight: 3}}]}}"""
    sizes = {"width": D, "layers": LAYERS, "heads": 2, "mlp_dim": F, "embed_dim": Z}
    return Recipe.build(
        {
            "name": "counted",
            "model": {**sizes, "moe": moe, "space": "joint", "bias": bias},
            "modalities": {"vision": {"patch": [2, 8, 8]}},
            "sources": {"all": {"path": "all.parquet"}},
            "tasks": {"stills": yaml.safe_load(stills)},
        }
    )


def by_hand(image_tokens: int, moe: dict | None) -> int:
    """Forward and backward FLOPs; a backward pass costs two products where a forward one costs one."""
    total = 0
    for stem, tokens in (("vision", image_tokens), ("text", TEXT_TOKENS)):
        n = B * tokens
        attention = 2 * n * D * 4 * D + 2 * 2 * n * tokens * D
        mlp = 2 * 2 * n * D * F
        sparse = mlp
        if moe:
            experts = moe["experts"] if isinstance(moe["experts"], int) else moe["experts"][stem]
            slots = max(1, int(tokens / experts + 0.5))
            sparse = 2 * 2 * B * experts * slots * D * F + 2 * n * D * experts
        layers = LAYERS * attention + (LAYERS - (moe["layers"] if moe else 0)) * mlp
        layers += (moe["layers"] if moe else 0) * sparse
        stem = 2 * n * D * D + 2 * B * D * D  # The layer after the encoder follows the mean.
        head = 2 * B * (D * Z + Z * Z)
        total += 3 * (layers + stem + head)
    # Pixels have no gradient. Their values lack the depth of a patch, over which its weights are summed.
    total += 2 * 2 * B * image_tokens * PATCH // 2 * D
    # Similarities are computed once, although several processes compute those of their rows from either side.
    return total + 3 * (2 * B * B * Z + 2 * B * D * CLASSES)


@pytest.mark.parametrize("moe", [None, MOE, {**MOE, "experts": 8}, {**MOE, "experts": {"vision": 4, "text": 8}}])
def test_flops_are_those_of_the_closed_formula(moe):
    """Biases are not among them, but among the parameters that get a gradient."""
    recipe = recipe_of(moe, bias=moe == MOE)
    found = costs(recipe, recipe.make_modalities(), {head_key("all", "kind"): list(range(CLASSES))})
    assert {view: cost.flops for (_, view), cost in found.items()} == {
        0: by_hand(IMAGE_TOKENS, moe),
        1: by_hand(DROPPED, moe),
    }
    assert {cost.tokens for cost in found.values()} == {B * (t + TEXT_TOKENS) for t in (IMAGE_TOKENS, DROPPED)}
    expert_biases = {
        f"encoder.blocks.{i}.mlp.experts.{name}" for i in (1, 2) for name in ("up_bias_EF", "down_bias_ED")
    }
    assert all(expert_biases <= cost.params_with_grad for cost in found.values()) == (moe == MOE)
    shares = mixture(recipe, found)["stills"]
    assert shares["flops"] == pytest.approx((by_hand(IMAGE_TOKENS, moe) + 3 * by_hand(DROPPED, moe)) / 4)
    assert shares["examples"] == B


@pytest.mark.parametrize(
    "moe", ["null", "{experts: 2, layers: 1}", "{experts: {vision: 2, text: 4, audio: 3}, layers: 2}"]
)
def test_what_a_run_records_is_what_its_steps_compute(little_data, tmp_path, moe):
    """Counted on the real steps in fp32, where nothing chooses another attention."""
    changes = ["train={steps: 6, log_every: 6, num_workers: 0, precision: fp32}", "optimizer.muon_lr=1e-2"]
    recipe = Recipe.load(little_data / "recipe.yaml", [*changes, "model.bias=true", f"model.moe={moe}"])
    training = Trainer(set_up(recipe, tmp_path / "run"))
    computed, tokens = dict.fromkeys(recipe.tasks, 0), dict.fromkeys(recipe.tasks, 0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for loaded in load_batches(training.batches, 0):
            with FlopCounterMode(display=False) as counter:
                training.make_step(loaded)
            computed[loaded.visit.task] += counter.get_total_flops()
            tokens[loaded.visit.task] += sum(prod(each.values.shape[:2]) for each in loaded.batch.tokens.values())
    training.confirm_and_gather_bad_examples()
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
