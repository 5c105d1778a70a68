"""The memory of one step, counted on fake tensors, which have shapes and no values."""

import weakref
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openimp.common.device import Precision, autocast, precision_of
from openimp.common.modality import Classes, Modalities, Tokens
from openimp.model.build import build_model
from openimp.model.embedder import Embedder, EncodeAll, Encoded, in_chunks
from openimp.model.encoder import Attention
from openimp.model.learning_rates import freeze
from openimp.objectives import task_losses
from openimp.planning.ledger import empty_batch
from openimp.recipe.schema import Recipe

CPU = torch.device("cpu")


class StepMemory(TorchDispatchMode):
    """Records each storage that an operation allocates, until it is freed. Storages from before are not counted, and
    neither is memory that a kernel allocates and frees itself.

    docs/design.md says why this is not torch's `MemTracker`.

    Attributes:
        peak: bytes by kind when their sum was largest. The kinds are "gradients" of parameters, once they are complete,
            "cast weights", which autocast keeps until the backward pass has used them, and "activations", everything
            else.
        stages: the most bytes of activations at each stage of the backward pass. The key of a stage is the number of
            bytes of complete gradients.
        inputs: bytes of the batch, which exists before the step. They are counted as fp32, although images may arrive
            with one byte per value.
        touched: names of the parameters that received a gradient, in this order, each with the key of the stage that
            its gradient begins.
        differentiated: names of the blocks through which gradients flow, and of the modalities whose features have
            gradients. Without frozen parts, these are all.
        slots: bytes that expert parallelism sends to experts or back, each time that it does.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak: Counter[str] = Counter()
        self.inputs = 0
        self.stages: dict[int, int] = {}
        self.slots: list[int] = []
        self.touched: dict[str, int] = {}
        self.differentiated: set[str] = set()
        self._now: Counter[str] = Counter()
        self._kind: dict[int, str] = {}
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            parameter.register_post_accumulate_grad_hook(partial(self._complete, name))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        cast = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), "cast weights" if cast else "activations")
        return out

    def _note(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata
        if key in self._kind or key in self._weights:
            return
        self._kind[key] = kind
        weakref.finalize(storage, self._forget, key, storage.nbytes())
        self._add(kind, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._now[self._kind.pop(key)] -= size

    def _complete(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        self._now[self._kind[storage._cdata]] -= storage.nbytes()
        self._kind[storage._cdata] = "gradients"
        self._add("gradients", storage.nbytes())
        self.touched.setdefault(name, self._now["gradients"])

    def _add(self, kind: str, size: int) -> None:
        self._now[kind] += size
        gradients, activations = self._now["gradients"], self._now["activations"]
        self.stages[gradients] = max(self.stages.get(gradients, 0), activations)
        if self._now.total() > self.peak.total():
            self.peak = self._now.copy()


def step_memory(
    recipe: Recipe,
    modalities: Modalities,
    classes: Classes,
    task: str,
    view: int,
    precision: Precision,
    on_gpu: bool = True,
    gpus: int = 1,
    owners: int = 1,
) -> StepMemory:
    """Counts a forward and a backward pass on one rank, if `gpus` ranks share the batch and `owners` ranks the experts.

    The precision "auto" is what this machine's CPU would use. With `on_gpu`, it counts a GPU's kernels, not the CPU's.
    In bf16, autocast casts the weights on one rank; on several ranks FSDP2 gathers them in bf16.
    """
    gathered_in_bf16 = gpus > 1 and precision_of(CPU, precision) == "bf16"
    # Without CUDA, torch cannot differentiate CUDA's fake tensors. So the tensors are on the CPU, and the modules that
    # run differently on a GPU are changed to do as a GPU does.
    with torch.device("meta"):  # Some initializers read the values that they have drawn, and fake tensors have none.
        model = build_model(recipe, modalities, {name: len(values) for name, values in classes.items()}).train()
    freeze(model, recipe.optimizer)
    keep_own_experts(model, owners)
    if gathered_in_bf16:
        model.bfloat16()
        for module in model.fp32_modules():
            module.float()
    with FakeTensorMode(allow_non_fake_inputs=True):  # The weights on the meta device are no fake tensors.
        model.to_empty(device=CPU)
        if on_gpu:
            _as_on_a_gpu(model, autocasts=not gathered_in_bf16)
        batch = empty_batch(recipe, task, view, modalities, classes, CPU, gpus)
        with StepMemory(model) as memory:
            if owners > 1:
                _send_slots(model, owners, memory)
            _note_gradients(model, memory)
            memory.inputs = sum(t.nbytes for t in tree_leaves(vars(batch)) if isinstance(t, Tensor))
            with autocast(CPU, "fp32" if gathered_in_bf16 else precision):
                encode_all = _noting_gradients(in_chunks(model.encode_all, recipe.memory.chunk_size), memory)
                losses = task_losses(model, recipe.tasks[task], batch, encode_all)
            losses.total.backward()
    return memory


def keep_own_experts(model: Embedder, owners: int) -> None:
    """Reduces a model to the experts of one rank, if `owners` ranks share them."""
    for module in model.experts():
        for name, weight in list(module.named_parameters()):
            own = weight.detach()[: len(weight) // owners]
            setattr(module, name, nn.Parameter(own, requires_grad=weight.requires_grad))


def _note_gradients(model: Embedder, memory: StepMemory) -> None:
    """Records in `memory.differentiated` the names of the blocks whose outputs require gradients."""
    names = {module: name for name, module in model.named_modules()}

    def note(block: nn.Module, _: Any, outputs: Any) -> None:
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(outputs)):
            memory.differentiated.add(names[block])

    for block in model.blocks():
        block.register_forward_hook(note)


def _noting_gradients(encode_all: EncodeAll, memory: StepMemory) -> EncodeAll:
    """Wraps `encode_all` to record in `memory.differentiated` which modalities' features require gradients."""

    def encode(inputs: Mapping[str, Tokens]) -> dict[str, Encoded]:
        encoded = encode_all(inputs)
        memory.differentiated.update(name for name, each in encoded.items() if each.features.requires_grad)
        return encoded

    return encode


