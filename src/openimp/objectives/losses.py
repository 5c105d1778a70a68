"""The losses of a task: the weighted sum of its objectives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from openimp.common.errors import UserError
from openimp.data.batch import Batch
from openimp.model.embedder import Embedder, EncodeAll
from openimp.model.moe import RouterStats
from openimp.recipe.tasks import Task


@dataclass
class Losses:
    """The losses of one step."""

    total: Tensor  # the scalar to minimize
    parts: dict[str, Tensor]  # the loss of each objective without its weight, and "router", detached, by name
    # By modality: the statistics of each sparse layer, in order, detached.
    usage: dict[str, list[RouterStats]]


def task_losses(model: Embedder, task: Task, batch: Batch, encode_all: EncodeAll | None = None) -> Losses:
    """Encodes all modalities of the batch in one pass and returns the weighted sum of the task's objectives.

    The loss of an objective is the mean over its pairs, or over the modalities that it classifies. The router losses,
    which `model.moe` has weighted, are summed over layers and averaged over modalities. `encode_all` replaces
    `model.encode_all`, for example to work in chunks.
    """
    encoded = (encode_all or model.encode_all)(batch.tokens)
    parts: dict[str, Tensor] = {}
    total = torch.zeros((), device=next(iter(encoded.values())).features.device)
    for objective, targets in zip(task.objectives, batch.targets, strict=True):
        terms = objective.losses(model, task, encoded, targets)
        for name, loss in terms.items():
            if name in parts:
                raise UserError(f"two objectives have the loss {name!r}; drop one of the two")
            parts[name] = loss.detach()
        total = total + objective.weight * torch.stack([*terms.values()]).mean()
    z_losses = [
        torch.stack([stats.z_loss for stats in item.routing]).sum() for item in encoded.values() if item.routing
    ]
    if z_losses:
        router_loss = torch.stack(z_losses).mean()
        parts["router"] = router_loss.detach()
        total = total + router_loss
    usage = {name: [stats.detached() for stats in item.routing] for name, item in encoded.items()}
    return Losses(total, parts, usage)
