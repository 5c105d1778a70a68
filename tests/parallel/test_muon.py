"""Muon: torch's on a matrix, and on a stack of matrices the same as on each of them."""

import pytest
import torch

from openimp.parallel import newton_schulz
from openimp.parallel.muon import Muon
from openimp.parallel.newton_schulz import orthogonalize

ROWS, COLUMNS = 24, 40


def weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def train(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], steps: int = 3) -> None:
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = parameter.detach().cos() + step
        optimizer.step()


def test_a_step_is_that_of_torch(monkeypatch):
    """With torch's iterations."""
    monkeypatch.setattr(newton_schulz, "COEFFICIENTS", ((3.4445, -4.7750, 2.0315),) * 5)
    monkeypatch.setattr(newton_schulz, "MARGIN", 1.0)
    shapes = (ROWS, COLUMNS), (COLUMNS, ROWS), (7, 7)
    ours = weights(*shapes)
    theirs = weights(*shapes)
    before = [weight.detach().clone() for weight in ours]
    train(Muon(dict.fromkeys(ours, 1), lr=0.1, weight_decay=0.2), ours)
    train(torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"), theirs)
    for a, b, start in zip(ours, theirs, before):
        # Products of a batch may be summed in another order, in bf16.
        assert (a - b).norm() < 0.02 * (a - start).norm()


@pytest.mark.parametrize("shape", [(3 * ROWS, COLUMNS), (3, ROWS, COLUMNS), (3, COLUMNS, ROWS)])
def test_each_matrix_of_a_stack_is_updated_as_if_it_were_alone(shape):
    (stack,) = weights(shape)
    alone = [part.clone().requires_grad_() for part in stack.detach().reshape(3, -1, shape[-1])]
    train(Muon({stack: 3}, lr=0.1), [stack])
    train(Muon(dict.fromkeys(alone, 1), lr=0.1), alone)
    torch.testing.assert_close(stack.reshape(3, -1, shape[-1]), torch.stack(alone))


def test_a_parameter_without_a_gradient_keeps_its_value_and_its_state():
    a, b = weights((ROWS, COLUMNS), (ROWS, COLUMNS))
    start = b.detach().clone()
    optimizer = Muon({a: 1, b: 1}, lr=0.1, weight_decay=0.1)
    train(optimizer, [a])
    assert torch.equal(b, start)
    assert b not in optimizer.state


def test_a_rank_may_own_no_matrix():
    optimizer = Muon({}, lr=0.1)
    optimizer.step()
    assert not optimizer.state


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
