"""How long collectives take, what a step waits for, and the layout of recipes that choose none."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from openimp.model.imp import IMP
from openimp.parallel.layout import Layout
from openimp.planning.communication import Collective, Group
from openimp.planning.gpus import GPUS, USABLE
from openimp.planning.layouts import STATE_SHARE, alternatives, default_layout, state_bytes
from openimp.planning.sharding import UnitTraffic
from openimp.planning.timeline import Traffic
from openimp.recipe.schema import Recipe

H100 = GPUS["h100"]


@pytest.mark.parametrize(
    ("size", "stride", "ranks", "together"),
    [
        (6, 1, 6, 6),  # One node, which need not be full.
        (8, 1, 256, 8),
        (4, 2, 256, 4),
        (256, 1, 256, 8),
        (32, 8, 256, 1),  # Replicas of shards in a node.
        (64, 4, 256, 2),
        (3, 1, 24, 1),  # Some of these groups are in two nodes.
    ],
)
def test_groups_of_ranks_are_divided_over_nodes_of_eight(size, stride, ranks, together):
    assert Group.of(size, stride, ranks) == (size, together)


@pytest.mark.parametrize(
    ("kind", "group", "gigabytes", "bus"),
    [
        ("all-gather", Group(8, 8), 8, 350),  # NVIDIA/nccl#1281
        ("reduce-scatter", Group(8, 8), 8, 360),
        ("all-gather", Group(256, 8), 2, 200),  # NVIDIA/nccl#1218
        ("all-reduce", Group(256, 8), 2, 340),
    ],
)
def test_collectives_take_about_as_long_as_others_measured_on_h100(kind, group, gigabytes, bus):
    """`bus` is the bandwidth as nccl-tests reports it, in GB/s: received bytes per second."""
    collective = Collective(kind, group, gigabytes * 2**30)
    assert collective.seconds(H100) == pytest.approx(collective.received / (bus * 1e9), rel=0.25)


def test_small_collectives_take_as_long_as_their_hops():
    """With the protocol that NCCL uses for few bytes: a ring of 32 GPUs in four nodes, and a tree."""
    ring, tree = (Collective(kind, Group(32, 8), 4).seconds(H100) for kind in ("all-gather", "all-reduce"))
    assert ring == pytest.approx((6.6 + 28 * 0.6 + 3 * 2.7) * 1e-6, rel=1e-3)
    assert tree == pytest.approx((6.8 + 2 * (7 * 0.6 + 2 * 5)) * 1e-6, rel=1e-3)
    assert Collective("all-to-all", Group(8, 8), 4).seconds(H100) == pytest.approx((8.4 + 3.4) * 1e-6, rel=1e-3)


def test_an_all_to_all_uses_the_network_for_what_goes_to_other_nodes():
    """A GPU sends 7 of 15 parts within its node, and 8 over its own network card."""
    sent = Collective("all-to-all", Group(16, 8), 16 * 10**9)
    assert sent.seconds(H100) == pytest.approx(8e9 / (0.5 * H100.network * 1e9), rel=1e-3)


GATHER = Collective("all-gather", Group(8, 8), 10**9)
SCATTER = Collective("reduce-scatter", Group(8, 8), 10**9)
REDUCE = Collective("all-reduce", Group(4, 1), 10**7)
BLOCK, REST = UnitTraffic([GATHER], [SCATTER], [REDUCE]), UnitTraffic([], [SCATTER], [REDUCE])


def seconds(*collectives: Collective) -> float:
    return sum(collective.seconds(H100) for collective in collectives)


def test_a_step_waits_for_what_no_computation_can_hide():
    """If blocks compute for long: the first gather of either pass, the last reduction, and what is not of blocks."""
    traffic = Traffic([GATHER], [[BLOCK] * 4], [[BLOCK] * 4], [SCATTER], [REST, REST], [GATHER], [REDUCE])
    # The gradients of a head are scattered before the last block is gathered for the backward pass. Those of the first
    # block, which comes last in it, and those of the rest follow each other.
    exposed = seconds(GATHER, GATHER, SCATTER, SCATTER, GATHER, SCATTER, SCATTER, REDUCE, GATHER, REDUCE)
    assert traffic.waits(100, 200, H100) == pytest.approx(exposed)
    empty = UnitTraffic([], [], [])
    for slots in ([], [GATHER, SCATTER]):
        traffic = Traffic([], [[empty] * 4], [[empty] * 4], [], [empty], slots, [])
        assert traffic.waits(1, 2, H100) == pytest.approx(seconds(*slots))


def test_a_step_that_computes_nothing_waits_for_all_collectives():
    blocks = [[copy_of(BLOCK) for _ in range(4)]]
    traffic = Traffic([GATHER], blocks, blocks, [SCATTER], [REST], [], [SCATTER])
    between_shards = [each for each in traffic.collectives if each.kind != "all-reduce"]
    assert len(traffic.collectives) == 3 + 2 * 4 + 4 + 4 + 2
    # The all-reduces between replicas overlap with them, except for the last one.
    assert traffic.waits(0, 0, H100) == pytest.approx(seconds(*between_shards, REDUCE))


def copy_of(unit: UnitTraffic) -> UnitTraffic:
    return UnitTraffic(*unit)


def test_chunks_reduce_their_gradients_at_the_end():
    at_once, chunks = (Traffic([], [[BLOCK]] * n, [[BLOCK]] * n, [], [REST], [], []) for n in (1, 3))
    assert chunks.counts() == at_once.counts() | {("all-gather", 8): 6}
    assert chunks.waits(100, 200, H100) == pytest.approx(seconds(GATHER, GATHER, SCATTER, SCATTER, REDUCE))
    kept = replace(chunks, reshard_after_forward=False)
    assert kept.counts() == at_once.counts() - Counter({("all-gather", 8): 1})
    assert kept.waits(100, 200, H100) == pytest.approx(seconds(GATHER, SCATTER, SCATTER, REDUCE))


def test_frozen_blocks_are_not_gathered_again():
    """Of two blocks, gradients flow through the upper one only; or through none, as if only a head was trained."""
    part, none = (Traffic([], [[BLOCK] * 2], [again], [], [REST], [], []) for again in ([BLOCK], []))
    assert (part.counts()["all-gather", 8], none.counts()["all-gather", 8]) == (3, 2)
    assert part.waits(100, 200, H100) - none.waits(100, 200, H100) == pytest.approx(seconds(GATHER, SCATTER))


@pytest.mark.parametrize("muon", ["null", "0.02"])
def test_the_default_layout_shards_no_more_than_it_must(little_data, muon):
    changes = ["parallel.shard_degree=null", f"optimizer.muon_lr={muon}", "model.width=128", "model.moe.experts=4"]
    recipe = Recipe.load(little_data / "recipe.yaml", changes)
    with torch.device("meta"):
        model = IMP.from_recipe(recipe, recipe.make_modalities(), {"pictures:label": 4})
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
    experts = 4 * 2 * 128 * 64
    assert held[0] - state_bytes(apart, model, Layout(16, 1, 4)) == 3 / 4 * experts * 4 * (5 - (muon != "null"))
    # The two ranks of a node cannot divide these experts.
    assert default_layout(apart, model, 16, 2, 0.95 * held[0] / share) == Layout(16, 1, 4)
    assert default_layout(apart, model, 16, 2, held[1] / share) == Layout(16, 16, 4)


def test_layouts_that_the_gpus_cannot_form_are_no_alternatives(little_data):
    recipe = Recipe.load(little_data / "recipe.yaml")
    assert alternatives(recipe, 1) == [Layout(1, 1, 1)]
    assert alternatives(recipe, 3) == [Layout(3, 1, 1), Layout(3, 3, 1), Layout(3, 3, 1, False)]
    shards = [(1, True), (8, True), (8, False), (16, True), (16, False)]
    assert alternatives(recipe, 16) == [Layout(16, n, owners, reshard) for owners in (1, 2) for n, reshard in shards]
