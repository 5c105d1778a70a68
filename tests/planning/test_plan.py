"""The plan against published sizes, against what a run records, and against what a step really holds and sends.

torchrun runs this very file to measure what comes to each of four processes.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mixture import LARGEST_TASK
from processes import run, torchrun
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openimp.alternation import Alternation
from openimp.commands import run_plan
from openimp.common.device import product_speed
from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.data.step_batches import StepBatches
from openimp.model.embedder import in_chunks
from openimp.model.imp import IMP
from openimp.model.learning_rates import freeze
from openimp.objectives import sigmoid_nce, softmax_nce, task_losses
from openimp.parallel import distributed
from openimp.parallel.layout import apply_parallelism, local_shard
from openimp.planning.communication import LINK_SHARE
from openimp.planning.gpus import GPUS, USABLE, peak_flops
from openimp.planning.layouts import choose_layout
from openimp.planning.ledger import empty_batch, short
from openimp.planning.memory import StepMemory, step_memory
from openimp.planning.plan import PARTS, SIMILARITY, Plan, Step, count, per_token, plan, plans, recommended
from openimp.planning.tables import duration
from openimp.recipe.schema import Recipe
from openimp.study.trainers import peak_memory
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer
from openimp.training.updater import Updater


@pytest.mark.parametrize(
    ("name", "in_all", "token", "counted"),
    [("imp_b", 84.95, 86, 86.14), ("imp_moe_b", 509.7, 90, 86.21), ("imp_moe_l", 1057, 350, 304.2)],
)
def test_parameters_are_the_published_ones(name, in_all, token, counted):
    """Encoders in all are the paper's, and so are IMP-B's a token. How it counts those of experts it does not say."""
    recipe = Recipe.load(name)
    with torch.device("meta"):
        model = IMP.from_recipe(recipe, recipe.make_modalities())
    used = per_token(recipe, model) / 1e6
    assert float(f"{count(model.encoder) / 1e6:.4g}") == in_all
    assert used == pytest.approx(counted, abs=0.05)
    assert 0.85 < used / token < 1.01
    # By hand: four matrices of attention and two of the MLP a block, and the two linear layers of the stem.
    width, mlp, moe = recipe.model.width, recipe.model.mlp_dim, recipe.model.moe
    matrices = recipe.model.layers * (4 * width**2 + 2 * width * mlp) + 2 * width**2
    routers = moe.layers * moe.experts * width if moe else 0
    assert 1e6 * used == pytest.approx(matrices + routers, rel=1e-3)


def test_a_token_uses_the_biases_of_one_expert_per_layer(tiny_recipe):
    """Besides those of attention, and of the MLP of the dense layer."""

    def used(bias: bool) -> int:
        recipe = tiny_recipe({"bias": bias})
        with torch.device("meta"):
            return per_token(recipe, IMP.from_recipe(recipe, recipe.make_modalities()))

    assert used(True) - used(False) == 2 * (4 * 32 + 64 + 32)


CLASSES = {"pictures:label": ["blue", "green", "red", "white"]}


def plan_of(recipe: Recipe, gpus: int = 1, gpu: str = "h100", mfu: float = 0.4) -> Plan:
    return plan(recipe, recipe.make_modalities(), CLASSES, gpus, gpu, mfu)


def plans_of(recipe: Recipe, gpus: int = 1, gpu: str = "h100", mfu: float = 0.4) -> list[Plan]:
    return [*plans(recipe, recipe.make_modalities(), CLASSES, gpus, gpu, mfu)]


def test_flops_are_those_that_the_run_records(little_data, little_run):
    recipe = Recipe.load(little_data / "recipe.yaml")
    found = plan_of(recipe)
    totals = read_lines(little_run / "metrics.jsonl")[-1]["totals"]
    assert found.flops == sum(units["flops"] for units in totals.values())
    # AdamW moves 40 bytes per parameter that a task uses, and the EMA 12 per parameter.
    with torch.device("meta"):
        model = IMP.from_recipe(recipe, recipe.make_modalities(), {"pictures:label": 4})
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    moved = sum(
        n * (40 * sum(sizes[name] for name in found.steps[key].cost.touched) + 12 * sum(sizes.values()))
        for key, n in found.visits.items()
    )
    assert found.seconds == found.computing == pytest.approx(found.flops / (989e12 * 0.4) + moved / 3.35e12)
    assert sum(found.visits.values()) == recipe.train.steps
    steps = [(visit.task, visit.view) for visit in Alternation(recipe)]
    assert found.visits == {key: steps.count(key) for key in steps}


def test_the_planned_peak_is_near_the_measured_one(tmp_path):
    """On this CPU, in the precision that it trains in."""
    recipe = Recipe.load("mixture", LARGEST_TASK)
    classes = StepBatches(recipe, recipe.make_modalities()).classes
    counted = [
        step_memory(recipe, recipe.make_modalities(), classes, "stills", view, "auto", on_gpu=False).peak.total()
        for view in range(len(recipe.tasks["stills"].views))
    ]
    assert max(counted) == pytest.approx(peak_memory(recipe, tmp_path / "run"), rel=0.15)


def test_the_planned_peak_of_an_update_with_muon_is_near_the_measured_one(tmp_path):
    """Muon's iterations need most for square matrices. With few examples, the peak is in the update."""
    model = [f"model.{change}" for change in ("moe=null", "width=256", "mlp_dim=256", "layers=6")]
    recipe = Recipe.load("mixture", [*LARGEST_TASK, *model, "tasks.stills.batch_size=8"])
    modalities = recipe.make_modalities()
    found = plan(recipe, modalities, StepBatches(recipe, modalities).classes, 1, "h100", 0.4)
    (planned,) = {
        sum(step.memory[part] for part in (*PARTS, "Muon's buffers"))
        for (task, _), step in found.steps.items()
        if task == "stills"
    }
    assert planned == pytest.approx(peak_memory(recipe, tmp_path / "run"), rel=0.1)


