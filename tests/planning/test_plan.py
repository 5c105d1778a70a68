"""The plan against what a run records, and against what a step really holds and sends."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openimp.commands import run_plan
from openimp.common.json_lines import read_lines
from openimp.data.task_data import TaskData
from openimp.model.embedder import in_chunks
from openimp.model.imp import build_for_training
from openimp.objectives.losses import task_losses
from openimp.parallel import distributed
from openimp.parallel.layout import apply_parallelism
from openimp.planning.costs import short, zero_batch
from openimp.planning.gpus import GIB, peak_flops
from openimp.planning.layouts import choose_layout
from openimp.planning.memory import CPU, step_memory
from openimp.planning.plan import Plan, plans
from openimp.recipe.schema import Recipe
from openimp.study.variants import peak_memory
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer
from openimp.training.updater import Updater
from tests import ranks
from tests.messages import refuses
from tests.mixture import LARGEST_TASK
from tests.trained import recipe_of, trainer_of

CLASSES = {"pictures:label": ["blue", "green", "red", "white"]}


def plan_of(recipe: Recipe, gpus: int = 1, gpu: str = "h100", mfu: float = 0.4, classes: Any = CLASSES) -> Plan:
    return next(plans(recipe, recipe.make_modalities(), classes, gpus=gpus, gpu=gpu, utilization=mfu))


def test_flops_are_those_that_the_run_records(little_data, little_run):
    recipe = recipe_of(little_data)
    found = plan_of(recipe)
    totals = read_lines(little_run / "metrics.jsonl")[-1]["totals"]
    assert found.flops == sum(units["flops"] for units in totals.values())
    assert found.seconds == found.compute_seconds == pytest.approx(found.flops / (989e12 * 0.4))
    assert sum(found.step_counts.values()) == recipe.train.steps


@pytest.mark.slow
def test_the_planned_peak_is_near_the_measured_one(tmp_path):
    """On this CPU, in the precision that it trains in."""
    recipe = Recipe.load("mixture", LARGEST_TASK)
    classes = TaskData(recipe, recipe.make_modalities()).classes
    planned = [
        step_memory(recipe, recipe.make_modalities(), classes, "stills", view, precision="auto", on_gpu=False)
        for view in range(len(recipe.tasks["stills"].views))
    ]
    assert max(memory.peak.total() for memory in planned) == pytest.approx(
        peak_memory(Trainer(set_up(recipe, tmp_path / "run"))), rel=0.15
    )


@pytest.mark.slow
def test_the_planned_peak_of_an_update_with_muon_is_near_the_measured_one(tmp_path):
    """Muon's iterations need most for square matrices. With few examples, the peak is in the update."""
    model = [f"model.{change}" for change in ("moe=null", "width=256", "mlp_dim=256", "layers=6")]
    recipe = Recipe.load("mixture", [*LARGEST_TASK, *model, "tasks.stills.batch_size=8"])
    found = plan_of(recipe, classes=TaskData(recipe, recipe.make_modalities()).classes)
    planned = max(step.memory.temporary for (task, _), step in found.step_needs.items() if task == "stills")
    assert planned == pytest.approx(peak_memory(Trainer(set_up(recipe, tmp_path / "run"))), rel=0.1)


def test_what_stays_between_steps_is_counted_to_the_byte(little_data, tmp_path):
    """Weights, both kinds of moments, averaged weights, once every task has had a step."""
    changes = ["optimizer.muon_lr=1e-2", "alternation.kind=intervals", "modalities.text.vocab_size=258"]
    changes += ["model.bias=true", "modalities.vision={patch: [2, 8, 8], positions: grid, tables: [2, 4, 4]}"]
    training = trainer_of(little_data, tmp_path / "run", *changes)
    for step in range(2):
        training.make_step(training.batches[step])
    training.log.close()
    states = [state for optimizer in training.updater.optimizers for state in optimizer.state.values()]
    moments = [tensor for state in states for key, tensor in state.items() if key != "step"]
    held = [*training.model.parameters(), *moments, *training.updater.ema.weights.values()]
    memory = plan_of(training.recipe).step_needs["heard", 0].memory
    never = 2 * 4 * len(training.model.pairs)  # Moments of the sigmoid loss' bias, which this recipe does not use.
    assert memory.parameters + memory.optimizer_state == sum(tensor.nbytes for tensor in held) + never


