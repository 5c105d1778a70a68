"""What is computed otherwise in bf16 on a CPU, where torch's own kernels are slow (benchmarks/kernels.py).

Shape suffixes: B examples, L tokens, H heads, K features a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 256
"""Tokens up to which bf16 attention on a CPU is computed without the fused kernel."""


def attend(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask_B11L: Tensor | None) -> Tensor:
    """Softmax attention; in bf16 on the CPU, for short sequences, spelled out.

    torch's fused CPU kernel is made for fp32 and for long sequences: in bf16 it takes three to five times as long as
    two matrix products and a softmax at 16 to 128 tokens, forward and backward, and 1.3 to 1.5 times at 256; from 512
    tokens on, and in fp32, it is level or faster.
    """
    short = q_BHLK.device.type == "cpu" and q_BHLK.dtype == torch.bfloat16 and q_BHLK.shape[2] <= SHORT
    if not short:
        return F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=mask_B11L)
    return unfused_attention(q_BHLK, k_BHLK, v_BHLK, mask_B11L)


def unfused_attention(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask_B11L: Tensor | None) -> Tensor:
    """Softmax attention as two matrix products; the mask is True where a key counts."""
    scores = (q_BHLK * q_BHLK.shape[-1] ** -0.5) @ k_BHLK.transpose(-1, -2)
    if mask_B11L is not None:
        scores = scores.masked_fill(~mask_B11L, -torch.inf)
    return scores.softmax(-1).type_as(v_BHLK) @ v_BHLK


def gelu(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh, as in arXiv 2305.06324; in bf16 on the CPU the exact one.

    The two differ by less than 5e-4, and there the one by tanh takes 2.6 to 2.9 times as long.
    """
    exact = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return F.gelu(x, approximate="none" if exact else "tanh")
