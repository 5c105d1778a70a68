"""Sparse Mixture-of-Experts: routers, dispatch and experts, three separate pieces.

A router turns tokens into a `Routing`: which token stands in which slot of which expert, and how much the result
counts. Dispatch gathers the slots, the experts work on them, and the results are added back where they came from.

Shape suffixes: B examples, L tokens an example, G groups, N tokens a group, E experts, C slots an expert, D width, F
hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openimp.common.device import full_precision
from openimp.model.init import lecun_normal_
from openimp.model.kernels import gelu
from openimp.parallel.distributed import mean
from openimp.parallel.layout import from_owners, owned, to_owners
from openimp.recipe.model import BATCH_ROUTINGS, MoE


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        token_GEC: int64, the token of the group that stands in each slot.
        gate_GEC: fp32, the weight of each slot's result; 0 marks an empty slot.
    """

    token_GEC: Tensor
    gate_GEC: Tensor


class RouterStats(NamedTuple):
    """What one sparse layer tells of one forward pass.

    Attributes:
        aux: scalar, the router's weighted losses, to be added to the task's.
        load_E: share of all filled slots that each expert has.
        gate_E: share of all gate weight that each expert has: expert choice fills its slots in any case, so this is
            where its preference shows.
        dropped: scalar, share of the tokens that no expert took.
    """

    aux: Tensor
    load_E: Tensor
    gate_E: Tensor
    dropped: Tensor

    @staticmethod
    def mean(pieces: Sequence["RouterStats"], shares: Sequence[Tensor]) -> "RouterStats":
        """What a layer tells of a batch that it saw in pieces, each with its share of the tokens."""
        return RouterStats(*(sum(s * x for s, x in zip(shares, values)) for values in zip(*pieces)))


def expert_choice(probs_GNE: Tensor, valid_GN: Tensor, capacity: float) -> Routing:
    """Each expert takes its top-C tokens of a group; a token may reach 0 to E experts (arXiv 2202.09368).

    C = capacity x tokens / experts, at least 1, counts the group's own valid tokens. So neither pads nor the length
    that a caption is padded to change what an example's tokens receive, although all shapes are static.
    """
    _, n, experts = probs_GNE.shape
    slots = min(n, _slots(n, capacity / experts))
    score_GEN = probs_GNE.masked_fill(~valid_GN[..., None], -1.0).transpose(1, 2)
    gate_GEC, token_GEC = score_GEN.topk(slots, dim=-1)
    # In fp64, as `_slots` computes: fp32 may round a half the other way, and the two would disagree.
    own_G = (valid_GN.sum(-1).double() * (capacity / experts) + 0.5).floor().clamp(min=1)
    used_GEC = (torch.arange(slots, device=gate_GEC.device) < own_G[:, None, None]) & (gate_GEC > 0)
    return Routing(token_GEC, gate_GEC * used_GEC)


def token_choice(probs_GNE: Tensor, valid_GN: Tensor, top_k: int, slots: int | None) -> Routing:
    """Each token chooses its `top_k` experts; an expert serves first choices first, in order, up to `slots` tokens.

    (GShard, arXiv 2006.16668; V-MoE, arXiv 2106.05974.) Tokens over the capacity are dropped; with `slots` None
    there are as many slots as the busiest expert needs.
    """
    groups, n, experts = probs_GNE.shape
    gate_GNK, choice_GNK = probs_GNE.topk(top_k, dim=-1)
    # All first choices come before all second ones: (G, K*N).
    choice_GM = choice_GNK.transpose(1, 2).flatten(1)
    gate_GM = gate_GNK.transpose(1, 2).flatten(1)
    valid_GM = valid_GN.repeat(1, top_k)
    chosen_GME = F.one_hot(choice_GM, experts) * valid_GM[..., None]
    if slots is None:
        slots = max(1, int(chosen_GME.sum(1).max()))
    place_GM = (chosen_GME.cumsum(1) - 1).gather(-1, choice_GM[..., None]).squeeze(-1)
    kept_GM = valid_GM & (place_GM < slots)
    # Slots lie expert after expert; one more at the end takes whatever is dropped.
    slot_GM = torch.where(kept_GM, choice_GM * slots + place_GM, experts * slots)
    token_GM = torch.arange(n, device=probs_GNE.device).repeat(top_k).expand(groups, -1)
    token_GS = torch.zeros(groups, experts * slots + 1, dtype=torch.int64, device=probs_GNE.device)
    token_GS = token_GS.scatter(1, slot_GM, token_GM)[:, :-1]
    gate_GS = torch.zeros_like(token_GS, dtype=gate_GM.dtype)
    gate_GS = F.pad(gate_GS, (0, 1)).scatter(1, slot_GM, gate_GM)[:, :-1]
    return Routing(token_GS.unflatten(1, (experts, slots)), gate_GS.unflatten(1, (experts, slots)))