def test_activations_of_a_block_on_a_gpu_match_a_hand_count(tiny_recipe):
    """By hand, in bytes a token: both norms keep their input in fp32 and two statistics, linear layers and attention
    what they read and made in bf16. In the forward pass, autocast keeps the weights in bf16."""
    width = 64
    hidden = 256
    tokens = 16 * 16
    task = {"source": "all", "inputs": {"image": "image"}, "batch_size": 16, "views": [{"image": {"size": 32}}],
            "objectives": [{"type": "classification", "label": "kind"}]}  # fmt: skip

    def held(layers: int) -> int:
        sizes = {"width": width, "mlp_dim": hidden, "heads": 1, "layers": layers, "moe": None}
        recipe = tiny_recipe(model=sizes, modalities={"vision": {"patch": [2, 8, 8]}}, tasks={"named": task})
        counted = step_memory(recipe, recipe.make_modalities(), {"all:kind": [0, 1]}, "named", 0, precision="bf16")
        return counted.forward_activations

    norms = 2 * (4 * width + 2 * 4)
    attention = 2 * (width + 3 * width + width) + 4
    weights = 2 * (4 * width * width + 2 * width * hidden)
    expected = tokens * (norms + attention + 2 * (width + 2 * hidden)) + weights
    assert held(5) - held(4) == pytest.approx(expected, rel=0.01)


def test_several_gpus_divide_a_step(little_data):
    changes = ["tasks.named.weight=0", "tasks.heard.batch_size=64", "model.moe={experts: 4, layers: 1}"]

    layouts = ((1, "{}"), (4, "{shard_degree: 4}"), (4, "{shard_degree: 1, expert_degree: 4}"))
    planned = [plan_of(recipe_of(little_data, *changes, f"parallel={layout}"), gpus) for gpus, layout in layouts]
    alone, shards, experts = (plan.step_needs["heard", 0].memory for plan in planned)
    assert shards.parameters == pytest.approx(alone.parameters / 4, abs=64)
    assert shards.optimizer_state == pytest.approx(alone.optimizer_state / 4, abs=64)
    assert experts.parameters == alone.parameters - 4 * 4 * 2 * 32 * 64 * 3 // 4
    assert shards.inputs == alone.inputs // 4
    assert 0.8 < 4 * shards.activations / alone.activations < 1
    assert planned[1].compute_seconds == pytest.approx(planned[0].seconds / 4, rel=1e-3)
    assert planned[0].wait_seconds == 0 < planned[1].wait_seconds


SMALL = ["train.precision=fp32", "tasks.heard.weight=0", "tasks.named.views=[{image: {size: 16}}]"]
MUON = "optimizer.muon_lr=1e-3"
CHUNKS = "memory={chunk_size: 1, activation_checkpointing: true}"
BF16 = "train.precision=bf16"
DISTILL = """tasks.named.objectives=[{type: distill, of: image, to: vector, loss: contrastive},
    {type: distill, of: text, to: vector}, {type: contrastive}]"""
LAYOUTS = {
    "in shards": [
        "tasks.named.objectives=[{type: contrastive, loss: sigmoid}]",
        "tasks.named.batch_size=64",
        "model.modality_specific_layers=1",
    ],
    "in shards, Muon": ["tasks.named.batch_size=64", MUON],
    "in two groups, Muon": ["parallel.shard_degree=2", MUON],
    "in shards, distillation, bf16": [BF16, DISTILL, "tasks.named.batch_size=64"],
    "expert parallelism, in chunks": ["parallel.expert_degree=2", CHUNKS],
    "expert parallelism, bf16, Muon": [BF16, "parallel={shard_degree: 2, expert_degree: 2}", MUON],
    "replicas, Muon": ["parallel.shard_degree=1", MUON],
    "replicas, in chunks, bf16": [BF16, "parallel.shard_degree=1", CHUNKS],
    "replicas, expert parallelism": ["parallel={shard_degree: 1, expert_degree: 2}"],
    "kept gathered, in chunks": ["parallel.reshard_after_forward=false", CHUNKS],
}
"""Unless they say otherwise, all ranks share one replica, in fp32."""


def recipe_in(layout: str, file: Path, ranks: int) -> Recipe:
    return Recipe.load(file, [*SMALL, f"parallel.shard_degree={ranks}", *LAYOUTS[layout]])


