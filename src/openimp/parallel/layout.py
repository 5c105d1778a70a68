"""Layout of a model over the ranks: replicas, shards, and expert parallelism.

FSDP2 shards and gathers the parameters and reduces the gradients. A tensor that is sharded or replicated over a device
mesh is a DTensor.
"""

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openimp.common.device import Precision, autocast
from openimp.parallel.distributed import all_reduce_mean, world_size

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Layout(NamedTuple):
    """How the ranks share a model.

    Attributes:
        ranks: number of ranks.
        shard_degree: number of consecutive ranks that a replica is sharded over. If it is 1, ranks share only experts.
        expert_degree: number of consecutive ranks that the experts of a layer are distributed over.
        reshard_after_forward: whether a block's gathered weights are freed after each of its passes. If not, they are
            kept until the update.
    """

    ranks: int
    shard_degree: int
    expert_degree: int
    reshard_after_forward: bool = True

    def __str__(self) -> str:
        """As a recipe's `parallel`."""
        experts = f", expert_degree: {self.expert_degree}" if self.expert_degree > 1 else ""
        kept = "" if self.reshard_after_forward else ", reshard_after_forward: false"
        return f"{{shard_degree: {self.shard_degree}{experts}{kept}}}"

    @property
    def expert_shards(self) -> int:
        """Number of ranks that each expert is sharded over."""
        return max(1, self.shard_degree // self.expert_degree)


def mixed_precision(device: torch.device, precision: Precision) -> torch.autocast:
    """The context of a forward pass. On one rank, autocast computes in bf16. On several ranks there is no autocast,
    because `apply_parallelism` lets FSDP2 gather the weights in bf16."""
    return autocast(device, precision if world_size() == 1 else "fp32")


def apply_parallelism(
    model: nn.Module,
    layout: Layout,
    device: torch.device,
    *,
    blocks: Iterable[nn.Module],
    experts: Iterable[nn.Module],
    methods: Iterable[str],
    param_dtype: torch.dtype = torch.float32,
    fp32_modules: Iterable[nn.Module] = (),
) -> None:
    """Distributes a model over the ranks, with FSDP2 and expert parallelism.

    With several ranks FSDP2 is used even if replicas are not sharded. It averages the gradients over the ranks in fp32.
    The gradient of a parameter that a step does not use stays None. Parameters and their gradients are fp32. The model
    computes with copies of the type `param_dtype`, which FSDP2 frees with the gathered parameters.

    Args:
        model: has the same weights on all ranks.
        layout: see `Layout`.
        device: of this rank.
        blocks: modules whose parameters are gathered only while they compute.
        experts: modules whose parameters have the experts as their first dimension.
        methods: names of the model's methods that compute with its other parameters.
        param_dtype: the type in which parameters are gathered. If it is bf16, the model must run without autocast.
        fp32_modules: modules whose parameters are gathered in fp32 all the same.
    """
    if layout.ranks == 1:
        model.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    blocks = [*blocks]
    experts = [*experts]
    # If everything is gathered in fp32, FSDP2 need not wrap these modules separately.
    fp32_modules = [*fp32_modules] if param_dtype != torch.float32 else []
    kept_gathered = set() if layout.reshard_after_forward else {*blocks, *experts}
    mesh_shape = (layout.ranks // layout.shard_degree, layout.shard_degree)
    mesh = init_device_mesh(device.type, mesh_shape, mesh_dim_names=("replicate", "shard"))
    modules_and_meshes = [(module, mesh) for module in (*blocks, *fp32_modules, model)]
    if layout.expert_degree > 1:
        expert_replicas = layout.ranks // (layout.expert_shards * layout.expert_degree)
        expert_shape = (expert_replicas, layout.expert_shards, layout.expert_degree)
        expert_mesh = init_device_mesh(device.type, expert_shape, mesh_dim_names=("replicate", "shard", "experts"))
        expert_mesh["shard", "experts"]._flatten()  # DTensor then reduces a norm over both dimensions at once.
        modules_and_meshes = [*((module, expert_mesh) for module in experts), *modules_and_meshes]
        for module in experts:
            _keep_own_experts(module, expert_mesh["experts"], device)
    # FSDP2 shards dimension 0 by default. In an expert weight, this dimension is the experts: expert parallelism has
    # sharded it already, or else FSDP2 might have to pad it. So dimension 1 is sharded instead, if it divides evenly.
    sharded_by_dim_1 = {
        weight
        for module in experts
        for weight in module.parameters()
        if layout.expert_degree > 1 or weight.shape[1] % layout.shard_degree == 0
    }
    for module, module_mesh in modules_and_meshes:
        has_replicas = module_mesh["replicate"].size() > 1
        precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.float32 if module in fp32_modules else param_dtype,
            reduce_dtype=torch.float32,
            # A router's token counts must stay fp32.
            cast_forward_inputs=False,
        )
        wrapped = fully_shard(
            module,
            mesh=module_mesh["replicate", "shard"] if has_replicas else module_mesh["shard"],
            mp_policy=precision_policy,
            shard_placement_fn=lambda weight: Shard(int(weight in sharded_by_dim_1)),
            reshard_after_forward=False if module in kept_gathered else None,
        )
        if module in kept_gathered:
            wrapped.set_reshard_after_backward(False, recurse=False)
        # gloo's average is wrong in some versions of torch: https://github.com/pytorch/pytorch/issues/162338
        wrapped.set_force_sum_reduction_for_comms(device.type == "cpu")
    for method in methods:
        register_fsdp_forward_method(model, method)


def _keep_own_experts(module: nn.Module, mesh: "DeviceMesh", device: torch.device) -> None:
    """Makes each weight of a module a DTensor that holds this rank's share of the experts, the first dimension."""
    from torch.distributed.tensor import DTensor, Shard

    for name, weight in list(module.named_parameters()):
        own_experts = weight.detach().chunk(mesh.size())[mesh.get_local_rank()]
        # A view would keep the weights of all experts in memory.
        sharded = DTensor.from_local(own_experts.to(device, copy=True), mesh, [Shard(0)])
        setattr(module, name, nn.Parameter(sharded, requires_grad=weight.requires_grad))


def reshard(model: nn.Module) -> None:
    """Frees the weights that FSDP2 keeps gathered. They would be out of date after an update."""
    if world_size() == 1:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; gradients flow through it."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def gather_matrices(shard: Tensor, weight: Any) -> Tensor:
    """Gathers the matrices that `weight` stacks from the shards of all ranks. Whole experts stay on their ranks."""
    return _redistribute(shard, weight, gather=True)


def shard_matrices(matrices: Tensor, weight: Any) -> Tensor:
    """This rank's shard of what `gather_matrices` returned."""
    return _redistribute(matrices, weight, gather=False)


def _redistribute(local: Tensor, weight: Any, gather: bool) -> Tensor:
    if not hasattr(weight, "device_mesh"):
        return local
    from torch.distributed.tensor import DTensor, Replicate

    sharded = weight.placements
    gathered = [
        placement if weight.ndim == 3 and placement.is_shard(0) else Replicate() for placement in weight.placements
    ]
    before, after = (sharded, gathered) if gather else (gathered, sharded)
    tensor: Any = DTensor.from_local(
        local, weight.device_mesh, before, run_check=False, shape=weight.shape, stride=weight.stride()
    )
    return cast(Tensor, tensor.redistribute(placements=after).to_local())


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from the shards of all ranks. Every rank must call this."""
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights_hash(module: nn.Module) -> Any:
    """SHA-256 of the names, types, shapes and values of a module's weights, unsharded. Every rank must call this."""
    total = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        full: Any = full_tensor(tensor)
        total.update(f"{name} {full.dtype} {list(full.shape)}\n".encode())
        total.update(full.reshape(-1).view(torch.uint8).cpu().numpy())
    return total


def group_by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Groups tensors by device mesh. An operation on a list of DTensors needs all of them on one mesh."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(groups.values())


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales all gradients so that their Euclidean norm is at most `max_norm`, and returns the norm before scaling.

    Unlike `torch.nn.utils.clip_grad_norm_`, this takes parameters on several device meshes.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [full_tensor(torch.nn.utils.get_total_norm(group)) for group in group_by_mesh(gradients)]
    # With several meshes, norms may differ between ranks by rounding. The mean keeps replicas equal.
    norm = norms[0] if len(norms) == 1 else all_reduce_mean(torch.nn.utils.get_total_norm(norms))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_shard(gradient) for gradient in gradients], factor)
    return norm


