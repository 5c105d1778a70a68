"""Device and precision, chosen alike in training, evaluation and inference."""

import ctypes
import platform
import timeit
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, get_args

import torch

from openimp.common.errors import UserError
from openimp.common.versions import cpu_info

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
"""Parameters of glibc's mallopt(3)."""
Precision = Literal["auto", "bf16", "fp32"]


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device of this name; None: the GPU if there is one, else the CPU. UserError if torch cannot use it."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError):  # torch without CUDA raises AssertionError.
        raise UserError(f"device {name}: torch cannot use it on this machine") from None
    return device


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The autocast context for a forward pass; see `precision_of`."""
    enabled = precision_of(device, precision) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def precision_of(device: torch.device, precision: Precision) -> Literal["bf16", "fp32"]:
    """The precision on a device: "auto" is bf16 if that is faster there."""
    if precision not in get_args(Precision):
        raise UserError(f"precision: expected {', '.join(map(repr, get_args(Precision)))}, found {precision!r}")
    if precision == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    return precision


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@cache
def product_speed(device: torch.device, precision: Literal["bf16", "fp32"]) -> float:
    """FLOP/s of a large matrix product: the fastest of six. No model is faster."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    seconds = timeit.repeat(lambda: (matrix @ matrix)[0, 0].item(), number=1, repeat=6)  # `item` waits for a GPU.
    return 2 * size**3 / min(seconds)


class HostCopy:
    """A scalar on its way from a device to the host. Only `read` waits for it, so that work can be queued meanwhile."""

    def __init__(self, x: torch.Tensor) -> None:
        self._copy = x.detach().to("cpu", non_blocking=True)  # From a GPU, torch copies into pinned memory.
        self._copied = torch.cuda.Event() if x.is_cuda else None
        if self._copied:
            self._copied.record()

    def read(self) -> float:
        if self._copied:
            self._copied.synchronize()
        return float(self._copy)


def return_freed_memory() -> None:
    """Makes glibc's allocator return freed blocks of 1 MiB and more to the system, from every thread.

    Otherwise blocks of up to 32 MiB may stay with each thread that had one. In a server, those are uploads and media.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def keep_freed_memory() -> None:
    """Makes glibc's allocator keep freed memory for the next step.

    Otherwise large tensors are returned to the system after each step, and the kernel zeroes their pages again: about a
    tenth of a sparse model's step on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Disables autocast for routers and for the softmax of a loss, which need fp32."""
    # FLOPs are counted on the meta device, which has no autocast.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _has_bf16(device: torch.device) -> bool:
    """Whether the processor computes bf16 natively and faster than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # On AMD, AVX-512 computes bf16 twice as fast as fp32. On Intel it is half as fast; Intel has AMX for bf16, which
    # virtual machines may hide. torch.ops.mkldnn._is_mkldnn_bf16_supported returns True even for emulation.
    vendor = cpu_info("vendor_id") or platform.processor()  # On Windows it ends with the vendor.
    return torch.cpu._is_amx_tile_supported() or (
        torch.cpu._is_avx512_bf16_supported() and vendor.endswith("AuthenticAMD")
    )
