"""IMP's encoder from vision Transformers that timm builds, saves and computes. Their weights are random."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from timm.models import VisionTransformer, save_for_hf

from openimp.checkpoint.public_vit import ViTWeights, obstacles, open_vit
from openimp.checkpoint.warm_start import open_warm_start
from openimp.model.imp import IMP
from openimp.parallel import distributed
from openimp.parallel.layout import full_tensor
from openimp.recipe.schema import Recipe
from tests.messages import refuses
from tests.ranks import on
from tests.trained import trainer_of

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SIGLIP, GAP = "vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224"
ARCHITECTURES = {
    "SigLIP": (SIGLIP, {"img_size": 48}),
    "patch 14 that does not divide the picture": ("vit_so400m_patch14_siglip_384", {"mlp_ratio": 3.7, "img_size": 45}),
    "tanh, wide picture": ("vit_so400m_patch16_siglip_256", {"mlp_ratio": 2.5, "img_size": (32, 80)}),
    "mean pooling, LayerScale": (GAP, {"init_values": 1e-5, "img_size": (48, 32)}),
    "tall patches, no bias of q, k, v": (GAP, {"patch_size": (32, 8), "qkv_bias": False, "img_size": (64, 24)}),
    "other mean and standard deviation": ("vit_huge_patch14_gap_224", {"img_size": (28, 42)}),
    "any size of picture": (SIGLIP, {"dynamic_img_size": True, "init_values": 0.1, "img_size": 32}),
}
"""timm's architectures, and options of small ones."""


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Gives all parameters random values, because biases that are 0 and scales that are 1 would hide mistakes."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.randn_like(parameter) * 0.5 + ("weight" in name))
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def save_timm(folder: Path, architecture: str, **options) -> VisionTransformer:
    """Saves a small model in timm's own format, and returns it."""
    model = timm.create_model(architecture, **SMALL, **options).eval()
    randomize(model)
    save_for_hf(model, folder, safe_serialization=True)
    return model


def recipe_of(init: str, size: tuple[int, int], patch=(1, 1), **changes) -> Recipe:
    """A recipe of all modalities that starts from `init`. Its model does not fit unless `changes` makes it."""
    views = {"image": {"size": size}, "video": {"size": size, "frames": 4}, "audio": {"seconds": 1.024}}
    task = {"source": "all", "objectives": [{"type": "contrastive"}]}
    tasks = {
        name: {**task, "inputs": {name: name, "text": "text"}, "views": [{name: view, "text": {"length": 8}}]}
        for name, view in views.items()
    }
    data = {
        "name": "imported",
        "model": {"width": 16, "layers": 1, "heads": 1, "mlp_dim": 8, "embed_dim": 16},
        "modalities": {"vision": {"patch": [2, *patch], "tables": [8, 80, 80]}, "audio": {"window": 512, "hop": 256}},
        "sources": {"all": {"path": "all.parquet"}},
        "tasks": tasks,
        "train": {"init": init},
    }
    return Recipe.build({**data, **changes})


def fitting_recipe(init: str, size: tuple[int, int], **model) -> Recipe:
    """The recipe with the lines that the error asks for."""
    recipe = recipe_of(init, size)
    with refuses() as error:
        open_warm_start(recipe, recipe.make_modalities())
    lines = yaml.safe_load(str(error.value).partition("\n")[2])
    assert lines["model"]["embed_dim"] == 16, "the recipe's other options stay"
    return recipe_of(init, size, model=lines["model"] | model, modalities=lines["modalities"])


