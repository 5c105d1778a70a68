"""The whole model: stems, passes of one and of several modalities, heads, temperatures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.common.modality import StemSpec, Tokens
from openimp.modalities.image import Image
from openimp.modalities.video import Video
from openimp.model.embedding import Stem
from openimp.model.imp import IMP
from openimp.model.moe import ExpertGroups, Router
from openimp.recipe.model import Model, MoE
from tests.made_models import FixedStem, model_config


def small(space: str = "disjoint", pairs=(("image", "text"), ("video", "text")), **options) -> IMP:
    torch.manual_seed(0)
    model = Model(width=32, layers=2, heads=2, mlp_dim=64, embed_dim=16, space=space, **options)
    vision = FixedStem("vision", StemSpec(24, (4, 4)))
    modalities = {"image": vision, "video": vision, "text": FixedStem("text", StemSpec(50, (16,), table=True))}
    return IMP(model_config(model, pairs, {"pictures-label": range(7)}), modalities).eval()


def texts(lengths: list[int], total: int) -> Tokens:
    generator = torch.Generator().manual_seed(total)
    coords = torch.arange(total).expand(len(lengths), -1)[..., None]
    ids = torch.randint(0, 50, (len(lengths), 16), generator=generator)[:, :total]
    return Tokens(ids, coords, torch.arange(total) < torch.tensor(lengths)[:, None])


def patches(batch: int, values: int = 24) -> Tokens:
    generator = torch.Generator().manual_seed(batch)
    rows = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    return Tokens(torch.randn(batch, 12, values, generator=generator), rows.expand(batch, -1, -1))


@pytest.mark.parametrize("conv_channels", [0, 8])
@pytest.mark.parametrize("moe", [None, {"experts": 4, "layers": 1}])
def test_a_still_has_the_features_of_a_clip_of_equal_frames(tiny_recipe, tiny_model, moe, conv_channels):
    """One frame's values in a stem for clips give, to rounding, what the repeated still gives, and for less work."""
    options = tiny_recipe().to_dict()["modalities"]
    options["vision"]["conv_channels"] = conv_channels
    recipe = tiny_recipe({"moe": moe}, modalities=options)
    model, modalities = tiny_model(recipe)
    views = {name: recipe.tasks[name].views[0][name].model_copy(update={"size": 32}) for name in ("image", "video")}
    view = views["video"].model_copy(update={"frames": 2})
    still = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    image = modalities["image"].tokens(still, views["image"], None)
    video = modalities["video"].tokens(np.stack([still, still], axis=1), view, None)
    assert image.values.shape[-1] * 2 == video.values.shape[-1]
    with torch.no_grad():
        one, other = model.encode("image", image).features, model.encode("video", video).features
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def convolved(stem: Stem, spec: StemSpec, frames_BTCHW: Tensor) -> Tensor:
    """Two convolutions of whole frames, with repeated borders; frames stay separate."""
    frames, height, width, channels = spec.patch
    first, second = stem.embed.convolution, stem.embed.out
    torch.nn.init.normal_(first.bias)
    torch.nn.init.normal_(second.bias)
    kernel = first.weight.unflatten(1, (channels, 4, 4)) * stem.embed.scale
    kernels = second.weight.unflatten(1, (frames, height // 2 + 1, width // 2 + 1, -1)) * 2**0.5
    expected = second.bias[:, None, None]
    for frame, kernel_of_frame in zip(frames_BTCHW.unbind(1), kernels.movedim(-1, 1).unbind(2)):
        x = F.conv2d(F.pad(frame, (2, 2, 2, 2), mode="replicate"), kernel, first.bias, stride=2)
        x = F.gelu(x, approximate="tanh")
        expected = expected + F.conv2d(x, kernel_of_frame, stride=(height // 2, width // 2))
    return expected.flatten(2).mT


def test_the_convolution_of_patches_is_that_of_whole_frames():
    video = Video(Video.Config(patch=(2, 4, 6), conv_channels=5))
    stem = Stem(video.stem_spec(), 32)
    clip = torch.rand(2, 2, 3, 8, 12) * 2 - 1
    expected = convolved(stem, video.stem_spec(), clip)
    torch.testing.assert_close(stem.embed(video.from_tensor(clip).values), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("conv_channels", [0, 8])
def test_dropped_tokens_and_bytes_are_embedded_as_all_tokens_and_numbers_are(conv_channels):
    """So positions are looked up by coordinate: those that stay have the positions that they have among all."""
    image = Image(Image.Config(patch=(1, 4, 4), conv_channels=conv_channels))
    stem = Stem(image.stem_spec(), 32)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    some = image.tokens(pixels, Image.View(size=16, drop_tokens=0.75), [np.random.default_rng(i) for i in range(3)])
    every = image.from_tensor(torch.from_numpy(pixels).movedim(-1, 1) / 127.5 - 1)
    height, width = (some.coords[..., axis] * 4 // image.config.tables[axis] for axis in (1, 2))
    expected = stem(every).gather(1, (4 * height + width)[..., None].expand(-1, -1, 32))
    assert some.values.dtype == torch.uint8
    torch.testing.assert_close(stem(some), expected, rtol=0, atol=1e-5)


GROUPS = {"vision": 4, "text": 2}


def prefer(model: IMP) -> None:
    """Routers start nearly indifferent. After this they have preferences."""
    for module in model.modules():
        if isinstance(module, Router):
            torch.nn.init.normal_(module.weight_ED, std=0.7)


@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("experts", [None, 4, GROUPS])
def test_one_pass_of_all_modalities_equals_a_pass_of_each(experts, own):
    """Features, router statistics and gradients; batch sizes differ, and one modality has a mask."""
    moe = experts and {"experts": experts, "layers": 1 if experts == GROUPS else 1 + own}
    model = small(moe=moe, modality_specific_layers=own, qk_norm=True).train()
    prefer(model)
    inputs = {"image": patches(3), "text": texts([3, 16, 1, 7, 0, 9], 16), "video": patches(2)}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(len(tokens.values), 32, generator=generator) for name, tokens in inputs.items()}
    results = []
    for encoded in (model.encode_all(inputs), {name: model.encode(name, inputs[name]) for name in inputs}):
        loss = sum((weights[name] * encoded[name].features).sum() for name in inputs)
        loss = loss + sum(stats.z_loss for name in inputs for stats in encoded[name].routing)
        results.append((encoded, torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)))
    (together, gradients), (separate, expected) = results
    for name in inputs:
        torch.testing.assert_close(together[name].features, separate[name].features, rtol=0, atol=1e-5)
        assert len(together[name].routing) == len(separate[name].routing) == (moe["layers"] if moe else 0)
        for found, wanted in zip(together[name].routing, separate[name].routing):
            torch.testing.assert_close([*found], [*wanted], rtol=0, atol=1e-5)
    assert not together["text"].features[4].any()  # It has no valid token.
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moe", [None, {"experts": 4, "layers": 1}])
def test_a_model_in_bf16_or_fp64_encodes_in_its_own_type(moe):
    for dtype in (torch.bfloat16, torch.float64):
        model, image = small(moe=moe).to(dtype), patches(2)
        inputs = {"image": image._replace(values=image.values.to(dtype)), "text": texts([3, 7], 16)}
        for name, encoded in model.encode_all(inputs).items():
            assert encoded.features.dtype == dtype
            assert model.project(encoded.features, name, "text" if name == "image" else "image").isfinite().all()


@pytest.mark.parametrize("moe", [None, {"experts": 4, "layers": 1}])
def test_an_example_without_a_valid_token_has_an_embedding_of_0_and_finite_gradients(moe):
    model = small(moe=moe).to(torch.bfloat16)
    torch.nn.init.normal_(model.projections["text-to-vision"].norm.bias)
    features = model.encode("text", texts([3, 0], 16)).features
    words, nothing = model.project(features, "text", "image")
    assert words.norm().item() == pytest.approx(1)
    assert not nothing.any()
    words.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_stems_may_have_experts_to_themselves():
    """A pass gives no gradient to the experts of other stems, and the statistics show it."""
    model = small(moe={"experts": GROUPS, "layers": 1}).train()
    prefer(model)
    groups = model.encoder.blocks[-1].mlp.groups
    assert {stem: len(group.experts.up_EDF) for stem, group in groups.items()} == GROUPS
    inputs = {"image": patches(3), "text": texts([3, 16], 16)}
    for name, stem in (("image", "vision"), ("text", "text")):
        model.zero_grad(set_to_none=True)
        encoded = model.encode(name, inputs[name])
        (encoded.features.square().sum() + encoded.routing[0].z_loss).backward()
        for other, group in groups.items():
            gradients = [weight.grad is not None for weight in group.parameters()]
            assert all(gradients) if other == stem else not any(gradients)
        (stats,) = encoded.routing
        used = torch.tensor([owner == stem for owner, count in GROUPS.items() for _ in range(count)])
        assert torch.equal(stats.load_E > 0, used)
        assert torch.equal(stats.gate_E > 0, used)
        assert stats.gate_E.sum() == pytest.approx(1)


def test_the_gates_of_a_group_are_about_one_at_first():
    """So a block does about as much as a dense one. Shared experts have gates of about 1 / experts."""
    torch.manual_seed(0)
    x_TD = torch.randn(12, 32)
    valid, counts = [torch.ones(1, 12, dtype=torch.bool)], [torch.tensor(12.0)]
    moe = MoE(experts={"a": 4, "b": 2})
    groups = ExpertGroups(Model(width=32, mlp_dim=64, heads=1), moe).groups
    for stem, group in groups.items():
        ((routing, _),) = group.router(x_TD, valid, counts)
        filled = routing.gate_BEC[routing.gate_BEC > 0]
        assert filled.mean().item() == pytest.approx(1, rel=0.2), stem


@pytest.mark.parametrize("own", [1, 2])
def test_stems_may_have_first_blocks_of_their_own(own):
    """What one stem's blocks do is nothing to another's pass."""
    model = small(modality_specific_layers=own, moe={"experts": 4, "layers": 1})
    image, text = patches(2), texts([3, 7], 16)
    assert {stem: len(blocks) for stem, blocks in model.encoder.own.items()} == {"vision": own, "text": own}
    alone = {name: model.encode(name, tokens) for name, tokens in (("image", image), ("text", text))}
    with torch.no_grad():
        for parameter in model.encoder.own["text"].parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(model.encode("image", image).features, alone["image"].features)
    assert not torch.allclose(model.encode("text", text).features, alone["text"].features)


def test_heads_are_shared_by_stem_or_by_modality_in_disjoint_and_joint_spaces():
    """What image and text learn of each other serves video, even where no task has video and text."""
    x = torch.randn(3, 32)
    model = small("disjoint", share_heads=False)
    assert sorted(model.projections) == ["image-to-text", "text-to-image", "text-to-video", "video-to-text"]
    assert not torch.allclose(model.project(x, "text", "image"), model.project(x, "text", "video"))
    with pytest.raises(KeyError):
        model.project(x, "image", "video")
    model = small("disjoint")
    assert sorted(model.projections) == ["text-to-vision", "vision-to-text"]
    assert torch.equal(model.project(x, "video", "text"), model.project(x, "image", "text"))
    images_only = small("disjoint", pairs=[("image", "text")])
    assert images_only.share_a_space("video", "text")
    assert not images_only.share_a_space("video", "image")
    assert sorted(small("joint").projections) == ["text", "vision"]
    model = small("joint", share_heads=False)
    assert sorted(model.projections) == ["image", "text", "video"]
    assert torch.equal(model.project(x, "text", "image"), model.project(x, "text", "video"))
    torch.testing.assert_close(model.project(x, "image", "video").norm(dim=-1), torch.ones(3))


def test_each_pair_has_a_temperature_in_either_order_or_shares_it_with_those_of_its_stems():
    model = small(init_temperature=0.2, share_heads=False)
    assert model.temperature("text", "image") is model.temperature("image", "text")
    assert model.temperature("text", "image") is not model.temperature("video", "text")
    assert model.temperature("video", "text").scale.item() == pytest.approx(5)
    shared = small("disjoint")
    assert shared.temperature("video", "text") is shared.temperature("text", "image")


def test_the_pairs_of_a_recipe_are_those_of_its_objectives(tiny_recipe):
    task = {"source": "all", "inputs": {"video": "v", "audio": "a", "text": "t"}}
    seen_and_heard = {"type": "contrastive", "pairs": [["video", "audio"]]}

    def pairs(*objectives):
        recipe = tiny_recipe(tasks={"one": {**task, "objectives": list(objectives)}})
        return [pair.modalities for pair in recipe.to_config({}).pairs]

    assert pairs(seen_and_heard) == [("audio", "video")]
    assert pairs({"type": "contrastive"}) == [("audio", "text"), ("audio", "video"), ("text", "video")]
    assert pairs({"type": "classification", "label": "x"}) == []