class Received(TorchDispatchMode):
    """Counts the bytes that this rank receives by collectives if they are rings."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # The collectives within the operation are dispatched next.
        name = func._opname
        given = [*tree_leaves(args), *tree_leaves(kwargs)]
        if func.namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "_wrap")):
            sizes = [leaf.nbytes for leaf in given if isinstance(leaf, torch.Tensor)]
            (group,) = (found for leaf in given if (found := _group(leaf)))
            # The first tensor of an all-to-all is what it receives. Functional all-gathers get their input only.
            size = sizes[0] if name.replace("_", "").startswith("alltoall") else max(sizes)
            share = group.size() if name.startswith("all_gather") else 2 if "allreduce" in name.replace("_", "") else 1
            self.bytes += share * size * (group.size() - 1) // group.size()
        return func(*args, **(kwargs or {}))


def _group(leaf: Any) -> Any:
    if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in leaf._type().name():
        return dist.ProcessGroup.unbox(leaf)
    return dist.distributed_c10d._resolve_process_group(leaf) if isinstance(leaf, str) and leaf.isdigit() else None


def measure_received(file: Path, out: Path) -> list[dict[str, int]]:
    """By rank: how many bytes it receives in a step of each layout."""
    found = {}
    for name in LAYOUTS:
        options = recipe_in(name, file, distributed.world_size())
        modalities = options.make_modalities()
        model = build_for_training(options, modalities, {"pictures:label": [1, 2, 3, 4]}).train()
        layout = choose_layout(options, model, CPU)
        apply_parallelism(
            model,
            layout,
            CPU,
            blocks=model.blocks(),
            experts=model.experts(),
            methods=("encode_all", "project", "classify"),
            param_dtype=torch.bfloat16 if options.train.precision == "bf16" else torch.float32,
            fp32_modules=model.fp32_modules(),
        )
        batch = zero_batch(options, "named", 0, modalities, CLASSES, CPU, distributed.world_size())
        encode = in_chunks(model.encode_all, options.memory.chunk_size)
        updater = Updater(options, model, lambda step: step)
        with Received() as received:
            task_losses(model, options.tasks["named"], batch, encode).total.backward()
            updater.queue_update(0)
        found[name] = received.bytes
    return distributed.all_gather_object(found)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_receive_the_planned_number_of_bytes(little_data, tmp_path, count):
    """In a step and its update, including Muon's and those of experts."""
    file = little_data / "recipe.yaml"
    measured = ranks.on(count, measure_received, file, tmp_path)
    for name in LAYOUTS:
        planned = plan_of(recipe_in(name, file, count), gpus=count).step_needs["named", 0].received_bytes
        for each in measured:
            assert planned == pytest.approx(each[name], rel=0.01), name


def test_what_cannot_be_planned_is_refused(little_data):
    experts = "model.moe.experts=4"
    for options, changes in (
        ({"gpu": "h1000"}, []),
        ({"gpus": 0}, []),
        ({"mfu": 1.5}, []),
        ({"gpus": 4}, []),
        ({"gpus": 6}, ["parallel.shard_degree=4"]),
        ({"gpus": 6}, [experts, "parallel={shard_degree: 3, expert_degree: 2}"]),
        ({"gpus": 6}, ["parallel={shard_degree: 1, expert_degree: 4}", experts]),
        ({"gpus": 4}, [experts, "parallel.expert_degree=2", "model.mlp_dim=63"]),
    ):
        with refuses():
            plan_of(recipe_of(little_data, *changes), **options)


def test_the_command_prints_the_plan(little_data, capsys):
    changes = ["train.steps=7", "tasks.heard.weight=0", "parallel.shard_degree=2"]
    run_plan(str(little_data / "recipe.yaml"), changes, 2, "a100", 0.5)
    printed = capsys.readouterr().out
    recipe = recipe_of(little_data, *changes)
    first = plan_of(recipe, gpus=2, gpu="a100", mfu=0.5)
    task, view = first.peak_task_view
    step = first.step_needs[task, view]
    row = [f"{task}, {view}", f"{step.cost.examples}", f"{step.cost.tokens}", short(step.cost.flops)]
    row += [f"{1e3 * step.compute_seconds:.1f}", f"{1e3 * step.wait_seconds:.1f}", f"{step.received_bytes / 1e9:.2f}"]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    assert [*row, f"{step.memory.total / GIB:.2f}"] in rows
    for line in (
        f"largest step: {task}, view {view}",
        f"little fits: {first.memory_bytes / GIB:.2f} of 71.1 GiB for tensors on each of 2 x a100",
        f"7 steps, {short(first.flops)}FLOPs: 0:00 at an MFU of 50%",
        "with communication about 0:00, an estimate from published bandwidths",
        "parallel: {shard_degree: 2}; as recommended",
    ):
        assert line in printed


def test_if_no_layout_fits_the_command_says_what_to_try(little_data, capsys):
    changes = ["model={width: 8192, layers: 2, heads: 8, mlp_dim: 32768}", "train.precision=fp32"]
    run_plan(str(little_data / "recipe.yaml"), changes, 2, "rtx4090", 0.5)
    printed = capsys.readouterr().out
    assert "no other layout fits\ntry memory.chunk_size" in printed
    assert "the time is that of bf16" in printed


@pytest.mark.parametrize(("parallel", "gpus"), [("{}", 1), ("{shard_degree: 2}", 2), ("{expert_degree: 2}", 2)])
def test_the_command_plans_the_fewest_gpus_unless_told(little_data, capsys, parallel, gpus):
    changes = ["model.moe.experts=4", f"parallel={parallel}"]
    run_plan(str(little_data / "recipe.yaml"), changes, None, "h100", 0.4)
    assert f"on each of {gpus} x h100" in capsys.readouterr().out


def test_the_peak_of_a_device_is_that_of_the_plan_if_it_has_one(monkeypatch):
    monkeypatch.setattr("openimp.planning.gpus.product_speed", lambda device, precision: (device.type, precision))
    assert peak_flops(torch.device("cpu"), "fp32") == ("cpu", "fp32")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H200")
    assert peak_flops(torch.device("cuda"), "fp32") == 989e12