def load(recipe: Recipe) -> tuple[IMP, dict, str]:
    """The model that starts as the recipe says, its modalities, and the line that is printed."""
    modalities = recipe.make_modalities()
    start = open_warm_start(recipe, modalities)
    modalities["text"].fit([["a red square"]])
    model = IMP(recipe.to_config({}), modalities).eval()
    assert start is not None
    return model, modalities, start.load(model, {})


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_pictures_and_clips_of_equal_frames_have_the_features_of_timms_model(name, tmp_path):
    architecture, options = ARCHITECTURES[name]
    trunk = save_timm(tmp_path / "vit", architecture, **options)
    patch = trunk.patch_embed.patch_size
    size = tuple(n * side for n, side in zip(trunk.patch_embed.grid_size, patch))
    recipe = fitting_recipe(f"timm:local-dir:{tmp_path / 'vit'}", size)
    cfg = trunk.pretrained_cfg
    model, modalities, line = load(recipe)
    pixels = np.random.default_rng(0).integers(0, 256, (3, *trunk.patch_embed.img_size, 3), np.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (cfg["mean"], cfg["std"]))
    expected = trunk.forward_features((torch.from_numpy(pixels).movedim(-1, 1) / 255 - mean) / std)
    height, width = recipe.tasks["image"].views[0]["image"].hw
    pixels = pixels[:, :height, :width]
    tokens = modalities["image"].tokens(pixels, recipe.tasks["image"].views[0]["image"], None)
    (features,), _ = model.encoder([model.stem("image")(tokens)], [None])
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.encode("image", tokens).features, expected.mean(1), rtol=1e-5, atol=1e-5)
    clips = np.repeat(pixels[:, None], 4, axis=1)
    tokens = modalities["video"].tokens(clips, recipe.tasks["video"].views[0]["video"], None)
    assert tokens.coords[..., 0].unique().tolist() == [0, 4]
    torch.testing.assert_close(model.encode("video", tokens).features, expected.mean(1), rtol=1e-5, atol=1e-5)
    assert f"(pictures of {size[0]} x {size[1]} pixels have its features); loaded: stems.vision, " in line
    assert recipe.model.gelu == ("tanh" if "tanh" in name else "erf")


def test_a_stem_with_one_channel_starts_from_the_same_patch_embedding(tmp_path):
    """If its patches are equally large. Its positions are new."""
    save_timm(tmp_path / "vit", SIGLIP, img_size=32)
    recipe = fitting_recipe(f"timm:local-dir:{tmp_path / 'vit'}", (32, 32))
    model, _, line = load(recipe)
    vision, audio = model.stems["vision"], model.stems["audio"]
    kernels = [(stem.embed.weight * stem.scale) for stem in (vision, audio)]
    summed = kernels[0].unflatten(1, (2, 256, 3)).sum((1, 3))
    torch.testing.assert_close(kernels[1], summed)
    assert torch.equal(audio.before.weight, torch.eye(32))
    assert "stems.audio" in line.partition("; new: ")[0]
    assert "stems.audio.positions.*.weight" in line.partition("; new: ")[2]
    assert audio.positions[0].weight.any()
    for options in ({"patch": [8, 16]}, {"conv_channels": 8}):
        other = recipe.to_dict()
        other["modalities"]["audio"] |= options
        line = load(Recipe.build(other))[2]
        assert "stems.audio" in line.partition("; new: ")[2].split(", ")


REFUSED = {
    "it has cls_token": ("vit_base_patch16_224", {}),
    "it has reg_token": (GAP, {"reg_tokens": 2}),
    "it has norm_pre": (GAP, {"pre_norm": True}),
    "it has blocks.*.attn.q_norm": (GAP, {"qk_norm": True}),
    "it lacks norm.weight": (GAP, {"fc_norm": True}),
    "it lacks pos_embed": (GAP, {"pos_embed": "none"}),
    "epsilon of its norms is 1e-05, not 1e-06": (GAP, {"norm_layer": torch.nn.LayerNorm}),
    "SwiGLU": ("aimv2_large_patch14_224", {}),
    "1 channels, not 3": (GAP, {"in_chans": 1}),
    "timm.models.resnet.ResNet, not timm's": ("resnet18", None),
}
"""What the error says, and timm's model."""


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_be_approximated_is_refused_by_name(reason):
    architecture, options = REFUSED[reason]
    with torch.device("meta"):
        model = timm.create_model(architecture, **({} if options is None else SMALL | options))
    assert any(reason in found for found in obstacles(model)), obstacles(model)


