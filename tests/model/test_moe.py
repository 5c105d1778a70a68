"""Mixture-of-Experts against references that route one token at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from openimp.model.moe import (
    Router,
    RouterStats,
    Routing,
    SparseMLP,
    valid_tokens_per_rank,
)
from openimp.recipe.model import Model, MoE

WIDTH, HIDDEN = 12, 20


def layer_of(seed: int = 0, gelu: str = "tanh", **options) -> SparseMLP:
    torch.manual_seed(seed)
    moe = MoE.model_validate(options)
    sizes = {"width": WIDTH, "mlp_dim": HIDDEN, "heads": 1}
    layer = SparseMLP(moe.experts, Model(**sizes, gelu=gelu), moe)
    # Routers start nearly indifferent; these have preferences.
    torch.nn.init.normal_(layer.router.weight_ED, std=0.7)
    return layer


def batch_of(seed: int, lengths: list[int], total: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(len(lengths), total, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(total) < torch.tensor(lengths)[:, None]


def apply(layer: SparseMLP, x: Tensor, valid: Tensor) -> tuple[Tensor, RouterStats]:
    """The layer's output for one input, and its statistics."""
    out, (stats,) = layer(x.flatten(0, 1), [valid], [valid_tokens_per_rank(x, valid)])
    return out.view_as(x), stats


def route(router: Router, x: Tensor, valid: Tensor) -> Routing:
    ((routing, _),) = router(x.flatten(0, 1), [valid], [valid_tokens_per_rank(x, valid)])
    return routing


def slots_of(tokens: int, share: float) -> int:
    """tokens x share, rounded half up, at least 1."""
    return max(1, int(tokens * share + 0.5))


def chosen_by_experts(probs: Tensor, tokens: list[int], capacity_factor: float) -> list[tuple[int, int]]:
    """(token, expert) pairs: every expert takes its most probable tokens."""
    experts = probs.shape[1]
    count = slots_of(len(tokens), capacity_factor / experts)
    return [
        (token, expert)
        for expert in range(experts)
        for token in sorted(tokens, key=lambda t: -probs[t, expert].item())[:count]
    ]


def naive(layer: SparseMLP, x: Tensor, valid: Tensor) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """What the layer should give, and the gates of all (token, expert) pairs; tokens numbered over the batch."""
    flat, mask = x.flatten(0, 1), valid.flatten()
    probs = (flat @ layer.router.weight_ED.T).softmax(-1)
    pairs = []
    for i in range(len(x)):
        tokens = [token for token in range(i * x.shape[1], (i + 1) * x.shape[1]) if mask[token]]
        if tokens:
            pairs += chosen_by_experts(probs, tokens, layer.router.config.capacity_factor)
    gates = {(token, expert): probs[token, expert] for token, expert in pairs}
    out = [torch.zeros(WIDTH) for _ in flat]
    for (token, expert), gate in gates.items():
        out[token] = out[token] + gate * mlp(layer, expert, flat[token])
    return torch.stack(out).view_as(x), gates


def mlp(layer: SparseMLP, expert: int, x_D: Tensor) -> Tensor:
    """The result of one expert for one token."""
    hidden = F.gelu(x_D @ layer.experts.up_EDF[expert], approximate=layer.experts.gelu_kind.replace("erf", "none"))
    return hidden @ layer.experts.down_EFD[expert]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    pads=st.integers(0, 4),
    experts=st.integers(2, 5),
    capacity=st.sampled_from([0.3, 1.0, 1.25, 2.0, 9.0]),
    gelu=st.sampled_from(["tanh", "erf"]),
)
@example(0, [6, 0], 3, 4, 2.0, "erf")
@example(0, [0, 0], 5, 4, 1.0, "erf")
def test_each_expert_processes_its_most_probable_tokens(seed, lengths, pads, experts, capacity, gelu):
    """Output, gradients and statistics equal those of a loop over tokens; padding and capacities included.

    The z-loss is the mean squared logsumexp of the valid tokens.
    """
    options = {"experts": experts, "capacity_factor": capacity, "z_loss": 0.5}
    layer = layer_of(seed, gelu, **options)
    x, valid = batch_of(seed, lengths, max(1, *lengths) + pads)
    x.requires_grad_()
    out, stats = apply(layer, x, valid)
    expected, pairs = naive(layer, x, valid)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    logits = x[valid] @ layer.router.weight_ED.T
    z_loss = 0.5 * logits.exp().sum(-1).log().square().sum() / max(1, len(logits))
    torch.testing.assert_close(stats.z_loss, z_loss)

    inputs = [x, *layer.parameters()]
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum() + stats.z_loss, inputs, allow_unused=True)
    expected_sum = (expected * weights).sum() + z_loss + 0 * sum(i.sum() for i in inputs)
    wanted = torch.autograd.grad(expected_sum, inputs)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    load, gate = torch.zeros(experts), torch.zeros(experts)
    for (_, expert), one in pairs.items():
        load[expert] += 1
        gate[expert] += one.detach()
    torch.testing.assert_close(stats.load_E, load / max(1, len(pairs)))
    torch.testing.assert_close(stats.gate_E, gate / max(1e-9, gate.sum().item()))
    count = int(valid.sum())
    assert stats.dropped.item() == pytest.approx((count - len({token for token, _ in pairs})) / max(1, count))


def test_the_router_computes_in_fp32_under_autocast():
    """bf16 logits make ties: under autocast the choice is the one that fp32 makes of the same tokens."""
    layer = layer_of(experts=4).eval()
    x, valid = batch_of(0, [64], 64)
    exact = route(layer.router, x, valid)
    with torch.autocast("cpu", torch.bfloat16):
        cast = route(layer.router, x, valid)
        out, _ = apply(layer, x, valid)
    assert cast.gate_BEC.dtype == torch.float32
    assert torch.equal(cast.gate_BEC, exact.gate_BEC)
    assert torch.equal(cast.token_BEC, exact.token_BEC)
    assert out.dtype == torch.bfloat16
