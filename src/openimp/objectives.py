"""The losses of a task.

Shape suffixes: B examples of this rank, N and M embeddings of the two modalities of a pair, R rows of N, Z features of
the shared embedding space, K classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openimp.common.device import full_precision
from openimp.data.batch import Batch, head_key
from openimp.model.embedder import Embedder, EncodeAll, Encoded
from openimp.model.moe import Usage
from openimp.parallel.distributed import all_gather
from openimp.recipe.tasks import Classification, Contrastive, Distill, Task, classified_by, pairs_of, target_of

BLOCK = 2**24
"""Largest number of similarities that a contrastive loss holds at once: 64 MiB per tensor that its gradient needs."""


@dataclass
class Losses:
    """The losses of one step."""

    total: Tensor  # the scalar to minimize
    parts: dict[str, Tensor]  # the unweighted loss of each objective, detached, by name
    usage: dict[str, list[Usage]]  # by modality: of each sparse layer, in order; empty unless it is collected


def task_losses(model: Embedder, task: Task, batch: Batch, encode_all: EncodeAll | None = None) -> Losses:
    """Encodes all modalities of the batch in one pass and returns the weighted sum of the task's objectives.

    The loss of an objective is the mean over its pairs, or over the modalities that it classifies. The router losses,
    which `model.moe` has weighted, are summed over layers and averaged over modalities. `encode_all` replaces
    `model.encode_all`, for example to work in chunks.
    """
    encoded = (encode_all or model.encode_all)(batch.tokens)
    parts: dict[str, Tensor] = {}
    total = torch.zeros((), device=next(iter(encoded.values())).features.device)
    for objective in task.objectives:
        match objective:
            case Contrastive():
                terms = contrastive_losses(model, objective, encoded, batch)
            case Classification():
                terms = classification_losses(model, objective, task.source, encoded, batch)
            case Distill():
                terms = distillation_losses(model, objective, target_of(objective, task.inputs), encoded, batch)
        parts |= {name: loss.detach() for name, loss in terms.items()}
        total = total + objective.weight * torch.stack([*terms.values()]).mean()
    aux = [torch.stack([stats.aux for stats in item.routing]).sum() for item in encoded.values() if item.routing]
    if aux:
        parts["router"] = torch.stack(aux).mean().detach()
        total = total + torch.stack(aux).mean()
    usage = {name: [stats.usage for stats in item.routing if stats.usage] for name, item in encoded.items()}
    return Losses(total, parts, usage)


def contrastive_losses(
    model: Embedder, objective: Contrastive, encoded: Mapping[str, Encoded], batch: Batch
) -> dict[str, Tensor]:
    """The loss of each pair of modalities, by the name "a-b". Embeddings, similarities and softmax are fp32.

    Each rank compares its own N and M embeddings with those of all ranks, in blocks of rows, so no rank holds all
    similarities. The mean over the ranks is the loss of the global batch.
    """
    own_B = batch.item_ids[objective.same or ""]
    (item_B,) = all_gather(own_B)
    losses = {}
    for a, b in pairs_of(objective, encoded):
        # A joint head is applied again for each pair. That is cheap compared with the encoder, which runs once.
        z_NZ, z_MZ = model.project(encoded[a].features, a, b), model.project(encoded[b].features, b, a)
        draws_a, draws_b = (len(z) // len(own_B) for z in (z_NZ, z_MZ))
        own_a, own_b = own_B.repeat_interleave(draws_a), own_B.repeat_interleave(draws_b)
        item_a, item_b = item_B.repeat_interleave(draws_a), item_B.repeat_interleave(draws_b)
        temperature, bias = model.temperature(a, b)()
        with full_precision(z_NZ.device):
            if objective.loss == "softmax":
                all_b, all_a = all_gather(z_MZ, z_NZ)
                loss = _by_blocks(softmax_nce, 1 / temperature * z_NZ, own_a, all_b, item_b)
                loss = (loss + _by_blocks(softmax_nce, 1 / temperature * z_MZ, own_b, all_a, item_a)) / 2
            else:
                (all_b,) = all_gather(z_MZ)
                biased = partial(sigmoid_nce, bias=bias)
                loss = _by_blocks(biased, 1 / temperature * z_NZ, own_a, all_b, item_b)
            losses[f"{a}-{b}"] = loss
    return losses


def distillation_losses(
    model: Embedder, objective: Distill, towards: str, encoded: Mapping[str, Encoded], batch: Batch
) -> dict[str, Tensor]:
    """The loss of a modality's embeddings, by the name "modality:column". Everything is fp32.

    For the contrastive loss, each rank compares its own N embeddings with the vectors of all ranks.
    """
    name, vector_BZ = objective.of, batch.labels[objective.to]
    z_NZ = model.project(encoded[name].features, name, towards)
    draws = len(z_NZ) // len(vector_BZ)
    with full_precision(z_NZ.device):
        if objective.loss == "cosine":
            loss = 1 - (z_NZ * vector_BZ.repeat_interleave(draws, dim=0)).sum(1).mean()
        else:
            own_B = batch.item_ids[objective.to]
            (item_M,), (vector_MZ,) = all_gather(own_B), all_gather(vector_BZ)
            own_N = own_B.repeat_interleave(draws)
            loss = _by_blocks(softmax_nce, z_NZ / objective.temperature, own_N, vector_MZ, item_M)
    return {f"{name}:{objective.to}": loss}


def _by_blocks(loss_of: Callable[..., Tensor], z_NZ: Tensor, own_N: Tensor, all_MZ: Tensor, item_M: Tensor) -> Tensor:
    """The mean over N of `loss_of`. Above `BLOCK` similarities, the loss is computed in blocks of rows, and each block
    is recomputed in the backward pass."""

    def rows_loss(z_RZ: Tensor, own_R: Tensor, all_MZ: Tensor) -> Tensor:
        return loss_of(z_RZ @ all_MZ.T, own_R[:, None] == item_M)

    rows = max(1, BLOCK // len(all_MZ))
    if len(z_NZ) <= rows:
        return rows_loss(z_NZ, own_N, all_MZ).mean()
    blocks = zip(z_NZ.split(rows), own_N.split(rows))
    return torch.cat([checkpoint(rows_loss, *block, all_MZ, use_reentrant=False) for block in blocks]).mean()


def softmax_nce(logits_NM: Tensor, same_NM: Tensor) -> Tensor:
    """(N,) the loss of each row: -log of the share of its positives, where `same_NM`, in the softmax (MIL-NCE, arXiv
    1912.06430). If each row has one positive, this is InfoNCE."""
    positive_N = logits_NM.masked_fill(~same_NM, -torch.inf).logsumexp(1)
    return logits_NM.logsumexp(1) - positive_N


def sigmoid_nce(logits_NM: Tensor, same_NM: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """(N,) the loss of each row: binary cross-entropy, summed over its pairs (SigLIP, arXiv 2303.15343)."""
    sign_NM = same_NM.to(logits_NM.dtype) * 2 - 1
    return -F.logsigmoid(sign_NM * (logits_NM + bias)).sum(1)


def equal_texts(task: Task, batch: Batch) -> float:
    """The share of texts in the global batch that other examples have too, although a contrastive loss separates them.

    Over the task's contrastive objectives without `same` and their modalities with a mask, this is the largest share.
    With `same`, the recipe says which texts should be apart.
    """
    shares = [0.0]
    for objective in task.objectives:
        if isinstance(objective, Contrastive) and objective.same is None:
            (row_B,) = all_gather(batch.item_ids[""])
            for name in dict.fromkeys(chain.from_iterable(pairs_of(objective, batch.tokens))):
                tokens = batch.tokens[name]
                if tokens.mask is not None:
                    text_N = all_gather(tokens.values)[0].unique(dim=0, return_inverse=True)[1]
                    row_N = row_B.repeat_interleave(len(text_N) // len(row_B))
                    rows_of_text = torch.stack([text_N, row_N]).unique(dim=1)[0].bincount()
                    shares.append(float((rows_of_text[text_N] > 1).float().mean()))
    return max(shares)


def classification_losses(
    model: Embedder, objective: Classification, source: str, encoded: Mapping[str, Encoded], batch: Batch
) -> dict[str, Tensor]:
    """The loss of each classified modality, by the name "modality:column"."""
    target = batch.labels[objective.label]
    loss_of: Callable[..., Tensor] = softmax_classification if objective.loss == "softmax" else sigmoid_classification
    losses = {}
    for name in classified_by(objective, batch.tokens):
        features_BD = encoded[name].features
        with full_precision(features_BD.device):
            logits_BK = model.classify(features_BD, head_key(source, objective.label))
        # A modality that is drawn k times per example has k rows per example.
        repeated = target.repeat_interleave(len(logits_BK) // len(target), dim=0)
        losses[f"{name}:{objective.label}"] = loss_of(logits_BK, repeated, objective.label_smoothing)
    return losses


def softmax_classification(logits_BK: Tensor, label_B: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing, averaged over the examples."""
    return F.cross_entropy(logits_BK, label_B, label_smoothing=smoothing)


def sigmoid_classification(logits_BK: Tensor, label_BK: Tensor, smoothing: float) -> Tensor:
    """Binary cross-entropy, summed over classes and averaged over examples. Smoothing moves targets towards 1/2."""
    target_BK = label_BK * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits_BK, target_BK, reduction="none").sum(1).mean()