def test_other_models_and_folders_are_refused_in_a_sentence(tmp_path):
    model = timm.create_model(SIGLIP, **SMALL, img_size=32)
    save_for_hf(model, tmp_path / "pickled", safe_serialization=False)
    for init in (
        "timm:vit_base_patch16_224",
        "timm:vit_bas",
        "open_clip:ViT-B-16-SigLIP2/webli",
        f"timm:local-dir:{tmp_path / 'nothing'}",
        f"timm:local-dir:{tmp_path / 'pickled'}",
    ):
        recipe = recipe_of(init, (32, 32))
        with refuses():
            open_warm_start(recipe, recipe.make_modalities())
    (tmp_path / "pickled" / "other.safetensors").write_bytes(b"damaged")
    recipe = recipe_of(f"timm:local-dir:{tmp_path / 'pickled'}", (32, 32))
    with refuses():
        open_warm_start(recipe, recipe.make_modalities())
    (tmp_path / "pickled" / "model.safetensors").write_bytes(b"damaged")
    recipe = fitting_recipe(f"timm:local-dir:{tmp_path / 'pickled'}", (32, 32))
    with refuses():
        load(recipe)


def test_a_local_folder_is_relative_to_the_recipe_and_experts_cannot_start_from_a_dense_vit(tmp_path):
    save_timm(tmp_path / "vit", SIGLIP, img_size=32)
    data = recipe_of("timm:local-dir:vit", (32, 32)).to_dict() | {"train": {"init": "timm:local-dir:vit"}}
    recipe = Recipe.build(data, tmp_path)
    assert recipe.train.init == f"timm:local-dir:{tmp_path / 'vit'}"
    assert "(pictures of 32 x 32 pixels" in str(ViTWeights(recipe.train.init, recipe.make_modalities()))
    recipe = fitting_recipe(recipe.train.init, (32, 32), moe={"experts": 4, "layers": 1})
    with refuses():
        open_warm_start(recipe, recipe.make_modalities())


def test_published_names_are_accepted_before_anything_is_downloaded():
    for name, width in (("vit_base_patch16_siglip_224.v2_webli", 768), ("vit_so400m_patch14_siglip_384.webli", 1152)):
        assert open_vit(f"timm:{name}", weights=False).embed_dim == width


TASK = """{source: pictures, inputs: {image: file, text: "a {label} square"}, batch_size: 8,
    objectives: [{type: contrastive, positives_by: label}], views: [{image: {size: 16}, text: {length: 8}}]}"""
CHANGES = [
    f"tasks={{named: {TASK}}}",
    "evaluation={}",
    "model.moe=null",
    "model.bias=true",
    "model.gelu=erf",
    "modalities={vision: {patch: [2, 8, 8], tables: [4, 2, 2], positions: grid}, text: {vocab_size: 300}}",
]


@pytest.mark.slow
def test_two_ranks_start_from_the_weights_of_one(little_data, tmp_path):
    """As shards, and as replicas."""
    save_timm(tmp_path / "vit", SIGLIP, mlp_ratio=2, img_size=16, patch_size=8)
    alone, _ = initial_weights(little_data, tmp_path)
    assert on(2, initial_weights, little_data, tmp_path) == [alone, alone]


def initial_weights(folder: Path, out: Path) -> list[dict[str, int]]:
    """A checksum of each tensor of the model that starts from the ViT: as shards, and as replicas."""
    found = []
    for degree in ("null", "1"):
        changes = [*CHANGES, f"train.init=timm:local-dir:{out / 'vit'}", f"parallel.shard_degree={degree}"]
        run = out / f"{distributed.world_size()} ranks {degree}"
        state = trainer_of(folder, run, *changes).model.state_dict()
        found.append({name: zlib.crc32(full_tensor(tensor).numpy().tobytes()) for name, tensor in state.items()})
    return found
