"""Sparse Mixture-of-Experts layers, which replace a block's MLP.

In `SparseMLP`, a router assigns tokens to the slots of experts (`Routing`). The layer gathers the tokens of all slots,
applies the experts, multiplies each result by its gate, and adds it to the output of its token. A pass has several
inputs, for example one per modality. The router treats each of them separately, and the experts process the slots of
all of them at once.

Shape suffixes: B examples, L tokens per example, T tokens of all inputs, E experts, C slots per expert and example
(capacity), S slots of an expert on this rank, empty ones included, U = E S slots of all experts, D width, F hidden
width, 1 a dimension of size 1. If the experts are distributed over ranks: e experts that this rank holds, s slots of
such an expert on all ranks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openimp.common.device import full_precision
from openimp.model.init import lecun_normal_
from openimp.model.kernels import gelu
from openimp.parallel.distributed import all_reduce_mean
from openimp.parallel.layout import combine_from_experts, dispatch_to_experts, local_experts
from openimp.recipe.model import Model, MoE


class Routing(NamedTuple):
    """The assignment of tokens to slots.

    Attributes:
        token_BEC: int64, the token in each slot, as an index within its example.
        gate_BEC: fp32, the factor of each slot's result; 0 for an empty slot.
    """

    token_BEC: Tensor
    gate_BEC: Tensor


class RouterStats(NamedTuple):
    """Statistics of one sparse layer for one input of a pass.

    Attributes:
        z_loss: scalar, the router's z-loss times `moe.z_loss`.
        load_E: each expert's share of all filled slots, which are those that hold a valid token. The experts that read
            this input have equal shares, because they choose equally many tokens. Experts of other stems have 0.
        gate_E: each expert's share of the sum of all gates. It shows which experts of a group the router prefers.
        dropped: scalar, the number of this rank's tokens that no expert took, divided by the mean number of tokens per
            rank. Its mean over ranks is the share of all tokens that no expert took.
    """

    z_loss: Tensor
    load_E: Tensor
    gate_E: Tensor
    dropped: Tensor

    @staticmethod
    def mean(chunks: Sequence["RouterStats"], token_shares: Sequence[Tensor]) -> "RouterStats":
        """The statistics of a batch from those of its chunks, weighted by their shares of the tokens."""

        def weighted_mean(values: Sequence[Any]) -> Any:
            return sum(share * value for share, value in zip(token_shares, values))

        return RouterStats(*map(weighted_mean, zip(*chunks)))

    def detached(self) -> "RouterStats":
        """The statistics without the graph of the z-loss."""
        return self._replace(z_loss=self.z_loss.detach())


def expert_choice(probs_BLE: Tensor, valid_BL: Tensor, capacity_factor: float) -> Routing:
    """Each expert takes its top tokens of an example, so a token may reach 0 to E experts (arXiv 2202.09368).

    An expert takes `capacity_factor * valid tokens / experts` tokens of an example, rounded, and at least 1. So padding
    never changes what valid tokens receive. To keep shapes static, C counts padding too, and the slots that are not
    needed stay empty.
    """
    _, tokens, experts = probs_BLE.shape
    capacity = min(tokens, max(1, int(tokens * (capacity_factor / experts) + 0.5)))
    # Padding has the score -1, so `topk` selects it last, and `gate_BEC > 0` below leaves its slots empty.
    score_BEL = probs_BLE.masked_fill(~valid_BL[..., None], -1.0).transpose(1, 2)
    gate_BEC, token_BEC = score_BEL.topk(capacity, dim=-1)
    # fp64, like Python's floats above: fp32 could round a half the other way.
    capacity_B = (valid_BL.sum(-1).double() * (capacity_factor / experts) + 0.5).floor().clamp(min=1)
    filled_BEC = (torch.arange(capacity, device=gate_BEC.device) < capacity_B[:, None, None]) & (gate_BEC > 0)
    return Routing(token_BEC, gate_BEC * filled_BEC)


def valid_tokens_per_rank(x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
    """The number of valid tokens in a rank's batch, averaged over ranks; a scalar in fp32.

    A router divides each sum over the tokens of its rank by this average. The mean of these quotients over ranks is
    then the mean over all tokens. Without a mask, all ranks have equally many tokens.
    """
    if mask_BL is None:
        return x_BLD.new_full((), x_BLD.shape[0] * x_BLD.shape[1], dtype=torch.float32)
    return all_reduce_mean(mask_BL.sum().float()).clamp(min=1)


def split_tokens(values: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Splits the first dimension, the tokens of all inputs, into a tensor (B, L, ...) per input. `shapes`: (B, L)."""
    split_sizes = [examples * length for examples, length in shapes]
    return [part.unflatten(0, shape) for part, shape in zip(values.split(split_sizes), shapes)]


