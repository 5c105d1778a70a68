"""Orthogonalization of matrices by Newton-Schulz iterations, in batches of equal shape.

Shape suffixes: N matrices, R rows, C columns.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

COEFFICIENTS = (8.0934, -23.6205, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)
"""Coefficients (a, b, c) of each iteration x <- a x + b (x x') x + c (x x')^2 x.

They are chosen for singular values from 0.01 to 1. Each iteration moves the values as close to 1 as such a polynomial
can (Polar Express, arXiv 2505.16932). After the third, all are between 0.73 and 1.27."""
MARGIN = 1.01
"""bf16 rounds a norm and a quotient by up to 0.4 %. A singular value above 1, as a matrix of rank 1 could then have,
would explode: 1.004 would become 50."""
BATCH_NUMBERS = 2**24
"""Most numbers in a batch of matrices, unless a single parameter has more."""


def orthogonalize_in_batches(tensors: Sequence[Tensor]) -> None:
    """Orthogonalizes the matrices of bf16 tensors (N, R, C) in place. Those of one shape are computed together."""
    for batch in batches_by_shape(tensors):
        counts = [len(tensor) for tensor in batch]
        # If the result had a name, it would be kept in memory while the next one is computed.
        torch._foreach_copy_(batch, orthogonalize(torch.cat(batch)).split(counts))


def batches_by_shape(tensors: Iterable[Tensor], limit: int = BATCH_NUMBERS) -> list[list[Tensor]]:
    """Groups stacks of matrices (N, R, C) into those that are orthogonalized together: of one shape (R, C), and with at
    most `limit` numbers."""
    by_shape: dict[torch.Size, list[list[Tensor]]] = {}
    for tensor in tensors:
        batches = by_shape.setdefault(tensor.shape[1:], [[]])
        if batches[-1] and sum(other.numel() for other in batches[-1]) + tensor.numel() > limit:
            batches.append([])
        batches[-1].append(tensor)
    return [batch for batches in by_shape.values() for batch in batches]


def orthogonalize(x_NRC: Tensor) -> Tensor:
    """Brings the singular values of bf16 matrices to between about 0.73 and 1.27.

    Those below 0.01 of the Frobenius norm become 80 times as large.
    """
    x_NRC = x_NRC / (MARGIN * x_NRC.norm(dim=(1, 2), keepdim=True)).clamp(min=1e-7)
    is_wide = x_NRC.shape[1] <= x_NRC.shape[2]
    for a, b, c in COEFFICIENTS:
        # The smaller of the two Gram matrices. Both give the same result.
        gram = x_NRC @ x_NRC.mT if is_wide else x_NRC.mT @ x_NRC
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, factor, x_NRC, beta=a) if is_wide else torch.baddbmm(x_NRC, x_NRC, factor, beta=a)
    return x_NRC
