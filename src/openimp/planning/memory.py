"""The memory of one step, counted on fake tensors, which have shapes and no values."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openimp.common.device import Precision, autocast, precision_of
from openimp.common.modality import Classes, Modalities
from openimp.model.embedder import in_chunks
from openimp.model.encoder import Attention
from openimp.objectives.losses import task_losses
from openimp.planning.costs import meta_model, zero_batch
from openimp.recipe.schema import Recipe

CPU = torch.device("cpu")


class StepMemory(TorchDispatchMode):
    """Records each storage that an operation allocates, until it is freed.

    Storages that existed before are not counted, and neither is memory that a kernel allocates and frees itself. A
    storage is a gradient once the gradient of its parameter is complete. All others are activations.

    Attributes:
        peak: bytes of "gradients" and of "activations" at the moment when their sum was largest.
        forward_activations: most bytes of activations before any gradient was complete.
        final_activations: most bytes of activations after every parameter that gets a gradient has one.
        inputs: bytes of the batch, which exists before the step. They are counted as fp32, although images may arrive
            with one byte per value.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak: Counter[str] = Counter()
        self.forward_activations = 0
        self.final_activations = 0
        self.inputs = 0
        self._held_bytes: Counter[str] = Counter()  # by kind of storage
        self._kind_of: dict[int, str] = {}  # by the address of the storage
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._with_gradient = set[Tensor]()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._on_result(tensor.untyped_storage())
        return out

    def _on_result(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._kind_of and address not in self._weights:
            self._kind_of[address] = "activations"
            weakref.finalize(storage, self._on_free, address, storage.nbytes())
            self._add("activations", storage.nbytes())

    def _on_free(self, address: int, size_bytes: int) -> None:
        self._held_bytes[self._kind_of.pop(address)] -= size_bytes

    def _on_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if parameter not in self._with_gradient:
            self._with_gradient.add(parameter)
            self.final_activations = 0
        storage = parameter.grad.untyped_storage()
        self._held_bytes[self._kind_of[storage._cdata]] -= storage.nbytes()
        self._kind_of[storage._cdata] = "gradients"
        self._add("gradients", storage.nbytes())

    def _add(self, kind: str, size_bytes: int) -> None:
        self._held_bytes[kind] += size_bytes
        activations = self._held_bytes["activations"]
        if self._with_gradient:
            self.final_activations = max(self.final_activations, activations)
        else:
            self.forward_activations = max(self.forward_activations, activations)
        if self._held_bytes.total() > self.peak.total():
            self.peak = self._held_bytes.copy()


def step_memory(
    recipe: Recipe,
    modalities: Modalities,
    classes: Classes,
    task: str,
    view: int,
    *,
    precision: Precision,
    on_gpu: bool = True,
    gpus: int = 1,
) -> StepMemory:
    """Counts the memory of a forward and a backward pass on one rank, if `gpus` ranks share the batch.

    The precision "auto" is what this machine's CPU would use. With `on_gpu`, it counts what a GPU's kernels allocate,
    else what the CPU's do. In bf16, autocast casts the weights on one rank. On several ranks, FSDP2 gathers them in
    bf16.
    """
    gathered_in_bf16 = gpus > 1 and precision_of(CPU, precision) == "bf16"
    # Without CUDA, torch cannot differentiate CUDA's fake tensors. So the tensors are on the CPU, and modules that have
    # other kernels on a GPU get the GPU's.
    model = meta_model(recipe, modalities, classes).train()
    if gathered_in_bf16:
        model.bfloat16()
        for module in model.fp32_modules():
            module.float()
    with FakeTensorMode(allow_non_fake_inputs=True):  # The weights on the meta device are no fake tensors.
        model.to_empty(device=CPU)
        if on_gpu:
            _use_gpu_kernels(model, autocasts=not gathered_in_bf16)
        batch = zero_batch(recipe, task, view, modalities, classes, device=CPU, ranks=gpus)
        with StepMemory(model) as memory:
            memory.inputs = sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
            with autocast(CPU, "fp32" if gathered_in_bf16 else precision):
                encode_all = in_chunks(model.encode_all, recipe.memory.chunk_size)
                losses = task_losses(model, recipe.tasks[task], batch, encode_all)
            losses.total.backward()
    return memory


def _use_gpu_kernels(model: nn.Module, autocasts: bool) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = _cuda_attention
        elif isinstance(module, nn.LayerNorm) and autocasts:
            # CUDA's autocast computes layer_norm in fp32; the CPU's does not.
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def _cuda_attention(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask_B11L: Tensor | None) -> Tensor:
    """The kernels that torch uses on CUDA: flash, or the memory-efficient one for masks and fp32."""
    if mask_B11L is None and q_BHLK.dtype == torch.bfloat16:
        return torch.ops.aten._scaled_dot_product_flash_attention(q_BHLK, k_BHLK, v_BHLK)[0]
    shape = (*q_BHLK.shape[:3], k_BHLK.shape[2])
    bias = None if mask_B11L is None else torch.zeros_like(mask_B11L, dtype=q_BHLK.dtype).expand(shape)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q_BHLK, k_BHLK, v_BHLK, bias, True)[0]