class LocalExperts(NamedTuple):
    """The experts of a layer that this rank holds.

    Attributes:
        weights: tensors whose first dimension is these experts.
        group: the ranks that the experts of the layer are distributed over; None if this rank has all of them.
    """

    weights: list[Tensor]
    group: Any


def local_experts(weights: Iterable[Tensor]) -> LocalExperts:
    """This rank's part of weights whose first dimension is the experts. Their gradients are divided by P.

    P is the number of ranks in `group`. All of them send tokens to an expert, so its gradient is the sum over their P
    losses. FSDP2 then takes the mean over the groups only. With the division, it becomes the mean over all ranks, as
    for every other parameter.
    """
    weights = list(weights)
    mesh = getattr(weights[0], "device_mesh", None)
    if mesh is None:
        return LocalExperts(weights, None)
    shards = [local_shard(weight) for weight in weights]
    for shard in shards:
        if shard.requires_grad:
            shard.register_hook(lambda grad: grad / mesh.size())
    return LocalExperts(shards, mesh.get_group())


def dispatch_to_experts(x_ESD: Tensor, group: Any) -> Tensor:
    """Sends each expert's slots to the rank that holds it: (E, S, D) to (E / P, P S, D), from all P ranks."""
    if group is None:
        return x_ESD
    received = _all_to_all(x_ESD, group).unflatten(0, (dist.get_world_size(group), -1))
    return received.transpose(0, 1).flatten(1, 2)


def combine_from_experts(x_ESD: Tensor, group: Any) -> Tensor:
    """The inverse of `dispatch_to_experts`: returns the experts' results to the ranks that sent the tokens."""
    if group is None:
        return x_ESD
    by_rank = x_ESD.unflatten(1, (dist.get_world_size(group), -1)).transpose(0, 1)
    return _all_to_all(by_rank.flatten(0, 1), group)


def _all_to_all(x: Tensor, group: Any) -> Tensor:
    """Splits the first dimension evenly, and sends part i to rank i of the group."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

    return wait_tensor(all_to_all_single_autograd(x.contiguous(), None, None, group))
