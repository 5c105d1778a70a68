"""What one step needs on one GPU in a layout: memory, communication and time. docs/plan.md has the rules."""

from collections.abc import Set
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from openimp.common.objective import LossSizes
from openimp.model.embedder import pass_sizes
from openimp.model.learning_rates import muon_stacks
from openimp.objectives.nce import MAX_SIMILARITIES
from openimp.parallel.muon import BATCH_ELEMENTS
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
    """Plans the steps of a recipe in one layout, at a given share of the GPU's peak."""

    def __init__(self, recipe: Recipe, sharding: Sharding, gpu: GPU, utilization: float) -> None:
        self.recipe = recipe
        self.sharding = sharding
        self.gpu = gpu
        self.utilization = utilization
        self.model = sharding.model
        self.weights = dict(self.model.named_parameters())
        self.trained = {weight for weight in self.weights.values() if weight.requires_grad}
        self.block_weights = [{*block.parameters()} for block in self.model.blocks()]
        self.outside_blocks = {*self.weights.values()}.difference(*self.block_weights)
        self.muon_weights = {*muon_stacks(self.model, recipe.optimizer)}

    def step(self, task: Task, cost: Cost, step_memory: StepMemory) -> StepNeeds:
        """Plans a step with these costs. `step_memory` is the memory of its activations."""
        with_grad = {self.weights[name] for name in cost.params_with_grad}
        updated = self.trained if self.recipe.optimizer.zero_missing_grads else with_grad
        by_objective = [objective.loss_sizes(task, cost.examples) for objective in task.objectives]
        loss_sizes = LossSizes(*map(sum, zip(*by_objective)))  # Sums each field.
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

        forward_seconds = self._seconds(cost.forward_flops / layout.ranks)
        backward_seconds = self._seconds((cost.hardware_flops - cost.forward_flops) / layout.ranks)
        update_seconds = self._seconds(cost.optimizer_flops * self._muon_share(updated))
        wait_seconds = exposed_traffic.seconds(self.gpu)
        wait_seconds += max(0.0, forward_traffic.seconds(self.gpu) - forward_seconds)
        wait_seconds += max(0.0, backward_traffic.seconds(self.gpu) - backward_seconds)
        return StepNeeds(
            cost=cost,
            memory=self._memory(loss_sizes, step_memory, updated),
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

    def _seconds(self, flops: float) -> float:
        return flops / (self.gpu.flops_per_s * self.utilization)

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
        # Of square matrices X: X, the product of X X', a polynomial of it, and the result.
        iteration_bytes = 4 * BF16_BYTES * min(self.sharding.gathered_elements(weights), BATCH_ELEMENTS)
        return update_bytes + max(2 * update_bytes, iteration_bytes)

    def _memory(self, loss_sizes: LossSizes, step_memory: StepMemory, updated: Set[Tensor]) -> GPUMemory:
        """What one GPU holds at the moment of the step at which it holds most."""
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
