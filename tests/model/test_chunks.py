"""Large batches in little memory: the same gradients from pieces of a batch and from activations computed again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from openimp.data.step_batches import StepBatches
from openimp.data.task_data import TaskData
from openimp.model.embedder import in_chunks
from openimp.model.imp import build_for_training
from openimp.objectives.losses import task_losses
from openimp.recipe.schema import Recipe
from openimp.study.variants import peak_bytes
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer

COMMON = ["train.precision=fp32", "tasks.named.views=[{image: {size: 32, drop_tokens: 0.5}, text: {length: 8}}]"]
CASES = {
    "sparse, softmax": ["tasks.named.objectives=[{type: contrastive, positives_by: label}]"],
    "dense, sigmoid": ["tasks.named.objectives=[{type: contrastive, loss: sigmoid}]", "model.moe=null"],
    "sparse, with classes": ["model.moe={experts: 2, layers: 1}"],
    "several texts": ['tasks.named.inputs.text={column: "a {label} square", draw: 2}'],
}


def gradients(folder: Path, *changes: str) -> dict[str, Tensor]:
    """The loss and the gradients of one step of each task, by task and parameter."""
    recipe = Recipe.load(folder / "recipe.yaml", [*COMMON, *changes])
    modalities = recipe.make_modalities()
    batches = StepBatches(TaskData(recipe, modalities))
    batches.data.fit()
    torch.manual_seed(0)
    model = build_for_training(recipe, modalities, batches.data.classes)
    found: dict[str, Tensor] = {}
    for name, task in recipe.tasks.items():
        step = next(visit.step for visit in batches.schedule if visit.task == name)
        losses = task_losses(model, task, batches[step].batch, in_chunks(model.encode_all, recipe.memory.chunk_size))
        losses.total.backward()
        found[f"{name} loss"] = losses.total.detach()
        grads = {weight: parameter.grad for weight, parameter in model.named_parameters()}
        found |= {f"{name} {weight}": grad.clone() for weight, grad in grads.items() if grad is not None}
        model.zero_grad()
    return found


@pytest.mark.parametrize("case", CASES)
def test_chunks_and_activation_checkpointing_change_no_gradient(little_data, case):
    whole = gradients(little_data, *CASES[case])
    assert len({name.split()[0] for name in whole}) == 2
    for less in (
        "{chunk_size: 3}",
        "{activation_checkpointing: true}",
        "{chunk_size: 5, activation_checkpointing: true}",
    ):
        found = gradients(little_data, *CASES[case], f"memory={less}")
        assert found.keys() == whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_the_same_batch_needs_less_memory(little_data, tmp_path):
    large = [
        "model={width: 32, heads: 2, mlp_dim: 128, layers: 4, embed_dim: 32, moe: {experts: 2, layers: 2}}",
        "tasks.named.batch_size=64",
        "tasks.heard.weight=0",
        "evaluation={}",
    ]
    peaks = []
    for less in ("{}", "{chunk_size: 16}", "{activation_checkpointing: true}"):
        recipe = Recipe.load(little_data / "recipe.yaml", [*COMMON, *large, f"memory={less}"])
        training = Trainer(set_up(recipe, tmp_path / less))
        loaded = training.batches[0]
        peaks.append(peak_bytes(lambda t=training, step=loaded: t.forward(step).total.backward()))
    whole, pieces, again = peaks
    assert pieces < 0.5 * whole
    assert again < 0.7 * whole