def test_what_stays_between_steps_is_counted_to_the_byte(little_data, tmp_path):
    """Weights, both kinds of moments, averaged weights, once every task has had a step."""
    changes = ["optimizer.muon_lr=1e-2", "alternation.kind=intervals", "modalities.text.vocab_size=258"]
    changes += ["model.bias=true", "modalities.vision={patch: [2, 8, 8], positions: grid, tables: [2, 4, 4]}"]
    training = Trainer(set_up(Recipe.load(little_data / "recipe.yaml", changes), tmp_path / "run"))
    for step in range(2):
        training.make_step(training.data[step])
    training.log.metrics.close()
    states = [state for optimizer in training.updater.optimizers for state in optimizer.state.values()]
    moments = [tensor for state in states for key, tensor in state.items() if key != "step"]
    held = [*training.model.parameters(), *moments, *training.updater.ema.weights.values()]
    memory = plan_of(training.recipe).steps["heard", 0].memory
    never = 2 * 4 * len(training.model.pairs)  # Moments of the sigmoid loss' bias, which this recipe does not use.
    assert memory["parameters"] + memory["optimizer state"] == sum(tensor.nbytes for tensor in held) + never


def test_activations_of_a_block_on_a_gpu_match_a_hand_count(tiny_recipe):
    """By hand, in bytes a token: both norms keep their input in fp32 and two statistics, linear layers and attention
    what they read and made in bf16."""
    width, hidden, tokens = 64, 256, 16 * 16
    task = {"source": "all", "inputs": {"image": "image"}, "batch_size": 16, "views": [{"image": {"size": 32}}],
            "objectives": [{"type": "classification", "label": "kind"}]}  # fmt: skip

    def held(layers: int) -> int:
        sizes = {"width": width, "mlp_dim": hidden, "heads": 1, "layers": layers, "moe": None}
        recipe = tiny_recipe(model=sizes, modalities={"vision": {"patch": [2, 8, 8]}}, tasks={"named": task})
        counted = step_memory(recipe, recipe.make_modalities(), {"all:kind": [0, 1]}, "named", 0, "bf16")
        return max(counted.stages.values())

    norms = 2 * (4 * width + 2 * 4)
    attention = 2 * (width + 3 * width + width) + 4
    assert held(5) - held(4) == pytest.approx(tokens * (norms + attention + 2 * (width + 2 * hidden)), rel=0.01)


