"""Compares alternative kernels on a CPU, forward and backward. The choices in openimp/model/kernels.py follow from it.

    python -m benchmarks.kernels

For `UNFUSED_LENGTH`, it compares attention as two matrix products and a softmax with torch's fused kernel. For `gelu`,
it compares the exact form with the tanh approximation. The two kernels of a comparison run alternately in one process,
and the result is the median over all pairs. Heads have width 64. In masked rows, half of the tokens of every second
example are masked.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.model.kernels import unfused_attention

SHAPES = [(128, 6, 16), (64, 6, 36), (64, 6, 64), (16, 6, 128), (8, 6, 256), (4, 6, 512), (2, 6, 1024)]
"""(examples, heads, tokens)"""
HIDDEN = [(1024, 512), (3072, 512), (4096, 1536)]
"""(tokens, hidden features of an MLP)"""
HEAD = "| {} | type | {}, ms | {}, ms | second / first |\n|---|---|---|---|---|"


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def qkv_of(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k and v (B, H, L, 64) with the encoder's memory layout: views of one tensor (B, L, 3, H, 64)."""
    batch, heads, length = shape
    qkv = torch.randn(batch, length, 3, heads, 64, dtype=dtype)
    return [part.requires_grad_() for part in qkv.permute(2, 0, 3, 1, 4)]


def half_mask(shape: tuple[int, int, int]) -> Tensor:
    mask = torch.ones(shape[0], 1, 1, shape[2], dtype=torch.bool)
    mask[1::2, ..., shape[2] // 2 :] = False
    return mask


def seconds(function: Callable[..., Tensor], inputs: Sequence[Tensor], rest: Sequence[Any], grad: Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.grad(function(*inputs, *rest), inputs, grad)
    return time.perf_counter() - start


def compare(
    name: str, functions: Sequence[Callable[..., Tensor]], inputs: Sequence[Tensor], pairs: int, *rest: Any
) -> None:
    """Prints a row: the median times of two functions of `inputs` and `rest`, and the median ratio of the pairs."""
    grad = torch.randn_like(functions[0](*inputs, *rest))
    times = [[seconds(function, inputs, rest, grad) for function in functions] for _ in range(pairs + 2)][2:]
    first, second = (statistics.median(column) * 1e3 for column in zip(*times))
    ratio = statistics.median(other / one for one, other in times)
    kind = str(inputs[0].dtype).removeprefix("torch.")
    print(f"| {name} | {kind} | {first:.2f} | {second:.2f} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="two pairs of the smallest sizes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pairs, shapes, hidden = (2, SHAPES[:3], HIDDEN[:1]) if args.smoke else (args.pairs, SHAPES, HIDDEN)
    types = (torch.bfloat16, torch.float32)
    print(HEAD.format("attention: examples, heads, tokens", "plain", "fused"))
    for shape in shapes:
        for dtype in types:
            for mask, suffix in ((None, ""), (half_mask(shape), ", masked")):
                compare(f"{shape}{suffix}", (unfused_attention, fused), qkv_of(shape, dtype), pairs, mask)
    print("\n" + HEAD.format("GELU: tokens, hidden features", "exact", "tanh"))
    for size in hidden:
        for dtype in types:
            both = [partial(F.gelu, approximate=how) for how in ("none", "tanh")]
            compare(f"{size}", both, [torch.randn(size, dtype=dtype, requires_grad=True)], pairs)


if __name__ == "__main__":
    main()
