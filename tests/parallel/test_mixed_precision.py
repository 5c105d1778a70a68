"""bf16 and compiled blocks on two ranks of gloo."""

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from torch import nn
from torch._dynamo.utils import counters
from torch.func import functional_call

from openimp.data.loader import load_batches
from openimp.objectives.losses import Losses, task_losses
from openimp.parallel import distributed
from openimp.training.trainer import Trainer
from tests import ranks
from tests.trained import trainer_of

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
    """What `compute` returns on two ranks."""
    return ranks.on(2, compute, little_data, tmp_path_factory.mktemp("two"))


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


def test_blocks_are_compiled_once_per_signature_and_class_on_each_rank(two_ranks):
    eager, compiled = two_ranks["compiled"]
    assert eager["graphs"] == [0, 0]
    assert compiled["graphs"] == [2, 2]  # Of one signature: dense and sparse.
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-2)


def trainer(folder: Path, run: Path, *changes: str) -> Trainer:
    return trainer_of(folder, run, *ranks.COMMON, "evaluation={}", f"train.steps={STEPS}", *changes)


class Step(nn.Module):
    """The losses of a step, with parameters that `functional_call` replaces."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, task: Any, batch: Any) -> Losses:
        return task_losses(self.model, task, batch)


def losses_by_hand(folder: Path, out: Path) -> list[float]:
    training = trainer(folder, out, *SMOOTH)
    step = Step(training.model)
    found = []
    kept = {weight for module in training.model.fp32_modules() for weight in module.parameters()}
    for loaded in load_batches(training.batches, 0):
        weights = {name: w if w in kept else w.bfloat16() for name, w in step.named_parameters()}
        losses = functional_call(step, weights, (training.recipe.tasks[loaded.visit.task], loaded.batch))
        losses.total.backward()
        training.updater.queue_update(loaded.visit.step)
        found.append(float(losses.total.detach()))
    return found


def losses_of(trainer: Trainer) -> list[float]:
    """The loss of each step, averaged over the ranks."""
    batches = load_batches(trainer.batches, 0)
    return [float(distributed.all_reduce_mean(trainer.make_step(loaded).total.detach())) for loaded in batches]


def compute(folder: Path, out: Path) -> dict[str, Any]:
    bf16 = "train.precision=bf16"
    losses = {
        name: losses_of(trainer(folder, out / name, bf16, *SMOOTH, *changes)) for name, changes in LAYOUTS.items()
    }
    found = {"losses": losses, "compiled": []}
    for value in ("false", "true"):
        changes = [bf16, *COMPILED, "train.steps=3", f"train.compile={value}"]
        training = trainer(folder, out / f"compile {value}", *changes)
        counters.clear()
        compiled = {"losses": losses_of(training)}
        compiled["graphs"] = distributed.all_gather_object(counters["stats"]["unique_graphs"])
        found["compiled"].append(compiled)
    return found