class Router(nn.Module):
    """One linear layer in fp32 without bias, followed by expert choice.

    `gate_scale` multiplies the gates (see `ExpertGroups`).
    """

    def __init__(self, width: int, experts: int, config: MoE, gate_scale: float) -> None:
        super().__init__()
        self.config = config
        self.gate_scale = gate_scale
        self.weight_ED = nn.Parameter(torch.empty(experts, width))
        nn.init.normal_(self.weight_ED, std=0.02)

    def forward(
        self, x_TD: Tensor, valid: Sequence[Tensor], tokens_per_rank: Sequence[Tensor]
    ) -> list[tuple[Routing, RouterStats]]:
        """Routes the tokens of each example of each input.

        Args:
            valid: per input, (B, L), False for padding.
            tokens_per_rank: per input, its valid tokens averaged over ranks (`valid_tokens_per_rank`).
        """
        # bf16 logits cause ties and coarse gates. Training is more stable with fp32 (ST-MoE, arXiv 2202.08906).
        with full_precision(x_TD.device):
            logits_TE = F.linear(x_TD.float(), self.weight_ED.float())
        shapes = [valid_BL.shape for valid_BL in valid]
        probs = split_tokens(logits_TE.softmax(-1), shapes)
        z_losses = split_tokens(logits_TE.logsumexp(-1).square(), shapes)
        return [self._route(*one_input) for one_input in zip(probs, z_losses, valid, tokens_per_rank)]

    def _route(
        self, probs_BLE: Tensor, z_loss_BL: Tensor, valid_BL: Tensor, tokens_per_rank: Tensor
    ) -> tuple[Routing, RouterStats]:
        z_loss = self.config.z_loss * (z_loss_BL * valid_BL).sum() / tokens_per_rank
        routing = expert_choice(probs_BLE, valid_BL, self.config.capacity_factor)
        usage = _usage(routing, valid_BL, tokens_per_rank)
        return routing._replace(gate_BEC=self.gate_scale * routing.gate_BEC), RouterStats(z_loss, *usage)


