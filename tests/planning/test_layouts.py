"""The layout of recipes that choose none, the layouts that a plan compares, and the one that it recommends."""

from dataclasses import replace

import pytest
import torch

from openimp.model.imp import build_for_training
from openimp.parallel.layout import Layout
from openimp.planning.gpus import GPUS, USABLE
from openimp.planning.layouts import STATE_SHARE, alternatives, default_layout, state_bytes
from openimp.planning.plan import plans, recommended
from openimp.planning.sharding import BANDWIDTH_SHARE, Group
from tests.trained import recipe_of


@pytest.mark.parametrize("muon", ["null", "0.02"])
def test_the_default_layout_shards_no_more_than_it_must(little_data, muon):
    changes = ["parallel.shard_degree=null", f"optimizer.muon_lr={muon}", "model.width=128", "model.moe.experts=4"]
    recipe = recipe_of(little_data, *changes)
    with torch.device("meta"):
        model = build_for_training(recipe, recipe.make_modalities(), {"pictures:label": [1, 2, 3, 4]})
    held = [state_bytes(recipe, model, Layout(16, shards, 1)) for shards in (1, 4, 16)]
    # Weights, gradients and EMA, and two tensors of AdamW, or one of Muon for most weights.
    numbers = sum(weight.numel() for weight in model.parameters())
    assert held[0] == 4 * (5 * numbers - (muon != "null") * sum(weight.numel() for weight in model.hidden_matrices()))
    assert held[1] == pytest.approx(held[0] / 4, rel=1e-3)

    def chosen(memory: float) -> Layout:
        return default_layout(recipe, model, 16, 4, memory)

    share = STATE_SHARE * USABLE
    assert chosen(1.001 * held[0] / share) == Layout(16, 1, 1)
    assert chosen(0.999 * held[0] / share) == chosen(1.001 * held[1] / share) == Layout(16, 4, 1)
    assert chosen(0.999 * held[1] / share) == chosen(0) == Layout(16, 16, 1)
    apart = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"expert_degree": 4})})
    assert default_layout(apart, model, 16, 4, 1.001 * held[0] / share) == Layout(16, 1, 4)


def test_layouts_that_the_gpus_cannot_form_are_no_alternatives(little_data):
    recipe = recipe_of(little_data)
    assert alternatives(recipe, 1) == [Layout(1, 1, 1)]
    assert alternatives(recipe, 3) == [Layout(3, 1, 1), Layout(3, 3, 1)]
    assert alternatives(recipe, 16) == [Layout(16, shards, owners) for owners in (1, 2) for shards in (1, 8, 16)]


@pytest.mark.parametrize(
    ("size", "stride", "gb_per_s"),
    [
        (8, 1, 450),  # over the links of a node
        (256, 1, 8 * 50),  # over the eight network cards of each node
        (32, 8, 50),
    ],
)
def test_collectives_take_as_long_as_their_bytes(size, stride, gb_per_s):
    traffic = Group(size, stride).all_gather(size * 10**9)
    assert traffic.received_bytes == (size - 1) * 10**9
    assert traffic.seconds(GPUS["h100"]) == pytest.approx((size - 1) / gb_per_s / BANDWIDTH_SHARE)
    # Links and network are used at the same time.
    both = traffic + Group(8).all_gather(8) + Group(256).all_gather(8)
    assert both.seconds(GPUS["h100"]) == pytest.approx(traffic.seconds(GPUS["h100"]))


def test_the_fastest_layout_that_fits_is_recommended(little_data):
    """For a large model and few examples: the network is slower than the link, and replicas need most memory."""
    changes = [
        "tasks.named.weight=0",
        "tasks.heard.batch_size=16",
        "model={width: 4096, mlp_dim: 16384, layers: 3, heads: 32}",
    ]
    recipe = recipe_of(little_data, *changes)
    replicas, node, everyone = plans(
        recipe, recipe.make_modalities(), {"pictures:label": [1, 2]}, gpus=16, gpu="h100", utilization=0.4
    )
    assert [plan.layout.shard_degree for plan in (replicas, node, everyone)] == [1, 8, 16]
    assert replicas.memory_bytes > node.memory_bytes > everyone.memory_bytes
    assert 1.1 * node.seconds < replicas.seconds
    assert recommended([replicas, node, everyone]) is node
    hardly_faster = replace(node, step_counts={key: round(0.95 * count) for key, count in node.step_counts.items()})
    assert recommended([node, hardly_faster]) is node, "the recipe's layout stays"
    # Shards over several nodes have latencies that are not counted.
    assert recommended([replicas, replace(everyone, step_counts=dict.fromkeys(everyone.step_counts, 0))]) is replicas

    def fit_into(memory_bytes: float) -> int:
        gpu = replace(node.gpu, memory_gib=memory_bytes / USABLE / 2**30)
        return recommended([replace(plan, gpu=gpu) for plan in (replicas, node, everyone)]).layout.shard_degree

    assert fit_into(0.99 * replicas.memory_bytes) == 8
    assert fit_into(0.99 * node.memory_bytes) == 16
    assert fit_into(0.5 * everyone.memory_bytes) == 16, "none fits, and this one needs the least"


def test_a_gain_of_microseconds_is_no_reason_for_another_layout(little_data):
    """The latencies of collectives, which are not counted, take longer."""
    changes = ["tasks.named.weight=0", "tasks.heard.batch_size=64", "model.moe.experts=4"]
    recipe = recipe_of(little_data, *changes)
    found = [*plans(recipe, recipe.make_modalities(), {}, gpus=8, gpu="h100", utilization=0.4)]
    assert found[0].seconds > 1.1 * min(plan.seconds for plan in found)
    assert recommended(found) is found[0]
