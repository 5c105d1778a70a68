"""The encoder: published sizes, attention, and what padding must not do."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.model.encoder import Attention, Encoder
from openimp.model.kernels import UNFUSED_LENGTH, attend, gelu, unfused_attention
from openimp.model.moe import RouterStats
from openimp.recipe.model import Model, MoE
from openimp.recipe.schema import Recipe

# arXiv 2305.06324, table 7 and section 4: parameters of the encoder in all, in millions, to so many decimals.
PUBLISHED = {
    "imp_s": (21.24, 2),
    "imp_b": (84.954624, 6),  # exactly the release's
    "imp_m": (151.0, 1),
    "imp_l": (302.0, 1),
    "imp_moe_s": (42.5, 1),
    "imp_moe_b": (509.7, 1),
    "imp_moe_l": (1057, 0),
}


def tiny(moe: dict | None = None, **changes) -> Model:
    sizes = {"width": 32, "layers": 3, "heads": 4, "mlp_dim": 64, "moe": moe and {"experts": 4, "layers": 2, **moe}}
    return Model.model_validate(sizes | changes)


def apply(encoder: Encoder, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[RouterStats]]:
    """The output for one input, and its statistics."""
    (out,), (stats,) = encoder([x], [mask])
    return out, stats


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipes_have_the_published_numbers_of_parameters(name):
    """Heads are 64 wide, and blocks have no bias."""
    config = Recipe.load(name).model
    with torch.device("meta"):
        encoder = Encoder(config)
    published, decimals = PUBLISHED[name]
    assert round(sum(parameter.numel() for parameter in encoder.parameters()) / 1e6, decimals) == published
    assert config.width // config.heads == 64
    assert [key for key, _ in encoder.named_parameters() if key.endswith("bias")] == ["norm.bias"]


def test_weights_start_as_in_the_release():
    """LeCun normal, cut off at two deviations; queries, keys and values count width x heads as their fan-in."""
    torch.manual_seed(0)
    model = Recipe.load("imp_b").model.model_copy(update={"layers": 2, "moe": MoE(experts=2, layers=1)})
    dense, sparse = Encoder(model).blocks
    expected = {
        dense.attention.qkv.weight: 0.0104,
        dense.attention.out.weight: 0.0361,
        dense.mlp.up.weight: 0.0361,
        dense.mlp.down.weight: 0.018,
        sparse.mlp.experts.up_EDF: 0.0361,
        sparse.mlp.experts.down_EFD: 0.018,
    }
    for weight, std in expected.items():
        assert weight.std().item() == pytest.approx(std, rel=0.01)
        assert weight.abs().max() < 2.3 * std


@pytest.mark.parametrize("length", [1, 7, UNFUSED_LENGTH, UNFUSED_LENGTH + 1])
@pytest.mark.parametrize("masked", [False, True])
def test_unfused_attention_equals_torchs_attention(length, masked):
    torch.manual_seed(length)
    q, k, v = (torch.randn(3, 2, length, 8, requires_grad=True) for _ in range(3))
    mask = (torch.rand(3, 1, 1, length) < 0.6) if masked else None
    if mask is not None:
        mask[..., 0] = True
    ours = unfused_attention(q, k, v, mask)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, theirs)]
    for mine, other in zip(*grads):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    in_bf16 = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert in_bf16.dtype == torch.bfloat16
    torch.testing.assert_close(in_bf16.float(), theirs, rtol=0, atol=0.03)


def test_gelu_is_the_papers_within_what_bf16_rounds():
    x = torch.linspace(-6, 6, 4801)
    by_tanh = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    torch.testing.assert_close(gelu(x), by_tanh, rtol=0, atol=1e-6)
    in_bf16 = gelu(x.bfloat16())
    assert in_bf16.dtype == torch.bfloat16
    torch.testing.assert_close(in_bf16.float(), by_tanh, rtol=2**-7, atol=1.5e-3)
    assert torch.equal(in_bf16, F.gelu(x.bfloat16())), "the exact one, which is faster"
    assert not torch.equal(in_bf16, F.gelu(x.bfloat16(), approximate="tanh"))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_is_the_formula_head_by_head(qk_norm):
    torch.manual_seed(0)
    layer = Attention(Model(width=32, heads=4, qk_norm=qk_norm))
    x = torch.randn(2, 5, 32)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    heads = []
    for part in (slice(8 * h, 8 * h + 8) for h in range(4)):
        queries, keys = (F.layer_norm(x, (8,), eps=1e-6) if qk_norm else x for x in (q[..., part], k[..., part]))
        heads.append((queries @ keys.mT / 8**0.5).softmax(-1) @ v[..., part])
    torch.testing.assert_close(
        layer(x.flatten(0, 1), [x.shape[:2]], [None]).view_as(x), layer.out(torch.cat(heads, -1)), rtol=1e-5, atol=1e-6
    )


def test_mimetic_attention_starts_with_equal_keys_and_opposite_values():
    torch.manual_seed(0)
    layer = Attention(Model(width=32, heads=4, attention_init="mimetic"))
    queries, keys, values = layer.qkv.weight.chunk(3)
    assert torch.equal(queries, keys)
    assert torch.equal(layer.out.weight, -values.T)
    assert not torch.equal(queries, values)


@pytest.mark.parametrize("moe", [None, {"capacity_factor": 2.0}])
def test_padding_changes_no_output(moe):
    """Neither what stands in them, nor how many there are, nor the other examples of the batch."""
    torch.manual_seed(1)
    encoder, lengths = Encoder(tiny(moe)).eval(), [1, 3, 9, 16]
    x = torch.randn(4, 16, 32)
    mask = torch.arange(16) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        out, _ = apply(encoder, x, mask)
        other, _ = apply(encoder, torch.where(mask[..., None], x, 1e3 * torch.randn_like(x)), mask)
        wider, _ = apply(encoder, F.pad(x, (0, 0, 0, 11)), F.pad(mask, (0, 11)))
        for i, n in enumerate(lengths):
            alone, _ = apply(encoder, x[i : i + 1, :n])
            for found in (out, other, wider):
                torch.testing.assert_close(found[i : i + 1, :n], alone, rtol=0, atol=1e-5)