def inside(step: Step) -> int:
    """Bytes received by collectives within a node."""
    return sum(each.received for each in step.traffic.collectives if each.group.together == each.group.size)


def test_several_gpus_divide_and_speak_as_the_page_says(little_data):
    changes = ["tasks.named.weight=0", "tasks.heard.batch_size=64", "parallel.shard_degree=2"]
    recipe = Recipe.load(little_data / "recipe.yaml", changes)
    alone, shared = plan_of(recipe), plan_of(recipe, gpus=2)
    with torch.device("meta"):
        model = IMP.from_recipe(recipe, recipe.make_modalities(), {"pictures:label": 4})
    blocks, block = count(model.encoder.blocks), count(model.encoder.blocks[1])
    parts = [model.encoder.norm, *(model.stems[m] for m in ("audio", "text"))]
    touched = (
        1 + sum(map(count, [*parts, *(model.projections[m] for m in ("audio-to-text", "text-to-audio"))])) + blocks
    )
    outside, vectors = count(model) - blocks, 4 * 2 * 64 * 32
    before, after = alone.steps["heard", 0], shared.steps["heard", 0]
    assert before.received == 0
    # Gathered in bf16 once and for two projections, blocks for one pass there and back; touched gradients in fp32,
    # numbers of items.
    received = 2 * (3 * outside + 2 * blocks) + 4 * touched + 2 * vectors + 8 * 64
    assert after.received == inside(after) == pytest.approx(received / 2, rel=1e-4)
    similarities = 2 * SIMILARITY * 32 * 32
    # At the peak, no gradient is complete.
    copies = 2 * (outside + 2 * block) + 2 * count(model.temperatures)  # These stay fp32.
    assert after.memory["gathered"] == copies + 2 * vectors + similarities
    assert before.memory["cast weights"] > after.memory["cast weights"] == 0
    assert after.memory["gradients"] == 0
    for kind in ("parameters", "optimizer state", "inputs"):
        assert after.memory[kind] == before.memory[kind] // 2
    # Less than half of those on one GPU, where autocast makes norms fp32.
    assert 0.8 < 2 * after.memory["activations"] / before.memory["activations"] < 0.9
    quarter = plan_of(recipe, gpus=4).steps["heard", 0]
    assert quarter.memory["activations"] == pytest.approx(after.memory["activations"] / 2, rel=0.1)
    assert shared.computing == pytest.approx(alone.seconds / 2, rel=1e-3)
    # Over a link of one byte per second, a step does nothing but wait.
    slow = replace(shared, gpu=replace(shared.gpu, link=1e-9))
    assert slow.waiting == pytest.approx(slow.visits["heard", 0] * after.received / LINK_SHARE, rel=1e-3)


def test_replicas_reduce_their_gradients_once_whatever_the_chunks(little_data):
    """The model has many parameters and few examples, so that gathered weights would be seen."""
    changes = [
        "tasks.named.weight=0",
        "tasks.heard.batch_size=4",
        "model.width=256",
        "model.mlp_dim=4096",
        "parallel.shard_degree=1",
    ]
    recipe, pieces = (
        Recipe.load(little_data / "recipe.yaml", [*changes, f"memory.chunk_size={n}"]) for n in ("null", 1)
    )
    alone, shared, again = (plan_of(r, n).steps["heard", 0] for r, n in ((recipe, 1), (recipe, 4), (pieces, 4)))
    for kind in ("parameters", "optimizer state"):
        assert shared.memory[kind] == alone.memory[kind]
    similarities = 2 * 4 * 4 * 3 // 4 // 4
    with torch.device("meta"):
        model = IMP.from_recipe(recipe, recipe.make_modalities(), {"pictures:label": 4})
    # FSDP2 computes with copies of the weights: of one block, and of everything outside of the blocks. At the peak,
    # there are gradients of a block, too.
    blocks, block = count(model.encoder.blocks), max(map(count, model.encoder.blocks))
    copies = 2 * (count(model) - blocks + block) + 6 * block + 2 * count(model.temperatures)
    assert shared.memory["gathered"] == copies + 8 * 32 * 8 + SIMILARITY * similarities
    gradients = sum(4 * weight.numel() for name, weight in model.named_parameters() if name in shared.cost.touched)
    assert gradients > 1000 * 8 * 32 * 8
    assert 0 < shared.memory["gradients"] <= gradients
    received = 2 * gradients + 8 * 2 * 4 * 32 + 8 * 4  # Vectors of two sides, and numbers of their items.
    for step in (shared, again):
        assert step.received == inside(step) == pytest.approx(3 / 4 * received, rel=1e-4)


