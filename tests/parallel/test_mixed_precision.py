"""bf16 and compiled blocks on two ranks of gloo.

torchrun starts once. It runs this file, which trains and writes what the tests compare.
"""

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run, torchrun
from ranks import COMMON
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call

from openimp.data.loader import load_batches
from openimp.model.moe import Router
from openimp.objectives.losses import Losses, task_losses
from openimp.parallel import distributed
from openimp.parallel.layout import reshard
from openimp.recipe.schema import Recipe
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer

pytestmark = pytest.mark.slow

STEPS = 50
SMOOTH = ["model.moe.capacity_factor=2", "optimizer.lr=1e-4"]
"""Every expert takes all tokens, and weights change slowly. Otherwise a rounding may change which tokens are taken."""
LAYOUTS = {
    "shards": [],
    "replicas, chunks": ["parallel.shard_degree=1", "memory={chunk_size: 2, activation_checkpointing: true}"],
    "expert parallelism": ["parallel.expert_degree=2"],
}
COMPILED = [
    "model.layers=3",  # two dense blocks and a sparse one
    "tasks.heard.weight=0",
    "tasks.named.views=[{image: {size: 16}, text: {length: 8}}]",
]


@pytest.fixture(scope="module")
def two_ranks(little_data, tmp_path_factory) -> dict[str, Any]:
    """What `main` writes on two ranks."""
    out = tmp_path_factory.mktemp("two")
    run(*torchrun(2, __file__, little_data, out), check=True)
    return json.loads((out / "facts.json").read_text())


def test_losses_in_bf16_agree_with_one_rank_under_the_same_policy(little_data, two_ranks, tmp_path):
    """On one rank, the policy is written out: the forward pass gets copies of the parameters in bf16.

    Equal weights give equal losses. After an update, the weights differ by the rounding of gradients, and so does the
    rounding of each activation. With the few examples of a batch, that is some 1e-3, in either direction.
    """
    expected = losses_by_hand(little_data, tmp_path / "run")
    assert len(expected) == STEPS
    for name in LAYOUTS:
        found = two_ranks["losses"][name]
        assert found[0] == pytest.approx(expected[0], rel=1e-5), name
        assert fmean(found) == pytest.approx(fmean(expected), abs=1e-3), name
        assert found == pytest.approx(expected, abs=0.02), name


def test_parameters_gradients_routers_and_losses_are_fp32_and_the_rest_is_bf16(two_ranks):
    """What the forward pass gathers in bf16 shows in the losses of the test above."""
    types = two_ranks["types"]
    for part in ("kept", "gradients", "losses", "temperature"):
        assert types[part] == ["torch.float32"]
    assert types["features"] == types["tokens of experts"] == ["torch.bfloat16"]
    assert types["gates are those of fp32 logits"] == [True]


def test_blocks_are_compiled_once_per_signature_and_class_on_each_rank(two_ranks):
    eager, compiled = two_ranks["compiled"]
    assert eager["graphs"] == [0, 0]
    assert compiled["graphs"] == [2, 2]  # Of one signature: dense and sparse.
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-2)


def recipe(folder: Path, *changes: str) -> Recipe:
    return Recipe.load(folder / "recipe.yaml", [*COMMON, "evaluation={}", f"train.steps={STEPS}", *changes])


class Step(nn.Module):
    """The losses of a step, with parameters that `functional_call` replaces."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, task: Any, batch: Any) -> Losses:
        return task_losses(self.model, task, batch)


def losses_by_hand(folder: Path, out: Path) -> list[float]:
    trainer = Trainer(set_up(recipe(folder, *SMOOTH), out))
    step = Step(trainer.model)
    found = []
    kept = {weight for module in trainer.model.fp32_modules() for weight in module.parameters()}
    for loaded in load_batches(trainer.batches, 0):
        weights = {name: w if w in kept else w.bfloat16() for name, w in step.named_parameters()}
        losses = functional_call(step, weights, (trainer.recipe.tasks[loaded.visit.task], loaded.batch))
        losses.total.backward()
        trainer.updater.queue_update(loaded.visit.step)
        found.append(float(losses.total.detach()))
    return found


def losses_of(trainer: Trainer) -> list[float]:
    """The loss of each step, averaged over the ranks."""
    batches = load_batches(trainer.batches, 0)
    return [float(distributed.all_reduce_mean(trainer.make_step(loaded).total.detach())) for loaded in batches]


def types_of(trainer: Trainer) -> dict[str, Any]:
    """The types of tensors in a step."""
    found: dict[str, list[Any]] = {}

    def note(key: str, *values: Any) -> None:
        found.setdefault(key, []).extend(str(x.dtype) if isinstance(x, Tensor) else x for x in values)

    def note_routing(router: nn.Module, inputs: tuple[Any, ...], outputs: list[Any]) -> None:
        probs = F.linear(inputs[0].float(), router.weight_ED.float()).softmax(-1)
        for routing, _ in outputs:
            gates = routing.gate_BEC[routing.gate_BEC > 0]
            note("gates are those of fp32 logits", bool(torch.isin(gates, probs).all()))

    model = trainer.model
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(note_routing)
    for module in model.experts():
        module.register_forward_pre_hook(lambda _, inputs: note("tokens of experts", inputs[0]))
    for pair in model.pairs:
        model.temperature(*pair).register_forward_hook(lambda _, __, outputs: note("temperature", *outputs))
    loaded = next(iter(load_batches(trainer.batches, 0)))
    with torch.no_grad():
        note("features", *(each.features for each in trainer.encode_all(loaded.batch.tokens).values()))
    reshard(model)
    losses = trainer.forward(loaded)
    losses.total.backward()
    note("losses", losses.total, *losses.parts.values())
    note("kept", *model.parameters())
    note("gradients", *(weight.grad for weight in model.parameters() if weight.grad is not None))
    return {key: sorted({*values}) for key, values in found.items()}


def main(folder: Path, out: Path) -> None:
    distributed.start()
    bf16 = "train.precision=bf16"
    losses = {
        name: losses_of(Trainer(set_up(recipe(folder, bf16, *SMOOTH, *changes), out / name)))
        for name, changes in LAYOUTS.items()
    }
    found = {"losses": losses, "types": types_of(Trainer(set_up(recipe(folder, bf16), out / "types"))), "compiled": []}
    for value in ("false", "true"):
        changes = [bf16, *COMPILED, "train.steps=3", f"train.compile={value}"]
        trainer = Trainer(set_up(recipe(folder, *changes), out / f"compile {value}"))
        counters.clear()
        compiled = {"losses": losses_of(trainer)}
        compiled["graphs"] = distributed.all_gather_object(counters["stats"]["unique_graphs"])
        found["compiled"].append(compiled)
    if distributed.rank() == 0:
        (out / "facts.json").write_text(json.dumps(found))
    distributed.shut_down()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
