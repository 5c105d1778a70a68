"""Large batches in little memory: the same gradients from pieces of a batch and from activations computed again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openimp.common.errors import UserError
from openimp.data.loader import make_loader
from openimp.recipe.schema import Recipe
from openimp.training.trainer import Trainer

COMMON = ["train.precision=fp32", "train.num_workers=0", "tasks.named.views.0.image.drop_tokens=0.5", "evaluation={}"]
CASES = {
    "sparse, softmax": ["tasks.named.objectives=[{type: contrastive, same: label}]"],
    "dense, sigmoid": ["tasks.named.objectives=[{type: contrastive, loss: sigmoid}]", "model.moe=null"],
    "soft, with classes": ["model.moe={experts: 2, layers: 1, routing: soft}"],
}


def training_of(folder: Path, run: Path, *changes: str) -> Trainer:
    return Trainer(Recipe.load(folder / "recipe.yaml", [*COMMON, *changes]), run, resume=False)


def gradients(training: Trainer) -> dict[str, Tensor]:
    """Of two steps' losses, one of each task, by parameter and task."""
    found: dict[str, Tensor] = {}
    for loaded in make_loader(training.data, 0, 12):
        if any(name.startswith(loaded.visit.task) for name in found):
            continue
        losses = training.forward(loaded)
        losses.total.backward()
        found[f"{loaded.visit.task} loss"] = losses.total.detach()
        for name, parameter in training.model.named_parameters():
            if parameter.grad is not None:
                found[f"{loaded.visit.task} {name}"] = parameter.grad.clone()
        training.model.zero_grad()
    return found


@pytest.mark.parametrize("case", CASES)
def test_pieces_and_recomputing_change_no_gradient(little_data, tmp_path, case):
    changes = CASES[case]
    whole = gradients(training_of(little_data, tmp_path / "whole", *changes))
    assert len({name.split()[0] for name in whole}) == 2
    for i, less in enumerate(
        (
            ["memory.chunk_size=3"],
            ["memory.activation_checkpointing=true"],
            ["memory={chunk_size: 5, activation_checkpointing: true}"],
        )
    ):
        found = gradients(training_of(little_data, tmp_path / f"less{i}", *changes, *less))
        assert found.keys() == whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_less_memory_for_the_same_batch_and_all_flops_are_counted(little_data, tmp_path, peak_bytes):
    large = [
        "model={width: 32, heads: 2, mlp_dim: 128, layers: 4, embed_dim: 32, moe: {experts: 2, layers: 2}}",
        "tasks.named.batch_size=128",
        "tasks.named.views.1.batch_size=128",
        "tasks.heard.weight=0",
    ]
    peaks, flops = {}, {}
    for name, less in (("all", "{}"), ("pieces", "{chunk_size: 16}"), ("again", "{activation_checkpointing: true}")):
        training = training_of(little_data, tmp_path / name, *large, f"memory={less}")
        loaded = next(iter(make_loader(training.data, 0)))
        peaks[name] = peak_bytes(lambda t=training, step=loaded: t.forward(step).total.backward())
        # Of the other kinds of attention the counter does not know the CPU's.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            training.forward(loaded).total.backward()
        flops[name] = counter.get_total_flops()
        assert flops[name] == training.costs["named", loaded.visit.view].flops
    assert peaks["pieces"] < 0.5 * peaks["all"]
    assert peaks["again"] < 0.7 * peaks["all"]
    assert flops["pieces"] > 1.25 * flops["all"]


@pytest.mark.parametrize("routing", ["expert_choice_batch", "token_choice"])
def test_a_routing_across_the_batch_takes_no_pieces(little_data, routing):
    moe = f"model.moe={{experts: 2, layers: 1, routing: {routing}}}"
    with pytest.raises(UserError, match=rf"memory.chunk_size: routing {routing} looks at the whole batch"):
        Recipe.load(little_data / "recipe.yaml", [moe, "memory.chunk_size=4"])
