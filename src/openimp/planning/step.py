"""What one step needs on one GPU in a layout: memory, communication and time. docs/plan.md has the rules."""

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from openimp.common.objective import LossSizes
from openimp.model.embedder import pass_sizes
from openimp.model.learning_rates import muon_stacks
from openimp.objectives.nce import MAX_SIMILARITIES
from openimp.parallel.muon import BATCH_ELEMENTS, stack_shape
from openimp.planning.costs import Cost
from openimp.planning.gpus import GPU
from openimp.planning.memory import StepMemory
from openimp.planning.sharding import BF16_BYTES, FP32_BYTES, Group, Sharding, Traffic
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Task

SIMILARITY_BYTES = 21
"""Bytes that the sigmoid loss holds at its peak per similarity, as measured. The softmax loss holds fewer."""


class GPUMemory(NamedTuple):
    """Bytes that one GPU holds at the peak of a step, by what they are."""

    parameters: int
    optimizer_state: int
    inputs: int
    gradients: int = 0
    collective_buffers: int = 0  # gathered weights, gathered vectors and similarities, gradients that are being reduced
    activations: int = 0
    muon_buffers: int = 0

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def temporary(self) -> int:
        """Bytes that are allocated only during the step. The batch was there before."""
        return self.total - self.parameters - self.optimizer_state - self.inputs


@dataclass(frozen=True)
class StepNeeds:
    """What one step of a task and view needs."""

    cost: Cost  # examples, tokens and FLOPs, over all GPUs
    memory: GPUMemory
    received_bytes: float  # by one GPU, in collectives
    compute_seconds: float
    wait_seconds: float  # for collectives that no computation hides