def _send_slots(model: Embedder, owners: int, memory: StepMemory) -> None:
    """Lets the experts of one rank work on the slots that all `owners` ranks send, and allocates and counts the tensors
    that `layout.dispatch_to_experts` and `layout.combine_from_experts` would."""

    def to(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        sent: Tensor = _Sent.apply(inputs[0], memory)
        return (sent.unflatten(0, (owners, -1)).transpose(0, 1).flatten(1, 2),)

    def back(_: nn.Module, __: tuple[Tensor], out_ESD: Tensor) -> Any:
        return _Sent.apply(out_ESD.unflatten(1, (owners, -1)).transpose(0, 1).flatten(0, 1), memory)

    for module in model.experts():
        module.register_forward_pre_hook(to)
        module.register_forward_hook(back)


class _Sent(torch.autograd.Function):
    """Replaces an all-to-all by a copy of the same size, for the gradient as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: StepMemory) -> Tensor:
        ctx.memory = memory
        memory.slots.append(x.nbytes)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.memory.slots.append(grad.nbytes)
        return grad.clone(), None


def _as_on_a_gpu(model: nn.Module, autocasts: bool) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = _fused
        elif isinstance(module, nn.LayerNorm) and autocasts:
            # CUDA's autocast lists layer_norm among what is fp32; the CPU's does not.
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def _fused(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask_B11L: Tensor | None) -> Tensor:
    """The kernels that torch uses on CUDA: flash, or the memory-efficient one for masks and fp32."""
    if mask_B11L is None and q_BHLK.dtype == torch.bfloat16:
        return torch.ops.aten._scaled_dot_product_flash_attention(q_BHLK, k_BHLK, v_BHLK)[0]
    shape = (*q_BHLK.shape[:3], k_BHLK.shape[2])
    bias = None if mask_B11L is None else torch.zeros_like(mask_B11L, dtype=q_BHLK.dtype).expand(shape)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q_BHLK, k_BHLK, v_BHLK, bias, True)[0]
