"""Muon on four ranks against Muon on one. torchrun runs this very file, which trains one model in several layouts."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run, torchrun
from torch import Tensor, nn

from openimp.parallel import distributed
from openimp.parallel.layout import Layout, apply_parallelism, full_tensor
from openimp.parallel.muon import Muon

pytestmark = pytest.mark.slow

WIDTH, HIDDEN, EXPERTS, STEPS = 16, 24, 4, 3
LAYOUTS = {
    "shards": Layout(4, 4, 1),
    "replicas of shards": Layout(4, 2, 1),
    "replicas": Layout(4, 1, 1),
    "replicas on two nodes": Layout(4, 1, 1),
    "expert parallelism, shards": Layout(4, 4, 2),
    "expert parallelism, replicas of shards": Layout(4, 2, 2),
    "expert parallelism, replicas": Layout(4, 1, 2),
}
WEIGHTS = 2 * 6 + 1


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


def train(model: Model, refused: bool = False) -> Muon:
    """Updates the model with the same gradients in any layout. With `refused`, a step that must change nothing, because
    its gradients are not finite, comes before the last one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    named = dict(model.named_parameters())
    stacks = {w: EXPERTS if w.ndim == 3 else 3 if "qkv" in name else 1 for name, w in named.items()}
    muon = Muon(stacks, lr=0.1, weight_decay=0.2)
    steps = [*gradients()]
    if refused:
        steps.insert(-1, {name: torch.full_like(grad, torch.nan) for name, grad in steps[-1].items()})
    for step in steps:
        for name, weight in named.items():
            grad = step.get(name)
            if grad is not None and isinstance(weight, DTensor):
                grad = distribute_tensor(grad, weight.device_mesh, weight.placements)
            weight.grad = grad
        muon.found_inf = torch.tensor(float(any(grad.isnan().any() for grad in step.values())))
        muon.step()
    return muon


def train_in_layouts(out: Path) -> None:
    """Writes, by layout and rank, the largest difference from one rank, relative to the update of a weight, and for how
    many weights the rank has momentum: in its parameter group, and in its state."""
    device = distributed.start()
    alone = Model()
    train(alone)
    start = dict(Model().named_parameters())
    expected = dict(alone.named_parameters())
    found = {}
    for name, layout in LAYOUTS.items():
        with pytest.MonkeyPatch.context() as environment:
            if "two nodes" in name:
                environment.setenv("LOCAL_WORLD_SIZE", "2")
            model = Model()
            experts = [block.experts for block in model.blocks]
            apply_parallelism(model, layout, device, blocks=model.blocks, experts=experts, methods=["forward"])
            muon = train(model, refused=True)
        weights = {key: full_tensor(weight.detach()) for key, weight in model.named_parameters()}
        differences = [
            (weights[key] - weight).norm() / (weight - start[key]).norm() for key, weight in expected.items()
        ]
        kept = len(muon.param_groups[0]["params"]), len(muon.state)
        found[name] = distributed.all_gather_object((float(torch.stack(differences).max()), kept))
    if distributed.rank() == 0:
        (out / "found.json").write_text(json.dumps(found))
    distributed.shut_down()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("division")
    run(*torchrun(4, __file__, out), check=True)
    return json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_ranks_update_matrices_as_one_does(found, layout):
    """Products of a batch may be summed in another order, in bf16. A step that is refused changes nothing."""
    assert all(difference < 0.02 for difference, _ in found[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_momentum_of_a_replicated_matrix_is_kept_by_one_rank_of_each_node(found, layout):
    kept = [kept for _, (kept, _) in found[layout]]
    assert [states for _, (_, states) in found[layout]] == kept
    if layout == "replicas":
        assert sum(kept) == WEIGHTS
        assert min(kept) > 0
    elif layout == "replicas on two nodes":
        assert sum(kept[:2]) == sum(kept[2:]) == WEIGHTS
    elif layout == "expert parallelism, replicas":  # Each rank has its own half of the experts of four weights.
        assert sum(kept) == WEIGHTS - 4 + 4 * 4
    else:
        assert kept == [WEIGHTS] * 4


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_in_layouts(Path(sys.argv[1]))