class StepPlanner:
    """Plans the steps of a recipe in one layout."""

    def __init__(self, recipe: Recipe, sharding: Sharding) -> None:
        self.recipe = recipe
        self.sharding = sharding
        self.model = sharding.model
        self.weights = dict(self.model.named_parameters())
        self.trained: set[Tensor] = {weight for weight in self.weights.values() if weight.requires_grad}
        self.block_weights = [{*block.parameters()} for block in self.model.blocks()]
        self.outside_blocks = {*self.weights.values()}.difference(*self.block_weights)
        self.muon_stacks = muon_stacks(self.model, recipe.optimizer)
        self.muon_weights = {*self.muon_stacks}

    def step(self, task: Task, cost: Cost, step_memory: StepMemory, gpu: GPU, utilization: float) -> StepNeeds:
        """Plans a step with these costs, at a share (`utilization`) of the GPU's peak.

        `step_memory` is the memory of its activations.
        """
        with_grad = self._with_grad(cost)
        updated = self._updated(cost)
        loss_sizes = self._loss_sizes(task, cost)
        sharding = self.sharding
        layout = sharding.layout
        weight_bytes = sharding.compute_type_bytes
        # `draw` inputs per example.
        local_examples = {name: cost.examples * spec.draw // layout.ranks for name, spec in task.inputs.items()}
        sizes_of_passes = pass_sizes(local_examples, self.recipe.memory.chunk_size)
        passes = [self.model.blocks_of(sizes) for sizes in sizes_of_passes]
        weights_per_pass = [weight for blocks in passes for block in blocks for weight in block.parameters()]
        distinct_weights = {*weights_per_pass}
        # Weights are gathered while other blocks compute. If the backward pass encodes a chunk again, they are gathered
        # once for this second forward pass and for its backward pass.
        if layout.reshard_after_forward:
            forward_traffic = sharding.gather(weights_per_pass, weight_bytes)
            regather_traffic = forward_traffic
        else:
            forward_traffic = sharding.gather(distinct_weights, weight_bytes)
            regather_traffic = Traffic()
        # With one pass, the reduction of gradients overlaps with computation, too. With several passes (chunks),
        # gradients are reduced after the last one.
        overlapped = with_grad & distinct_weights if len(passes) == 1 else set()
        backward_traffic = regather_traffic + sharding.reduce(overlapped)
        # No computation hides this traffic.
        exposed_traffic = sharding.reduce(with_grad - overlapped)
        exposed_traffic += sharding.gather(updated & self.muon_weights, BF16_BYTES)
        exposed_traffic += self._expert_traffic(cost, is_chunked=len(passes) > 1)
        for _ in range(1 + loss_sizes.heads):  # FSDP2 gathers the weights outside of blocks again for each head.
            exposed_traffic += sharding.gather(self.outside_blocks, weight_bytes)
        exposed_traffic += Group(layout.ranks).all_gather(self._vector_bytes(loss_sizes))

        flops_per_s = gpu.flops_per_s * utilization
        forward_seconds = cost.forward_flops / layout.ranks / flops_per_s
        backward_seconds = (cost.hardware_flops - cost.forward_flops) / layout.ranks / flops_per_s
        update_seconds = cost.optimizer_flops * self._muon_share(updated) / flops_per_s
        wait_seconds = exposed_traffic.seconds(gpu)
        wait_seconds += max(0.0, forward_traffic.seconds(gpu) - forward_seconds)
        wait_seconds += max(0.0, backward_traffic.seconds(gpu) - backward_seconds)
        return StepNeeds(
            cost=cost,
            memory=self.memory(task, cost, step_memory),
            received_bytes=(forward_traffic + backward_traffic + exposed_traffic).received_bytes,
            compute_seconds=forward_seconds + backward_seconds + update_seconds,
            wait_seconds=wait_seconds,
        )

    def _vector_bytes(self, loss_sizes: LossSizes) -> int:
        return FP32_BYTES * self.model.config.embed_dim * loss_sizes.vectors

    def _expert_traffic(self, cost: Cost, is_chunked: bool) -> Traffic:
        """Traffic of expert parallelism: tokens go to their experts and back, and so do their gradients.

        The tokens go there and back again each time that the backward pass repeats the forward pass.
        """
        moe = self.recipe.model.moe
        if moe is None:
            return Traffic()
        slots = moe.capacity_factor * cost.tokens / self.sharding.layout.ranks * moe.layers
        exchanges = 4 + 2 * is_chunked + 2 * self.recipe.memory.activation_checkpointing
        slot_bytes = self.sharding.compute_type_bytes * self.recipe.model.width
        # An all-to-all receives as many bytes as an all-gather of the same size.
        return Group(self.sharding.layout.expert_degree).all_gather(exchanges * slot_bytes * slots)

    def _with_grad(self, cost: Cost) -> set[Tensor]:
        """The weights that get a gradient in a step."""
        return {self.weights[name] for name in cost.params_with_grad}

    def _updated(self, cost: Cost) -> set[Tensor]:
        """The weights that a step updates."""
        return self.trained if self.recipe.optimizer.zero_missing_grads else self._with_grad(cost)

    def _loss_sizes(self, task: Task, cost: Cost) -> LossSizes:
        by_objective = [objective.loss_sizes(task, cost.examples) for objective in task.objectives]
        return LossSizes(*map(sum, zip(*by_objective)))  # Sums each field.

    def _muon_share(self, updated: Set[Tensor]) -> float:
        """The share of Muon's work that each GPU does. With expert parallelism, it updates only its experts."""
        weights = updated & self.muon_weights
        return self.sharding.gathered_elements(weights) / max(1, sum(weight.numel() for weight in weights))

    def _muon_buffer_bytes(self, updated: Set[Tensor]) -> int:
        """Most bytes that Muon holds during an update besides the momentum.

        It always holds the updates of this GPU's shards in bf16. Besides them it first holds the updates in fp32,
        before they are rounded, and then an iteration on a batch of whole matrices.
        """
        weights = updated & self.muon_weights
        update_bytes = BF16_BYTES * self.sharding.held_bytes(weights) // FP32_BYTES
        elements_by_shape = Counter[tuple[int, int]]()  # Matrices of one shape are in the same batches.
        for weight in weights:
            _, rows, columns = stack_shape(weight, self.muon_stacks[weight])
            elements_by_shape[rows, columns] += self.sharding.gathered_elements([weight])
        # X and the result and, as large as the shorter side squared, X X' and a polynomial of it.
        iteration_elements = max(
            (
                min(elements, BATCH_ELEMENTS) * (2 + 2 * min(shape) / max(shape))
                for shape, elements in elements_by_shape.items()
            ),
            default=0,
        )
        return update_bytes + max(2 * update_bytes, round(BF16_BYTES * iteration_elements))

    def memory(self, task: Task, cost: Cost, step_memory: StepMemory) -> GPUMemory:
        """What one GPU holds at the moment of the step at which it holds most. A CPU that trains alone holds the same,
        if `step_memory` is a CPU's."""
        updated = self._updated(cost)
        loss_sizes = self._loss_sizes(task, cost)
        sharding = self.sharding
        layout = sharding.layout
        # AdamW has two tensors per parameter, and Muon one.
        optimizer_bytes = 2 * sharding.held_bytes(self.trained) - sharding.held_bytes(self.muon_weights)
        ema_bytes = sharding.held_bytes(self.trained) if self.recipe.optimizer.ema_decay else 0
        before = GPUMemory(
            parameters=sharding.held_bytes(self.weights.values()),
            optimizer_state=optimizer_bytes + ema_bytes,
            inputs=step_memory.inputs,
        )
        with_gradients = before._replace(gradients=sharding.held_bytes(updated))
        if layout.ranks == 1:
            at_peak = step_memory.peak  # gradients and activations
            snapshots = [before._replace(**at_peak), with_gradients]
        else:
            # With sharded gradients, the peak is at the end of the forward or of the backward pass.
            # The weights outside of blocks are gathered. So are all blocks or, with resharding, the current block and,
            # if weights are sharded, the next one, which is prefetched.
            block_bytes = [sharding.gathered_bytes(weights) for weights in self.block_weights]
            weight_bytes = sharding.gathered_bytes(self.outside_blocks)
            if not layout.reshard_after_forward:
                weight_bytes += sum(block_bytes)
            elif block_bytes:
                gathered_blocks = 2 if layout.shard_degree > 1 else 1
                weight_bytes += gathered_blocks * max(block_bytes)
            # A GPU compares its vectors, 1 / ranks of all, with those of all GPUs. The similarities of its vectors with
            # each other are in the activations already.
            similarities = loss_sizes.similarities * (layout.ranks - 1) // layout.ranks**2
            vector_bytes = self._vector_bytes(loss_sizes) + SIMILARITY_BYTES * min(MAX_SIMILARITIES, similarities)
            gathered_bytes = weight_bytes + vector_bytes
            units = (*self.block_weights, self.outside_blocks)  # FSDP2 reduces the gradients of one at a time.
            reduced_bytes = max(sharding.reduced_bytes(weights & updated) for weights in units)
            end_of_forward = before._replace(
                collective_buffers=gathered_bytes, activations=step_memory.forward_activations
            )
            end_of_backward = with_gradients._replace(
                collective_buffers=gathered_bytes + reduced_bytes, activations=step_memory.final_activations
            )
            snapshots = [end_of_forward, end_of_backward]
        peak = max(snapshots, key=lambda memory: memory.total)
        # After the passes, only the gradients are left. If they and Muon's buffers need more than the peak of the
        # passes, the difference is added.
        update_bytes = with_gradients.gradients + self._muon_buffer_bytes(updated)
        return peak._replace(muon_buffers=max(0, update_bytes - peak.temporary))
