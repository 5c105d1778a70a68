"""Muon: torch's on a matrix, on a stack of matrices the same as on each of them, and on four ranks as on one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from openimp.parallel import distributed, muon
from openimp.parallel.layout import Layout, apply_parallelism, full_tensor
from openimp.parallel.muon import Muon, orthogonalize
from tests import ranks

ROWS, COLUMNS = 24, 40
WIDTH, HIDDEN, EXPERTS, STEPS = 16, 24, 4, 3
LAYOUTS = {
    "shards": Layout(4, 4, 1),
    "replicas of shards": Layout(4, 2, 1),
    "replicas": Layout(4, 1, 1),
    "expert parallelism, shards": Layout(4, 4, 2),
    "expert parallelism, replicas of shards": Layout(4, 2, 2),
    "expert parallelism, replicas": Layout(4, 1, 2),
}


def weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def train(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], steps: int = 3) -> None:
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = parameter.detach().cos() + step
        optimizer.step()


@pytest.mark.parametrize("momentum", [0.95, 0.5])
def test_a_step_is_that_of_torch(monkeypatch, momentum):
    """With torch's iterations."""
    monkeypatch.setattr(muon, "COEFFICIENTS", ((3.4445, -4.7750, 2.0315),) * 5)
    monkeypatch.setattr(muon, "MARGIN", 1.0)
    shapes = (ROWS, COLUMNS), (COLUMNS, ROWS), (7, 7)
    ours = weights(*shapes)
    theirs = weights(*shapes)
    before = [weight.detach().clone() for weight in ours]
    train(Muon(dict.fromkeys(ours, 1), lr=0.1, weight_decay=0.2, momentum=momentum), ours)
    torchs = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, momentum=momentum, adjust_lr_fn="match_rms_adamw")
    train(torchs, theirs)
    for a, b, start in zip(ours, theirs, before):
        # Products of a batch may be summed in another order, in bf16.
        assert (a - b).norm() < 0.02 * (a - start).norm()


@pytest.mark.parametrize("shape", [(3 * ROWS, COLUMNS), (3, ROWS, COLUMNS), (3, COLUMNS, ROWS)])
def test_each_matrix_of_a_stack_is_updated_as_if_it_were_alone(shape):
    (stack,) = weights(shape)
    alone = [part.clone().requires_grad_() for part in stack.detach().reshape(3, -1, shape[-1])]
    train(Muon({stack: 3}, lr=0.1, momentum=0.95), [stack])
    train(Muon(dict.fromkeys(alone, 1), lr=0.1, momentum=0.95), alone)
    torch.testing.assert_close(stack.reshape(3, -1, shape[-1]), torch.stack(alone))


def test_singular_values_of_any_scale_come_close_to_one():
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(2, 64, 96, generator=generator), full_matrices=False)
    spread = torch.logspace(-1.5, 0, 64)  # From 0.01 of the Frobenius norm.
    for scale in (1e-6, 1.0, 1e6):
        x = scale * (u * spread) @ v
        values = torch.linalg.svdvals(orthogonalize(x.bfloat16()).float())
        assert values.min() > 0.68
        assert values.max() < 1.32


@pytest.mark.parametrize("scale", [1.0, 1.001, 1.0039, 0.9962, 3.01])
def test_a_matrix_of_rank_one_does_not_explode(scale):
    """Its singular value is its norm, which bf16 may round down."""
    constant = torch.full((1, ROWS, COLUMNS), scale / (ROWS * COLUMNS) ** 0.5)
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(5, ROWS, 1, generator=generator) @ torch.randn(5, 1, COLUMNS, generator=generator)
    product *= scale / product.norm(dim=(1, 2), keepdim=True)
    found = orthogonalize(torch.cat([constant, product]).bfloat16()).float()
    largest = torch.linalg.svdvals(found)[:, 0]
    assert largest.min() > 0.7
    assert largest.max() < 1.3


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))


class Block(nn.Module):
    """Queries, keys and values, a square matrix, two that four ranks cannot divide evenly, and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.uneven, self.few = (
            nn.Linear(WIDTH, rows, bias=False) for rows in (3 * WIDTH, WIDTH, 10, 3)
        )
        self.experts = Experts()


class Model(nn.Module):
    """Two blocks, and a matrix outside of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)


def gradients() -> Iterator[dict[str, Tensor]]:
    """Those of each step. The second step does not use the second block."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: weight.shape for name, weight in Model().named_parameters()}
    for step in range(STEPS):
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        yield {name: grad for name, grad in drawn.items() if step != 1 or not name.startswith("blocks.1.")}


def train_model(model: Model, refused: bool = False) -> None:
    """Updates the model with the same gradients in any layout. With `refused`, a step that must change nothing, because
    its gradients are not finite, comes before the last one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    named = dict(model.named_parameters())
    stacks = {w: EXPERTS if w.ndim == 3 else 3 if "qkv" in name else 1 for name, w in named.items()}
    optimizer = Muon(stacks, lr=0.1, momentum=0.95, weight_decay=0.2)
    steps = [*gradients()]
    if refused:
        steps.insert(-1, {name: torch.full_like(grad, torch.nan) for name, grad in steps[-1].items()})
    for step in steps:
        for name, weight in named.items():
            grad = step.get(name)
            if grad is not None and isinstance(weight, DTensor):
                grad = distribute_tensor(grad, weight.device_mesh, weight.placements)
            weight.grad = grad
        optimizer.found_inf = torch.tensor(float(any(grad.isnan().any() for grad in step.values())))
        optimizer.step()


def train_in_layouts(out: Path) -> dict[str, list[float]]:
    """By layout and rank: the largest difference from one rank, relative to the update of a weight."""
    alone = Model()
    train_model(alone)
    start = dict(Model().named_parameters())
    found = {}
    for name, layout in LAYOUTS.items():
        model = Model()
        experts = [block.experts for block in model.blocks]
        apply_parallelism(model, layout, torch.device("cpu"), blocks=model.blocks, experts=experts, methods=["forward"])
        train_model(model, refused=True)
        weights = {key: full_tensor(weight.detach()) for key, weight in model.named_parameters()}
        differences = [
            (weights[key] - weight).norm() / (weight - start[key]).norm() for key, weight in alone.named_parameters()
        ]
        found[name] = distributed.all_gather_object(float(torch.stack(differences).max()))
    return found


@pytest.mark.slow
def test_four_ranks_update_matrices_as_one_does(tmp_path):
    """Products of a batch may be summed in another order, in bf16. A step that is refused changes nothing."""
    found = ranks.on(4, train_in_layouts, tmp_path)
    assert found.keys() == LAYOUTS.keys()
    for layout, differences in found.items():
        assert max(differences) < 0.02, layout
