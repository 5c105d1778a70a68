"""Sparse encoders that start as copies of dense ones."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from processes import run, torchrun
from timm.models import save_for_hf
from torch import Tensor

from openimp.checkpoint.folder import save_model
from openimp.checkpoint.upcycling import EXPERTS
from openimp.checkpoint.warm_start import open_warm_start
from openimp.common.errors import UserError
from openimp.data.loader import load_batches
from openimp.model.encoder import MLP
from openimp.model.imp import IMP
from openimp.model.moe import SparseMLP, collect_usage, valid_tokens_per_rank
from openimp.parallel import distributed
from openimp.parallel.layout import full_tensor, local_shard
from openimp.recipe.model import MoE
from openimp.recipe.schema import Recipe
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer

ROUTINGS = {"expert_choice": {}, "expert_choice_batch": {}, "token_choice": {"top_k": 2, "capacity_factor": 0.3}}
"""Options with which some tokens reach no expert in training."""
TASKS = """{source: pictures, inputs: {image: file, text: "a {label} square"}, batch_size: 8,
    objectives: [{type: contrastive, same: label}], views: [{image: {size: 16}, text: {length: 8}}]}"""
ALL = {"experts": 4, "layers": 1, "capacity_factor": 4.0, "gates": "normalized"}
"""Every expert takes all tokens."""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_copies_with_normalized_gates_compute_the_dense_layer_for_all_tokens_that_they_take(routing, bias, training):
    torch.manual_seed(0)
    dense = MLP(16, 32, bias, "tanh")
    config = MoE(experts=4, routing=routing, gates="normalized", **ROUTINGS[routing])
    sparse = SparseMLP(16, 32, config, bias, "tanh").train(training)
    with torch.no_grad():
        sparse.router.weight_ED.mul_(50)
        for name, parameter in dense.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            sparse.experts.get_parameter(EXPERTS[name]).copy_(parameter.T if parameter.ndim == 2 else parameter)
    x, valid = torch.randn(3, 20, 16), torch.arange(20) < torch.tensor([20, 9, 14])[:, None]
    collect_usage(sparse, True)
    out_TD, (stats,) = sparse(x.flatten(0, 1), [valid], [valid_tokens_per_rank(x, valid)])
    out, taken = out_TD.view_as(x), out_TD.view_as(x).any(-1)
    torch.testing.assert_close(out[taken], dense(x[taken]), rtol=0, atol=1e-5)
    assert not taken[~valid].any()
    count = int(valid.sum())
    assert int(taken.sum()) == pytest.approx(count * (1 - float(stats.usage.dropped)))
    assert taken.sum() > count / 4
    assert (taken.sum() == count) == (routing == "token_choice" and not training)


@pytest.mark.parametrize("bias", [True, False])
def test_a_sparse_model_starts_as_the_dense_one(bias, tiny_recipe, tiny_model, tmp_path):
    """Features are equal after a start with `train.init` alone. Some of the modality-specific layers are sparse."""
    dense_recipe = tiny_recipe({"moe": None, "bias": bias, "modality_specific_layers": 1})
    dense, modalities = tiny_model(dense_recipe)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (tmp_path / "dense").mkdir()
    save_model(tmp_path / "dense", dense, dense_recipe, modalities, {})
    changes = {"moe": {**ALL, "layers": 2}, "bias": bias, "modality_specific_layers": 1}
    recipe = tiny_recipe(changes, train={"init": str(tmp_path / "dense")})
    start = open_warm_start(recipe, modalities)
    sparse = IMP.from_recipe(recipe, modalities).eval()
    line = start.load(sparse, {})
    assert line.startswith(f"starts from {tmp_path / 'dense'}, whose MLPs are copied into 4 experts each; loaded: ")
    assert line.count("router.weight_ED") == 4, "those of each stem, and the shared one"
    for name, view in (("image", {"size": 32}), ("text", {"length": 8})):
        options = modalities[name].View(**view)
        shape = (2, 32, 32, 3) if name == "image" else (2, 8)
        generator = torch.Generator().manual_seed(0)
        items = torch.randint(2, 200, shape, generator=generator).numpy()
        tokens = modalities[name].tokens(items.astype("uint8" if name == "image" else "int64"), options, None)
        with torch.no_grad():
            found, expected = (model.encode({name: tokens}).features for model in (sparse, dense))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_only_a_dense_model_becomes_a_sparse_one(tiny_recipe, tiny_model, tmp_path):
    recipe = tiny_recipe()
    model, modalities = tiny_model(recipe)
    (tmp_path / "sparse").mkdir()
    save_model(tmp_path / "sparse", model, recipe, modalities, {})
    for moe, told in (
        (None, "model.moe.experts is 4 there, None here"),
        ({"experts": 8, "layers": 1}, "model.moe.experts is 4 there, 8 here"),
        ({"experts": 4, "layers": 2}, "model.moe.layers is 1 there, 2 here"),
    ):
        changed = tiny_recipe({"moe": moe}, train={"init": str(tmp_path / "sparse")})
        with pytest.raises(UserError, match=told):
            open_warm_start(changed, modalities)


@pytest.fixture(scope="module")
def sources(little_data, tmp_path_factory) -> dict[str, list[str]]:
    """Changes of the little recipe with which it starts from a dense checkpoint, and from timm's model."""
    folder = tmp_path_factory.mktemp("sources")
    model = timm.create_model(
        "vit_base_patch16_siglip_224", embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, img_size=16, patch_size=8
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_for_hf(model, folder / "vit", safe_serialization=True)
    # Without sounds, as in the little recipe's first task.
    changes = [f"tasks={{named: {TASKS}}}", "evaluation={}", "train.precision=fp32"]
    changes += ["modalities={vision: {patch: [2, 8, 8]}, text: {vocab_size: 300, positions: 16}}"]
    recipe = Recipe.load(little_data / "recipe.yaml", [*changes, "model.moe=null", "model.bias=true"])
    trainer = Trainer(set_up(recipe, folder / "run"))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (folder / "dense").mkdir()
    save_model(folder / "dense", trainer.model, recipe, trainer.modalities, {})
    sparse = [*changes, f"model.moe={json.dumps(ALL)}", "model.bias=true", "optimizer.muon_lr=0.02"]
    vision = "modalities.vision={patch: [2, 8, 8], tables: [4, 2, 2], positions: grid}"
    imported = [*sparse, "model.gelu=erf", vision, f"train.init=timm:local-dir:{folder / 'vit'}"]
    return {
        "checkpoint": [*sparse, f"train.init={folder / 'dense'}"],
        "timm": imported,
        "timm, dense": [*imported, "model.moe=null"],
    }


LAYOUTS = {"shards": [], "experts": ["parallel.expert_degree=2"], "replicas": ["parallel.shard_degree=1"]}


def first_steps(folder: Path, out: Path, sources: dict[str, list[str]]) -> dict[str, dict[str, Tensor]]:
    """By source and layout: the initial weights, the loss of the first step, and the experts after two steps."""
    found = {}
    for source, changes in sources.items():
        for name, layout in LAYOUTS.items() if distributed.world_size() > 1 else [("", [])]:
            if name == "experts" and "dense" in source:
                continue
            recipe = Recipe.load(folder / "recipe.yaml", [*changes, *layout])
            trainer = Trainer(set_up(recipe, out / f"{source} {name}"))
            tensors = {key: full_tensor(x).detach().clone() for key, x in trainer.model.state_dict().items()}
            batches = [*load_batches(trainer.data, 0, 2)]
            tensors["loss"] = distributed.all_reduce_mean(trainer.forward(batches[0]).total.detach())
            for loaded in batches:
                trainer.make_step(loaded)
            trainer.confirm()
            after = trainer.model.state_dict()
            experts = [weight for module in trainer.model.experts() for weight in module.parameters()]
            if name == "experts":
                assert all(local_shard(weight).shape[0] == 2 for weight in experts)
            tensors |= {f"after {key}": full_tensor(x).detach() for key, x in after.items() if "experts" in key}
            found[f"{source} {name}".strip()] = tensors
    return found


def test_two_ranks_start_from_the_weights_of_one(little_data, sources, tmp_path):
    """With sharded weights and experts. Muon and AdamW then update each expert."""
    expected = first_steps(little_data, tmp_path, sources)
    (tmp_path / "sources.json").write_text(json.dumps(sources))
    run(*torchrun(2, __file__, little_data, tmp_path), check=True)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert len(found) == 8
    for name, tensors in found.items():
        one = expected[max((source for source in expected if name.startswith(source)), key=len)]
        assert tensors.keys() == one.keys()
        for key, tensor in tensors.items():
            if key.startswith("after"):  # Orthogonal in bf16.
                change = one[key] - one[key.removeprefix("after ")]
                assert change.any(), key
                assert (tensor - one[key]).norm() < 0.1 * change.norm(), f"{name}, {key}"
            elif key == "loss":
                torch.testing.assert_close(tensor, one[key], rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(tensor, one[key]), f"{name}, {key}"


def main(folder: Path, out: Path) -> None:
    distributed.start()
    found = first_steps(folder, out / "two", json.loads((out / "sources.json").read_text()))
    if distributed.rank() == 0:
        torch.save(found, out / "found.pt")
    distributed.shut_down()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
