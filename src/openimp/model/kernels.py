"""Faster attention and GELU for bf16 on CPUs, where torch's own kernels are slow (benchmarks/kernels.py).

Shape suffixes: B examples, L tokens, H heads, K features per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.recipe.model import Gelu

UNFUSED_LENGTH = 256
"""Longest sequence for which bf16 attention on a CPU avoids the fused kernel."""


def attend(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask_B11L: Tensor | None) -> Tensor:
    """Softmax attention. In bf16 on a CPU, short sequences do not use torch's fused kernel.

    In bf16, forward and backward, the fused CPU kernel takes three to five times as long as two matrix products and a
    softmax at 16 to 128 tokens, and 1.3 to 1.5 times as long at 256. From 512 tokens on, and in fp32, it takes the same
    time or less.
    """
    short = q_BHLK.device.type == "cpu" and q_BHLK.dtype == torch.bfloat16 and q_BHLK.shape[2] <= UNFUSED_LENGTH
    if short:
        return unfused_attention(q_BHLK, k_BHLK, v_BHLK, mask_B11L)
    return F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=mask_B11L)


def unfused_attention(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask_B11L: Tensor | None) -> Tensor:
    """Softmax attention as two matrix products. The mask is True for the keys that are attended to."""
    scores = (q_BHLK * q_BHLK.shape[-1] ** -0.5) @ k_BHLK.transpose(-1, -2)
    if mask_B11L is not None:
        scores = scores.masked_fill(~mask_B11L, -torch.inf)
    return scores.softmax(-1).type_as(v_BHLK) @ v_BHLK


def gelu(x: Tensor, kind: Gelu = "tanh") -> Tensor:
    """GELU, by default with the tanh approximation, as in arXiv 2305.06324; exact GELU in bf16 on a CPU.

    On a CPU in bf16, the approximation takes 2.6 to 2.9 times as long. The two differ by less than 5e-4.
    """
    exact = kind == "erf" or (x.device.type == "cpu" and x.dtype == torch.bfloat16)
    return F.gelu(x, approximate="none" if exact else "tanh")