@torch.no_grad()
def _usage(routing: Routing, valid_BL: Tensor, tokens_per_rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How the experts are used: load_E, gate_E and dropped of `RouterStats`."""
    filled_BEC = (routing.gate_BEC > 0).float()
    load_E = filled_BEC.sum((0, 2))
    gate_E = routing.gate_BEC.sum((0, 2))
    expert_count_BL = torch.zeros_like(valid_BL, dtype=torch.float32)
    expert_count_BL = expert_count_BL.scatter_add(1, routing.token_BEC.flatten(1), filled_BEC.flatten(1))
    dropped = ((expert_count_BL == 0) & valid_BL).sum() / tokens_per_rank
    # A batch of padding fills no slot. `clamp` prevents 0 / 0 there.
    return load_E / load_E.sum().clamp(min=1), gate_E / gate_E.sum().clamp(min=1e-9), dropped


class Experts(nn.Module):
    """E two-layer GELU MLPs without biases, as two batched matrix products. The shapes of both weights begin with E."""

    def __init__(self, experts: int, config: Model) -> None:
        super().__init__()
        width = config.width
        hidden = config.mlp_dim
        self.gelu_kind = config.gelu
        # `forward` relies on the order in which the parameters are set here.
        self.up_EDF = nn.Parameter(torch.empty(experts, width, hidden))
        self.down_EFD = nn.Parameter(torch.empty(experts, hidden, width))
        lecun_normal_(self.up_EDF, width)
        lecun_normal_(self.down_EFD, hidden)

    def forward(self, x_ESD: Tensor) -> Tensor:
        """Maps (E, S, D) to (E, S, D): each expert processes its S slots, on the rank that holds it."""
        (up_eDF, down_eFD), process_group = local_experts(self.parameters())
        received_esD = dispatch_to_experts(x_ESD, process_group)
        hidden_esF = gelu(torch.bmm(received_esD, up_eDF), self.gelu_kind)
        return combine_from_experts(torch.bmm(hidden_esF, down_eFD), process_group)


class SparseMLP(nn.Module):
    """A router, and experts that process the tokens it selects."""

    def __init__(self, experts: int, config: Model, moe: MoE, gate_scale: float = 1.0) -> None:
        super().__init__()
        self.router = Router(config.width, experts, moe, gate_scale)
        self.experts = Experts(experts, config)

    def forward(
        self, x_TD: Tensor, valid: Sequence[Tensor], tokens_per_rank: Sequence[Tensor]
    ) -> tuple[Tensor, list[RouterStats]]:
        """Maps (T, D) to (T, D), and returns statistics per input. The arguments are those of `Router.forward`."""
        routings, all_stats = zip(*self.router(x_TD, valid, tokens_per_rank))
        rows_of_slots = []  # per input, (E, B C): the row of `x_TD` with the token in each slot
        gates = []  # per input, (E, B C)
        rows = torch.arange(x_TD.shape[0], device=x_TD.device)
        rows_of_tokens = split_tokens(rows, [valid_BL.shape for valid_BL in valid])
        for row_BL, routing in zip(rows_of_tokens, routings):
            first_row_B11 = row_BL[:, :1, None]  # of each example
            row_BEC = first_row_B11 + routing.token_BEC
            rows_of_slots.append(row_BEC.transpose(0, 1).flatten(1))
            gates.append(routing.gate_BEC.transpose(0, 1).flatten(1))
        row_ES = torch.cat(rows_of_slots, dim=1)
        row_U = row_ES.flatten()
        gate_U1 = torch.cat(gates, dim=1).flatten()[:, None]
        x_ESD = x_TD.index_select(0, row_U).unflatten(0, row_ES.shape)
        out_UD = self.experts(x_ESD).flatten(0, 1)
        sum_TD = torch.zeros_like(x_TD, dtype=out_UD.dtype)
        return sum_TD.index_add(0, row_U, out_UD * gate_U1.to(out_UD.dtype)), [*all_stats]


class ExpertGroups(nn.Module):
    """A router and experts per stem, so that experts specialize on stems (MoMa, arXiv 2407.21770).

    A stem is the layers around the encoder that belong to one or several modalities. The gates are multiplied by the
    number of experts of the group, so that they are about 1 at first. Experts that all stems share keep the router's
    probabilities as gates, as in the authors' release. With expert parallelism, the experts of each group are
    divided over all `expert_degree` ranks, so each rank has work in every step.
    """

    def __init__(self, config: Model, moe: MoE) -> None:
        super().__init__()
        self.experts_by_stem = moe.experts_by_stem
        groups = {stem: SparseMLP(n, config, moe, gate_scale=n) for stem, n in self.experts_by_stem.items()}
        self.groups = nn.ModuleDict(groups)

    def forward(
        self,
        x_TD: Tensor,
        valid: Sequence[Tensor],
        tokens_per_rank: Sequence[Tensor],
        stems: Sequence[str],
    ) -> tuple[Tensor, list[RouterStats]]:
        """Maps (T, D) to (T, D), and returns statistics per input. The statistics cover the experts of all groups, in
        order, with 0 for those of other stems.

        `stems` are, per input, the stem that made its tokens. The other arguments are those of `Router.forward`.
        """
        token_counts = [valid_BL.numel() for valid_BL in valid]
        inputs = x_TD.split(token_counts)
        outputs: dict[int, Tensor] = {}  # by the index of the input
        all_stats: dict[int, RouterStats] = {}  # by the index of the input
        for stem in dict.fromkeys(stems):
            indices = [i for i, other in enumerate(stems) if other == stem]
            out_TD, group_stats = self.groups[stem](
                torch.cat([inputs[i] for i in indices]),
                [valid[i] for i in indices],
                [tokens_per_rank[i] for i in indices],
            )
            out_by_input = out_TD.split([token_counts[i] for i in indices])
            for i, out, stats in zip(indices, out_by_input, group_stats):
                outputs[i] = out
                all_stats[i] = self._padded_to_all_groups(stats, stem)
        return torch.cat([outputs[i] for i in range(len(stems))]), [all_stats[i] for i in range(len(stems))]

    def _padded_to_all_groups(self, stats: RouterStats, stem: str) -> RouterStats:
        """The statistics of a group, with a share of 0 for each expert of the other groups."""
        sizes = list(self.experts_by_stem.values())
        group_index = list(self.experts_by_stem).index(stem)
        padding = (sum(sizes[:group_index]), sum(sizes[group_index + 1 :]))
        return stats._replace(load_E=F.pad(stats.load_E, padding), gate_E=F.pad(stats.gate_E, padding))
