"""Noise contrastive estimation: losses that look for the positives among all candidates of a batch.

Shape suffixes: N embeddings of this rank, M candidates of all ranks, R rows of N, Z features of the embedding space,
I ids of an embedding, J ids of a candidate.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_SIMILARITIES = 2**26
"""Largest number of similarities that a loss holds at once: 256 MiB per tensor that is saved for its gradient. One
process fits a batch of 8,192, as towers allow. In smaller blocks, that step would take twice as long."""


def mean_by_blocks(
    loss_of: Callable[..., Tensor], z_NZ: Tensor, ids_NI: Tensor, candidate_MZ: Tensor, candidate_ids_MJ: Tensor
) -> Tensor:
    """The mean over N of `loss_of`. A candidate is a positive of an embedding if they share an id.

    Above `MAX_SIMILARITIES`, the loss is computed in blocks of rows, and each block is recomputed in the backward pass.
    """

    def rows_loss(z_RZ: Tensor, ids_RI: Tensor, candidate_MZ: Tensor) -> Tensor:
        return loss_of(z_RZ @ candidate_MZ.T, share_an_id(ids_RI, candidate_ids_MJ))

    rows = max(1, MAX_SIMILARITIES // len(candidate_MZ))
    if len(z_NZ) <= rows:
        return rows_loss(z_NZ, ids_NI, candidate_MZ).mean()
    blocks = zip(z_NZ.split(rows), ids_NI.split(rows))
    return torch.cat([checkpoint(rows_loss, *block, candidate_MZ, use_reentrant=False) for block in blocks]).mean()


def both_ways(
    loss_of: Callable[..., Tensor],
    z_NZ: Tensor,
    ids_NI: Tensor,
    z_MZ: Tensor,
    ids_MJ: Tensor,
) -> Tensor:
    """The mean of `mean_by_blocks` from N to M and from M to N. This rank must have all embeddings.

    Similarities that fit into one block are computed once for both.
    """
    if len(z_NZ) * len(z_MZ) > MAX_SIMILARITIES:
        forth = mean_by_blocks(loss_of, z_NZ, ids_NI, z_MZ, ids_MJ)
        back = mean_by_blocks(loss_of, z_MZ, ids_MJ, z_NZ, ids_NI)
        return (forth + back) / 2
    logits_NM = z_NZ @ z_MZ.T
    same_NM = share_an_id(ids_NI, ids_MJ)
    return (loss_of(logits_NM, same_NM).mean() + loss_of(logits_NM.T, same_NM.T).mean()) / 2


def share_an_id(ids_RI: Tensor, candidate_ids_MJ: Tensor) -> Tensor:
    """(R, M) whether an embedding and a candidate have an id in common."""
    shared_RM = torch.zeros(len(ids_RI), len(candidate_ids_MJ), dtype=torch.bool, device=ids_RI.device)
    for ids_R in ids_RI.unbind(1):  # A loop, because all comparisons at once would be I x J matrices.
        for candidate_ids_M in candidate_ids_MJ.unbind(1):
            shared_RM |= ids_R[:, None] == candidate_ids_M
    return shared_RM


def softmax_nce(logits_NM: Tensor, same_NM: Tensor) -> Tensor:
    """(N,) the loss of each row: -log softmax, averaged over the positives that `same_NM` marks (SupCon, arXiv
    2004.11362). With one positive per row, it is InfoNCE.

    A constant is subtracted: the smallest possible average, log(number of positives). So the loss of a row is 0 if its
    positives share all of the probability equally. A row without a positive costs nothing.

    IMP uses MIL-NCE, which sums the probabilities of the positives. Then one near positive is enough, and classes with
    many examples in a batch are learned slowly.
    """
    positives_N = same_NM.sum(1)
    count_N = positives_N.clamp(min=1)
    mean_positive_N = torch.where(same_NM, logits_NM, 0).sum(1) / count_N
    return torch.where(positives_N > 0, logits_NM.logsumexp(1) - mean_positive_N - count_N.log(), 0.0)


def sigmoid_nce(logits_NM: Tensor, same_NM: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """(N,) the loss of each row: binary cross-entropy, summed over its pairs (SigLIP, arXiv 2303.15343)."""
    sign_NM = same_NM.to(logits_NM.dtype) * 2 - 1
    return -F.logsigmoid(sign_NM * (logits_NM + bias)).sum(1)
