"""Device and precision, chosen alike in training, evaluation and inference."""

import ctypes
import platform
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from openimp.common.errors import UserError

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
"""Parameters of glibc's mallopt(3)."""
Precision = Literal["auto", "bf16", "fp32"]


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The autocast context for a forward pass; see `precision_of`."""
    enabled = precision_of(device, precision) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def precision_of(device: torch.device, precision: Precision) -> Literal["bf16", "fp32"]:
    """The precision on a device: "auto" is bf16 if that is faster there."""
    if precision not in get_args(Precision):
        raise UserError(f"precision: expected {', '.join(map(repr, get_args(Precision)))}, found {precision!r}")
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return precision


@cache
def product_speed(device: torch.device, precision: Literal["bf16", "fp32"]) -> float:
    """FLOP/s of a large matrix product: the fastest of six. No model is faster."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # Waits for a GPU.
        seconds.append(time.perf_counter() - start)
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


def has_bf16(device: torch.device) -> bool:
    """Whether the processor computes bf16 natively and faster than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # On AMD, AVX-512 computes bf16 twice as fast as fp32. On Intel it is half as fast; Intel has AMX for bf16, which
    # virtual machines may hide. torch.ops.mkldnn._is_mkldnn_bf16_supported returns True even for emulation.
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and _vendor() == "AuthenticAMD")


@cache
def _vendor() -> str:
    """The CPU's vendor, such as "AuthenticAMD" or "GenuineIntel"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # Not Linux. On Windows it is the end of "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD".
        return platform.processor().rpartition(" ")[2]
    return next((line.rpartition(" ")[2] for line in lines if line.startswith("vendor_id")), "")