def mean_count(x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
    """The number of valid tokens of a mean process, fp32. A router's sum over its own tokens is divided by it,
    so that the mean over the processes is that over all tokens. Without a mask all of them have as many."""
    if mask_BL is None:
        return torch.full((), float(x_BLD.shape[0] * x_BLD.shape[1]), device=x_BLD.device)
    return mean(mask_BL.sum().float()).clamp(min=1)


def _slots(tokens: int, share: float) -> int:
    return max(1, int(tokens * share + 0.5))


class Router(nn.Module):
    """One fp32 linear layer without bias, shared by all modalities, and the choice that follows from it."""

    def __init__(self, width: int, config: MoE) -> None:
        super().__init__()
        self.config = config
        self.weight_ED = nn.Parameter(torch.empty(config.experts, width))
        nn.init.normal_(self.weight_ED, std=0.02)

    def forward(self, x_BLD: Tensor, valid_BL: Tensor, count: Tensor) -> tuple[Routing, RouterStats]:
        """Routes the tokens of each group: an example, or in training for two of the routings the whole batch.

        Outside training no group is larger than an example and token choice drops nothing, so that an embedding never
        depends on its batch mates.
        """
        config, experts = self.config, self.config.experts
        # bf16 logits make ties and coarse gates; ST-MoE (arXiv 2202.08906) found fp32 here to matter for stability.
        with full_precision(x_BLD.device):
            logits_BLE = F.linear(x_BLD.float(), self.weight_ED.float())
        probs_BLE = logits_BLE.softmax(-1)
        across = self.training and config.routing in BATCH_ROUTINGS
        probs_GNE, valid_GN = (
            (probs_BLE.flatten(0, 1)[None], valid_BL.flatten()[None]) if across else (probs_BLE, valid_BL)
        )
        if config.routing == "token_choice":
            slots = (
                _slots(probs_GNE.shape[1], config.top_k * config.capacity_factor / experts) if self.training else None
            )
            routing = token_choice(probs_GNE, valid_GN, config.top_k, slots)
        else:
            routing = expert_choice(probs_GNE, valid_GN, config.capacity_factor)
        return routing, self._stats(logits_BLE, probs_BLE, valid_BL, count, routing, valid_GN)

    def _stats(
        self,
        logits_BLE: Tensor,
        probs_BLE: Tensor,
        valid_BL: Tensor,
        count: Tensor,
        routing: Routing,
        valid_GN: Tensor,
    ) -> RouterStats:
        config = self.config
        aux = config.z_loss * (logits_BLE.logsumexp(-1).square() * valid_BL).sum() / count
        if config.routing == "token_choice":
            first_E = (F.one_hot(probs_BLE.argmax(-1), config.experts) * valid_BL[..., None]).sum((0, 1))
            first_E = mean(first_E.float()) / count
            prob_E = (probs_BLE * valid_BL[..., None]).sum((0, 1)) / count
            aux = aux + config.balance_loss * config.experts * (first_E * prob_E).sum()
        with torch.no_grad():
            filled_GEC = (routing.gate_GEC > 0).float()
            load_E, gate_E = filled_GEC.sum((0, 2)), routing.gate_GEC.sum((0, 2))
            taken_GN = torch.zeros_like(valid_GN, dtype=torch.float32)
            taken_GN = taken_GN.scatter_add(1, routing.token_GEC.flatten(1), filled_GEC.flatten(1))
            dropped = ((taken_GN == 0) & valid_GN).sum() / count
            # A batch of pads only fills no slot.
            load_E, gate_E = load_E / load_E.sum().clamp(min=1), gate_E / gate_E.sum().clamp(min=1e-9)
            return RouterStats(aux, load_E, gate_E, dropped)


class Experts(nn.Module):
    """E two-layer GELU MLPs without bias, as two batched matrix products."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.up_EDF = nn.Parameter(torch.empty(experts, width, hidden))
        self.down_EFD = nn.Parameter(torch.empty(experts, hidden, width))
        lecun_normal_(self.up_EDF, width)
        lecun_normal_(self.down_EFD, hidden)

    def forward(self, x_ESD: Tensor) -> Tensor:
        """(E, S, D) to (E, S, D): expert e works on its own S slots, in the process that has it."""
        (up_EDF, down_EFD), group = owned((self.up_EDF, self.down_EFD))
        hidden_ESF = gelu(torch.bmm(to_owners(x_ESD, group), up_EDF))
        return from_owners(torch.bmm(hidden_ESF, down_EFD), group)


class SparseMLP(nn.Module):
    """Router, dispatch and experts in the place of a block's MLP."""

    def __init__(self, width: int, hidden: int, config: MoE) -> None:
        super().__init__()
        self.router = Router(width, config)
        self.experts = Experts(config.experts, width, hidden)

    def forward(self, x_BLD: Tensor, valid_BL: Tensor, count: Tensor) -> tuple[Tensor, RouterStats]:
        """Tokens to tokens, and what the router tells; `count` is their `mean_count`."""
        routing, stats = self.router(x_BLD, valid_BL, count)
        groups, experts, slots = routing.token_GEC.shape
        x_ND = x_BLD.flatten(0, 1)
        per_group = x_ND.shape[0] // groups
        first_G = torch.arange(groups, device=x_ND.device) * per_group
        row_ES = (routing.token_GEC + first_G[:, None, None]).transpose(0, 1).reshape(-1)
        gate_ES = routing.gate_GEC.transpose(0, 1).reshape(-1, 1)
        slots_ESD = x_ND.index_select(0, row_ES).unflatten(0, (experts, groups * slots))
        out = self.experts(slots_ESD).flatten(0, 1)
        result = torch.zeros_like(x_ND, dtype=out.dtype).index_add(0, row_ES, out * gate_ES.to(out.dtype))
        return result.view_as(x_BLD), stats


class SoftMLP(nn.Module):
    """Soft MoE (arXiv 2308.00951, algorithm 1) in the place of a block's MLP.

    Each slot of an expert works on a weighted mean of the example's tokens, and each token gets a weighted mean of all
    slots' results: nothing is chosen or dropped. Slots do not grow with the example, so its length, pads included,
    changes nothing of another token's result.
    """

    def __init__(self, width: int, hidden: int, config: MoE) -> None:
        super().__init__()
        self.slots = config.slots
        self.slot_SD = nn.Parameter(torch.empty(config.experts * config.slots, width))
        # Logits start with unit variance, as they would without the normalisation below.
        self.scale = nn.Parameter(torch.full((1,), width**0.5))
        self.experts = Experts(config.experts, width, hidden)
        nn.init.normal_(self.slot_SD)

    def forward(self, x_BLD: Tensor, valid_BL: Tensor, count: Tensor) -> tuple[Tensor, RouterStats]:
        """As `SparseMLP.forward`."""
        with full_precision(x_BLD.device):
            # Unit vectors, as section 2.3 asks for: at large widths the softmax would become an argmax.
            slot_SD = self.scale * F.normalize(self.slot_SD.float(), dim=-1)
            logits_BLS = F.linear(F.normalize(x_BLD.float(), dim=-1), slot_SD)
        valid_BL1 = valid_BL[..., None]
        dispatch_BLS = logits_BLS.masked_fill(~valid_BL1, torch.finfo(logits_BLS.dtype).min).softmax(1)
        combine_BLS = logits_BLS.softmax(-1) * valid_BL1
        slots_BSD = dispatch_BLS.to(x_BLD.dtype).transpose(1, 2) @ x_BLD
        slots_ESD = slots_BSD.unflatten(1, (-1, self.slots)).transpose(0, 1).flatten(1, 2)
        out_ESD = self.experts(slots_ESD)
        out_BSD = out_ESD.unflatten(1, (len(x_BLD), self.slots)).transpose(0, 1).flatten(1, 2)
        result_BLD = combine_BLS.to(out_BSD.dtype) @ out_BSD
        with torch.no_grad():
            share_E = combine_BLS.sum((0, 1)).unflatten(0, (-1, self.slots)).sum(-1) / count
        nothing = logits_BLS.new_zeros(())
        return result_BLD, RouterStats(nothing, share_E, share_E, nothing)
