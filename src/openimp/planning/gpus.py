"""Published figures of GPUs, to plan with, and the peak to which the utilization of a device refers."""

from dataclasses import dataclass

import torch

from openimp.common.device import Precision, precision_of, product_speed

GPUS_PER_NODE = 8
"""Links connect the GPUs of a node, and the network connects nodes."""
USABLE = 0.9
"""Share of a GPU's memory for tensors. The CUDA context, NCCL's buffers and gaps between tensors take the remainder."""
GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """A GPU in the kind of machine that it is mostly sold in."""

    memory_gib: float  # that programs see
    bf16_tflops: float  # dense products, as its maker publishes
    link_gb_per_s: float  # from the other GPUs of its node
    network_gb_per_s: float  # from other nodes, over a network card of its own
    names: tuple[str, ...]  # CUDA's names of its variants with these figures

    @property
    def flops_per_s(self) -> float:
        return self.bf16_tflops * 1e12

    @property
    def usable_bytes(self) -> float:
        return USABLE * self.memory_gib * GIB


GPUS = {
    "a100-40": GPU(
        memory_gib=39,
        bf16_tflops=312,
        link_gb_per_s=300,
        network_gb_per_s=25,
        names=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    ),
    "a100": GPU(
        memory_gib=79,
        bf16_tflops=312,
        link_gb_per_s=300,
        network_gb_per_s=25,
        names=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
    ),
    "h100": GPU(
        memory_gib=79,
        bf16_tflops=989,
        link_gb_per_s=450,
        network_gb_per_s=50,
        names=("NVIDIA H100 80GB HBM3",),
    ),
    "h200": GPU(
        memory_gib=140,
        bf16_tflops=989,
        link_gb_per_s=450,
        network_gb_per_s=50,
        names=("NVIDIA H200",),
    ),
    "b200": GPU(
        memory_gib=178,
        bf16_tflops=2250,
        link_gb_per_s=900,
        network_gb_per_s=50,
        names=("NVIDIA B200",),
    ),
    "l40s": GPU(
        memory_gib=44,
        bf16_tflops=362,
        link_gb_per_s=32,
        network_gb_per_s=12.5,
        names=("NVIDIA L40S",),
    ),
    "rtx4090": GPU(
        memory_gib=23.5,
        bf16_tflops=165,
        link_gb_per_s=32,
        network_gb_per_s=1.25,
        names=("NVIDIA GeForce RTX 4090",),
    ),
}


def peak_flops(device: torch.device, precision: Precision) -> float:
    """The FLOP/s that an MFU or an HFU of 1 means.

    For a GPU in `GPUS` it is the published bf16 peak, as in `openimp plan`. For any other device it is the speed of the
    fastest of some large matrix products.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for gpu in GPUS.values():
            if name in gpu.names:
                return gpu.flops_per_s
    return product_speed(device, precision_of(device, precision))