def test_with_expert_parallelism_experts_stay_and_slots_travel(little_data):
    """To them and back in bf16; their gradients likewise."""
    changes = ["tasks.named.weight=0", "tasks.heard.batch_size=32", "model.moe={experts: 4, layers: 1}"]

    def held_as(parallel: str, *more: str) -> Step:
        recipe = Recipe.load(little_data / "recipe.yaml", [*changes, f"parallel={parallel}", *more])
        return plan_of(recipe, gpus=16).steps["heard", 0]

    eight = "{shard_degree: 8}", "{shard_degree: 8, expert_degree: 4}"
    sharded, apart = map(held_as, eight)
    experts = 4 * 2 * 32 * 64
    elsewhere = experts * 3 // 4
    for kind in ("parameters", "optimizer state"):
        assert apart.memory[kind] == sharded.memory[kind]
    # With more examples, the peak is before a gradient is complete: two blocks in bf16.
    many = [held_as(parallel, "tasks.heard.batch_size=256") for parallel in eight]
    assert many[1].memory["gathered"] == many[0].memory["gathered"] - 2 * 2 * elsewhere
    # One pass there and back in bf16 and its gradients in fp32, of all experts from 8 GPUs, or of a quarter from 2.
    slots = (2 + 2) * 32 * 2 * apart.cost.tokens // 16
    saved = (2 + 2 + 4) * (experts * 7 // 8 - (experts - elsewhere) // 2) - slots * 3 // 4
    counts = 64  # Bytes for the gradient norm and the number of tokens.
    assert inside(apart) == pytest.approx(inside(sharded) - saved, abs=counts)
    # An eighth of the gradients in either of two copies, and what the loss compares with all.
    with torch.device("meta"):
        recipe = Recipe.load(little_data / "recipe.yaml", changes)
        model = IMP.from_recipe(recipe, recipe.make_modalities(), {"pictures:label": 4})
    gradients = sum(4 * weight.numel() for name, weight in model.named_parameters() if name in sharded.cost.touched)
    assert apart.received - inside(apart) == pytest.approx(gradients / 8 + 15 / 16 * (8 * 32 * 2 + 8) * 32, rel=1e-3)
    assert apart.received - inside(apart) == pytest.approx(sharded.received - inside(sharded), abs=counts)

    copies, own = held_as("{shard_degree: 1}"), held_as("{shard_degree: 1, expert_degree: 4}")
    assert own.memory["parameters"] == copies.memory["parameters"] - 4 * elsewhere
    # The peak of both is at the end, when the gradients outside of the blocks are reduced.
    assert own.memory["gradients"] == copies.memory["gradients"] - 4 * elsewhere == gradients - 4 * elsewhere
    # Four have the same experts; sixteen have all the rest.
    summed = 2 * 4 * (experts * 15 // 16 - (experts - elsewhere) * 3 // 4)
    assert inside(copies) == 0
    assert own.received - inside(own) == pytest.approx(copies.received - summed, abs=counts)
    assert inside(own) == pytest.approx(slots * 3 // 4, abs=counts)


SMALL = ["train.precision=fp32", "tasks.heard.weight=0", "tasks.named.views=[{image: {size: 16}}]"]
MUON = "optimizer.muon_lr=1e-3"
CHUNKS = "memory={chunk_size: 1, activation_checkpointing: true}"
BF16 = "train.precision=bf16"
DISTILL = """tasks.named.objectives=[{type: distill, of: image, to: vector, loss: contrastive},
    {type: distill, of: text, to: vector}, {type: contrastive}]"""
SCALE, ALL_LAYERS = "optimizer.lr_scale", "model.layers=4"
LAYOUTS = {
    "in shards": ["tasks.named.objectives=[{type: contrastive, loss: sigmoid}]", "model.modality_specific_layers=1"],
    "in shards, Muon": [MUON],
    "in shards, token choice, recomputed": ["model.moe.routing=token_choice", "memory.activation_checkpointing=true"],
    "in two groups, Muon": ["parallel.shard_degree=2", MUON],
    "expert parallelism, in chunks": ["parallel.expert_degree=2", CHUNKS],
    "expert parallelism, Muon": ["parallel.expert_degree=2", MUON],
    "in two groups, expert parallelism": ["parallel={shard_degree: 2, expert_degree: 2}"],
    "replicas, in chunks": ["parallel.shard_degree=1", CHUNKS],
    "replicas, Muon": ["parallel.shard_degree=1", MUON],
    "replicas, expert parallelism, Muon": ["parallel={shard_degree: 1, expert_degree: 2}", MUON],
    "kept gathered, in chunks": ["parallel.reshard_after_forward=false", CHUNKS],
    "kept gathered, expert parallelism": ["parallel.expert_degree=2", "parallel.reshard_after_forward=false"],
    "in shards, bf16": [BF16],  # The temperature is a group of its own.
    "in two groups, expert parallelism, bf16, Muon": [BF16, "parallel={shard_degree: 2, expert_degree: 2}", MUON],
    "replicas, in chunks, bf16": [BF16, "parallel.shard_degree=1", CHUNKS],
    "in shards, distillation": [DISTILL],
    "in shards, the upper block and the heads are trained": [f"{SCALE}={{stems: 0, encoder.blocks.0: 0}}", ALL_LAYERS],
    "in two groups, the encoder is frozen, Muon": [f"{SCALE}={{encoder: 0}}", "parallel.shard_degree=2", MUON],
    "in chunks, only heads are trained, bf16": [f"{SCALE}={{encoder: 0, stems: 0}}", CHUNKS, BF16],
    "in shards, pictures are frozen, recomputed": [
        f"{SCALE}={{stems.vision: 0, encoder.own.vision: 0, projections.vision-to-text: 0}}",
        "model={modality_specific_layers: 1, layers: 4, moe: {experts: 2, layers: 4, routing: token_choice}}",
        "memory.activation_checkpointing=true",
    ],
    "expert parallelism, experts are frozen, Muon": [
        f"{SCALE}={{encoder.blocks.1.mlp.experts: 0}}",
        "parallel.expert_degree=2",
        MUON,
    ],
}
"""Unless they say otherwise, all ranks share one replica, in fp32."""


def recipe_in(layout: str, file: Path, ranks: int) -> Recipe:
    return Recipe.load(file, [*SMALL, f"parallel.shard_degree={ranks}", *LAYOUTS[layout]])


class Received(TorchDispatchMode):
    """Counts collectives, and the bytes that this rank receives by them if they are rings."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.calls = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # The collectives within the operation are dispatched next.
        name, given = func._opname, [*tree_leaves(args), *tree_leaves(kwargs)]
        if func.namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "_wrap")):
            kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
            (kind,) = (each for each in kinds if name.replace("_", "").startswith(each.replace("-", "")))
            sizes = [leaf.nbytes for leaf in given if isinstance(leaf, torch.Tensor)]
            (group,) = (found for leaf in given if (found := _group(leaf)))
            if group.size() > 1:
                # The first tensor of an all-to-all is what it receives. Functional all-gathers get their input only.
                size = sizes[0] if kind == "all-to-all" else max(sizes)
                share = group.size() if name.startswith("all_gather") else 2 if kind == "all-reduce" else 1
                self.calls[f"{kind} {group.size()}"] += 1
                self.bytes += share * size * (group.size() - 1) // group.size()
        return func(*args, **(kwargs or {}))


def _group(leaf: Any) -> Any:
    if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in leaf._type().name():
        return dist.ProcessGroup.unbox(leaf)
    return dist.distributed_c10d._resolve_process_group(leaf) if isinstance(leaf, str) and leaf.isdigit() else None


def measure_received(file: Path, out: Path) -> None:
    """Of a step in each layout, a file of this process."""
    found = {}
    for name in LAYOUTS:
        device = distributed.start()
        options = recipe_in(name, file, distributed.world_size())
        modalities = options.make_modalities()
        model = IMP.from_recipe(options, modalities, {"pictures:label": 4}).train()
        freeze(model, options.optimizer)
        layout = choose_layout(options, model, device)
        apply_parallelism(
            model, model.blocks(), model.experts(), ("encode_all", "project", "classify"), layout, device,
            torch.bfloat16 if options.train.precision == "bf16" else torch.float32, model.fp32_modules(),
        )  # fmt: skip
        batch = empty_batch(options, "named", 0, modalities, CLASSES, device, distributed.world_size())
        encode = in_chunks(model.encode_all, options.memory.chunk_size)
        updater = Updater(options, model)
        with Received() as received:
            task_losses(model, options.tasks["named"], batch, encode).total.backward()
            updater.step(0)
        frozen = sum(local_shard(weight).numel() for weight in model.parameters() if not weight.requires_grad)
        found[name] = {"bytes": received.bytes, "calls": received.calls, "frozen": frozen}
    (out / f"{distributed.rank()}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_make_the_planned_collectives_and_receive_the_planned_number_of_bytes(little_data, tmp_path, ranks):
    """Of a step and its update, including Muon's and those of experts. They hold the planned frozen parameters."""
    file = little_data / "recipe.yaml"
    run(*torchrun(ranks, __file__, file, tmp_path), check=True)
    measured = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    for name in LAYOUTS:
        found = plan_of(recipe_in(name, file, ranks), gpus=ranks)
        step = found.steps["named", 0]
        planned = {f"{kind} {size}": n for (kind, size), n in step.traffic.counts().items()}
        assert [each[name]["calls"] for each in measured] == ranks * [planned], name
        # On average, because a rank receives Muon's matrices that it owns. Above it by what FSDP2 pads.
        received = sum(each[name]["bytes"] for each in measured) / ranks
        assert step.received == pytest.approx(received, rel=3e-3), name
        replicas = ranks // found.layout.shard_degree
        assert sum(each[name]["frozen"] for each in measured) == replicas * found.frozen, name


@pytest.mark.parametrize("chunks", [[], [CHUNKS]], ids=["whole", "chunks"])
def test_activations_are_counted_for_each_number_of_complete_gradients(little_data, chunks):
    recipe = Recipe.load(little_data / "recipe.yaml", chunks)
    modalities = recipe.make_modalities()
    counted = step_memory(recipe, modalities, CLASSES, "named", 0, "fp32")
    sizes = [*counted.touched.values()]
    assert sizes == sorted(sizes)
    assert counted.stages.keys() == {0, *sizes}
    with torch.device("meta"):
        model = IMP.from_recipe(recipe, modalities, {"pictures:label": 4})
    assert sizes[-1] == sum(4 * weight.numel() for name, weight in model.named_parameters() if name in counted.touched)
    first, last = counted.stages[0], counted.stages[sizes[-1]]
    if chunks:  # Each is computed again in the backward pass.
        assert first < max(counted.stages.values())
    else:
        assert max(counted.stages.values()) == first > 2 * last


@pytest.mark.parametrize("loss", [softmax_nce, sigmoid_nce])
def test_the_bytes_of_a_similarity_are_counted(loss):
    with FakeTensorMode():
        sides = nn.ParameterList([torch.empty(100, 2), torch.empty(800, 2)])
        with StepMemory(sides) as memory:
            loss(sides[0] @ sides[1].T, torch.zeros(100, 800, dtype=torch.bool)).sum().backward()
    assert max(memory.stages.values()) / (100 * 800) == pytest.approx(SIMILARITY, rel=0.02)


def test_fits_or_not(little_data):
    """A batch that is too large for one GPU and not for another."""
    changes = ["tasks.heard.batch_size=4000", "tasks.named.weight=0", "model.width=8192"]
    small = plan_of(Recipe.load(little_data / "recipe.yaml", changes), gpu="rtx4090")
    assert small.largest == ("heard", 0)
    assert GPUS["rtx4090"].memory * USABLE < small.memory / 2**30 < GPUS["h200"].memory * USABLE
    assert (small.fits, replace(small, gpu=GPUS["h200"]).fits) == (False, True)


def test_what_prefetching_holds_is_not_more_than_planned(little_data):
    """In CPU memory, whatever the number of workers: pictures are smaller than planned, as they are uint8."""
    for changes, part in (([], 1), (["tasks.named.weight=0"], 1), (["tasks.named.views.1.batch_size=8"], 2)):
        recipe = Recipe.load(little_data / "recipe.yaml", [*changes, "train.num_workers=3", "train.prefetch_factor=5"])
        data = StepBatches(recipe, recipe.make_modalities(), world_size=part)
        data.fit()
        sizes = {False: 0, True: 0}  # as they are, and with pictures in fp32
        for step in range(len(data)):
            leaves = [leaf for leaf in tree_leaves(vars(data[step].batch)) if isinstance(leaf, torch.Tensor)]
            for fp32 in sizes:
                held = sum(t.nbytes * (4 if fp32 and t.dtype == torch.uint8 else 1) for t in leaves)
                sizes[fp32] = max(sizes[fp32], held)
        planned = plan_of(recipe, gpus=part).prefetched
        assert 5 * sizes[False] <= planned == 5 * sizes[True]
    assert plan_of(Recipe.load(little_data / "recipe.yaml", ["train.num_workers=0"])).prefetched == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"gpu": "h1000"}, "--gpu: no GPU is called 'h1000'; did you mean 'h100'?"),
        ({"gpus": 0}, "--gpus: expected 1 or more, found 0"),
        ({"mfu": 1.5}, "--mfu: expected a share above 0 and at most 1, found 1.5"),
        (
            {"gpus": 4},
            "--gpus: 4 GPUs do not divide a batch evenly: 6 of tasks.named.views[1], 6 of tasks.heard.views[0]",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(little_data, change, told):
    with pytest.raises(UserError) as refused:
        plan_of(Recipe.load(little_data / "recipe.yaml"), **change)
    assert str(refused.value) == told


@pytest.mark.parametrize(
    ("parallel", "told"),
    [
        ("{shard_degree: 4}", "parallel.shard_degree: 6 ranks cannot be divided into groups of 4"),
        (
            "{shard_degree: 3, expert_degree: 2}",
            "parallel.expert_degree: the 3 ranks that share a replica cannot be divided into groups of 2",
        ),
        (
            "{shard_degree: 1, expert_degree: 4}",
            "parallel.expert_degree: 6 ranks cannot be divided into groups of 4",
        ),
    ],
)
def test_a_model_that_processes_cannot_hold_so_is_refused(little_data, parallel, told):
    changes = ["model.moe.experts=4", "tasks.named.weight=0", f"parallel={parallel}"]
    recipe = Recipe.load(little_data / "recipe.yaml", changes)
    with pytest.raises(UserError) as refused:
        plan_of(recipe, gpus=6)
    assert str(refused.value) == told
    assert plan_of(recipe, gpus=1).fits


def test_the_command_prints_the_plan(little_data, capsys):
    changes = ["train.steps=7", "tasks.heard.weight=0", "parallel.shard_degree=2"]
    run_plan(str(little_data / "recipe.yaml"), changes, 2, "a100", 0.5)
    printed = capsys.readouterr().out
    found, other, *more = plans_of(Recipe.load(little_data / "recipe.yaml", changes), 2, "a100", 0.5)
    assert (str(found.layout), str(other.layout)) == ("{shard_degree: 2}", "{shard_degree: 1}")
    assert [str(each.layout) for each in more] == [
        "{shard_degree: 2, reshard_after_forward: false}",
        "{shard_degree: 1, expert_degree: 2}",
        "{shard_degree: 2, expert_degree: 2}",
        "{shard_degree: 2, expert_degree: 2, reshard_after_forward: false}",
    ]
    task, view = found.largest
    step = found.steps[task, view]
    row = [f"{task}, {view}", f"{step.cost.examples}", f"{step.cost.tokens}", short(step.cost.flops)]
    row += [f"{1e3 * found.computes(step):.1f}", f"{1e3 * found.waits(step):.1f}", f"{step.received / 1e9:.2f}"]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    assert [*row, f"{len(step.traffic.collectives)}"] in [cells[:8] for cells in rows]
    for each in (found, other, *more):
        name, _, kept = str(each.layout).partition(", reshard_after_forward")
        row = [name.removesuffix("}") + "}", "no" if kept else "yes", f"{each.memory / 2**30:.1f}", "yes"]
        assert row in [cells[:4] for cells in rows]
    assert f"largest step: {task}, view {view}" in printed
    assert re.search(rf"in all, at most\W+{sum(found.parameters.values()):,}\b", printed)
    assert re.search(rf"used by a token on average, after its embedding\W+{found.per_token:,}\b", printed)
    assert re.search(rf"activations\W+{found.steps[found.largest].memory['activations'] / 2**30:.3f}\b", printed)
    assert f"little fits: {found.memory / 2**30:.2f} of 71.1 GiB for tensors on each of 2 x a100" in printed
    assert f"7 steps, {short(found.flops)}FLOPs: 0:00 at an MFU of 50%" in printed
    assert "parallel: {shard_degree: 2}; better: {shard_degree: 1}" in printed


def test_the_peak_of_a_device_is_that_of_the_plan_if_it_has_one(monkeypatch):
    cpu = torch.device("cpu")
    assert peak_flops(cpu, "fp32") == product_speed(cpu, "fp32")
    named = [(name, gpu) for gpu in GPUS.values() for name in gpu.names]
    assert len(named) == len({name for name, _ in named}) >= len(GPUS)
    for name, gpu in named:
        monkeypatch.setattr("torch.cuda.get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda"), "fp32") == gpu.tflops * 1e12


def test_the_fastest_layout_that_fits_is_recommended(little_data):
    """For a large model and few examples: the network is slower than the link, and replicas need most memory."""
    changes = [
        "tasks.named.weight=0",
        "tasks.heard.batch_size=16",
        "model={width: 4096, mlp_dim: 16384, layers: 3, heads: 32}",
    ]
    found = plans_of(Recipe.load(little_data / "recipe.yaml", changes), 16, "h100")
    by_degree = {each.layout.shard_degree: each for each in found if each.layout.reshard_after_forward}
    kept = {each.layout.shard_degree: each for each in found if not each.layout.reshard_after_forward}
    assert ([*by_degree], [*kept]) == ([1, 8, 16], [8, 16])
    for degree, each in kept.items():  # Gathered once and not twice per step, and more memory.
        assert each.seconds < by_degree[degree].seconds
        assert each.memory > by_degree[degree].memory
    assert by_degree[8].memory < by_degree[1].memory
    assert by_degree[8].seconds < by_degree[16].seconds
    fastest = min(found, key=lambda each: each.seconds)
    assert recommended(found[::-1]) is fastest
    assert recommended([found[0], replace(found[0], mfu=0.401)]) is found[0]  # It is hardly faster.
    tight = [replace(each, gpu=replace(each.gpu, memory=by_degree[1].memory / 2**30)) for each in found]
    assert [each.fits for each in tight] == [False, True, True, True, True]
    assert recommended(tight).layout.shard_degree == 8
    none = [replace(each, gpu=replace(each.gpu, memory=1e-3)) for each in found]
    assert recommended(none).memory == min(each.memory for each in none)


def test_a_run_of_days_is_told_in_days():
    assert [duration(seconds) for seconds in (59.6, 86_399, 86_400, 1e6)] == [
        "1:00",
        "23:59:59",
        "1.0 days",
        "11.6 days",
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure_received(Path(sys.argv[1]), Path(sys.argv[2]))
    distributed.shut_down()
