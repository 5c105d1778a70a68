"""Attention on the CPU: two matrix products and a softmax against torch's fused kernel, forward and backward.

    python benchmarks/attention.py

It backs `SHORT` in openimp/model/encoder.py. The two take turns in one process, and the median over all pairs counts.
Heads are 64 wide; the masked rows have half of each second example's tokens masked.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.model.encoder import spelled_out

SHAPES = [(128, 6, 16), (64, 6, 36), (64, 6, 64), (16, 6, 128), (8, 6, 256), (4, 6, 512), (2, 6, 1024)]
"""Examples, heads, tokens."""


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k and v (B, H, L, 64) laid out as the encoder has them: views of one (B, L, 3, H, 64)."""
    batch, heads, length = shape
    qkv = torch.randn(batch, length, 3, heads, 64, dtype=dtype)
    return [part.requires_grad_() for part in qkv.permute(2, 0, 3, 1, 4)]


def seconds(attend: object, qkv: list[Tensor], mask: Tensor | None, grad: Tensor) -> float:
    start = time.perf_counter()
    out = attend(*qkv, mask)  # type: ignore[operator]
    torch.autograd.grad(out, qkv, grad)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="two pairs of the three shortest")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pairs, shapes = (2, SHAPES[:3]) if args.smoke else (args.pairs, SHAPES)
    print("| examples, heads, tokens | type | mask | spelled out, ms | fused, ms | fused / spelled out |")
    print("|---|---|---|---|---|---|")
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            for masked in (False, True):
                qkv, mask = inputs(shape, dtype), None
                if masked:
                    mask = torch.ones(shape[0], 1, 1, shape[2], dtype=torch.bool)
                    mask[1::2, ..., shape[2] // 2 :] = False
                grad = torch.randn(shape[0], shape[1], shape[2], 64, dtype=dtype)
                times = [[seconds(f, qkv, mask, grad) for f in (spelled_out, fused)] for _ in range(pairs + 2)][2:]
                plain, kernel = (statistics.median(column) * 1e3 for column in zip(*times))
                ratio = statistics.median(other / one for one, other in times)
                kind = str(dtype).removeprefix("torch.")
                print(f"| {shape} | {kind} | {'yes' if masked else 'no'} | {plain:.2f} | {kernel:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
