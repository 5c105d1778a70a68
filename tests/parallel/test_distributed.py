"""Training on several ranks of gloo against training on one. torchrun starts once per number of ranks."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from openimp.checkpoint import dcp
from openimp.checkpoint.folder import optimizer_state
from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.data.loader import load_batches
from openimp.data.task_data import TaskData
from openimp.modalities.image import Image
from openimp.modalities.text import Text
from openimp.parallel import distributed
from openimp.parallel.layout import full_tensor, local_shard, reshard
from openimp.planning.plan import plans
from openimp.recipe.schema import Recipe
from openimp.study.variants import peak_memory
from openimp.training.setup import set_up
from openimp.training.stopping import Interrupted, Stop
from openimp.training.trainer import Trainer, train
from tests import little
from tests.messages import refuses
from tests.mixture import LARGEST_TASK
from tests.ranks import COMMON, facts, on
from tests.trained import recipe_of, trainer_of

pytestmark = pytest.mark.slow

MUON = "optimizer={muon_lr: 0.07, warmup_steps: 1}"
CHUNKS = ["memory={chunk_size: 2, activation_checkpointing: true}", "model.moe.z_loss=1"]
BY_STEM = "model.moe.experts={vision: 2, text: 4, audio: 2}"
CASES = {
    "shards": [
        "tasks.named.objectives=[{type: classification, label: label}, {type: contrastive}]",
        "model.attention_init=mimetic",
    ],
    "shards, dense, sigmoid": [
        "model.moe=null",
        """tasks.named.objectives=[{type: contrastive, loss: sigmoid, positives_in: label, pairs: [[text, image]]},
            {type: classification, label: label}]""",
        'tasks.named.inputs.text="{label}"',
    ],
    "shards, several texts": [
        "model.space=disjoint",
        "model.modality_specific_layers=1",
        'tasks.named.inputs.text={column: ["a {label} square", "{label}"], draw: 2}',
        "tasks.named.objectives=[{type: contrastive, positives_in: label}]",
    ],
    "shards kept gathered, chunks, Muon": ["parallel.reshard_after_forward=false", *CHUNKS, MUON],
    "replicas, chunks, Muon": ["parallel.shard_degree=1", *CHUNKS, MUON],
    "replicas of shards": ["parallel.shard_degree=2"],
    "shards, distillation in chunks": [
        """tasks.named.objectives=[{type: distill, of: image, to: vector, loss: contrastive}, {type: contrastive},
            {type: distill, of: text, to: vector}]""",
        *CHUNKS,
    ],
    "replicas of shards, Muon, frozen parts": [
        "parallel.shard_degree=2",
        """optimizer={muon_lr: 0.07, warmup_steps: 1, layer_decay: 0.5, ema_decay: 0.9,
            lr_scale: {stems: 0, stems.text.after: 1, encoder.blocks.0: 0, projections.text-to-vision: 0.5}}""",
    ],
    "expert parallelism, replicas": ["parallel={shard_degree: 1, expert_degree: 2}", MUON],
    "expert parallelism, shards": ["parallel.expert_degree=2"],
    "experts by stem, shards, chunks": [BY_STEM, *CHUNKS],
    "experts by stem, expert parallelism": [BY_STEM, "parallel={shard_degree: 1, expert_degree: 2}", MUON],
}
FOUR = (
    "shards",
    "replicas, chunks, Muon",
    "replicas of shards",
    "expert parallelism, replicas",
    "expert parallelism, shards",
    "experts by stem, expert parallelism",
)
"""The cases in which four ranks do something that two do not."""
STREAMED = ["train.save_every=10", "train.keep_last=3"]
EVALUATED = {
    "shards": [],
    "replicas": ["parallel.shard_degree=1"],
    "expert parallelism": ["parallel={shard_degree: 1, expert_degree: 2}", BY_STEM],
}
"""Layouts in which all kinds of evaluation sets are measured."""
MEASURED = [*LARGEST_TASK, "train.precision=bf16", "tasks.stills.batch_size=384"]
"""With twice the recipe's batch, so that buffers of asynchronous communication matter less."""
PLANNED = {
    "shards": ["parallel.shard_degree=4"],
    "replicas": ["parallel.shard_degree=1"],
    "expert parallelism": ["parallel={shard_degree: 4, expert_degree: 2}"],
}
"""The layouts in which four ranks measure their peak memory."""
SETS = """
  tones: {type: retrieval, source: sounds, inputs: {audio: sound, text: caption},
          view: {audio: {seconds: 0.512, clips: 2}, text: {length: 8}}}
  colours: {type: zero_shot, source: spoiled, inputs: {image: file}, label: label, prompts: ["a {} square", "{}"],
            view: {image: {size: 16}}}
  three: {type: zero_shot, source: three, inputs: {image: file}, label: label, prompts: ["{}"],
          view: {image: {size: 16}}}
  head: {type: classification, task: named, source: spoiled, inputs: {image: file}, label: label,
         view: {image: {size: 16}}}
  features: {type: probe, train: pictures, source: spoiled, inputs: {image: file}, label: label, k: 3,
             view: {image: {size: 16}}}
"""
"""The source `spoiled` has duplicates and unreadable pictures, and `three` has fewer rows than there are ranks."""


@pytest.fixture(scope="module")
def one_rank(little_data, tmp_path_factory) -> Path:
    """What `compute` writes on one rank."""
    out = tmp_path_factory.mktemp("one")
    (out / "facts.json").write_text(json.dumps(compute(little_data, out)))
    return out


@pytest.fixture(scope="module")
def two_ranks(little_data, tmp_path_factory) -> Path:
    """What two ranks write, and a run that stopped."""
    out = tmp_path_factory.mktemp("two")
    on(2, on_two_ranks, little_data, out)
    return out


@pytest.fixture(scope="module")
def four_ranks(little_data, two_ranks, tmp_path_factory) -> Path:
    """What four ranks write, which also resume the stopped run."""
    out = tmp_path_factory.mktemp("four")
    shutil.copytree(two_ranks / "stopped", out / "resumed")
    on(4, on_four_ranks, little_data, out)
    return out


def test_the_planned_peak_is_near_that_of_four_ranks(four_ranks):
    """Only what a step adds is compared: weights, optimizer state and batch exist before it. The plan is for GPUs, but
    attention needs about as much memory here."""
    for name, measured in facts(four_ranks)["memory"].items():
        recipe = Recipe.load("mixture", [*MEASURED, *PLANNED[name]])
        modalities = recipe.make_modalities()
        classes = TaskData(recipe, modalities).classes
        found = next(plans(recipe, modalities, classes, gpus=4, gpu="h100", utilization=0.4))
        planned = max(step.memory.temporary for (task, _), step in found.step_needs.items() if task == "stills")
        assert planned == pytest.approx(measured, rel=0.15), name


@pytest.mark.parametrize(("ranks", "cases"), [("two_ranks", [*CASES]), ("four_ranks", FOUR)])
def test_several_ranks_compute_the_gradients_of_one(one_rank, request, ranks, cases):
    """Also: what Muon updates, which parameters of which task have optimizer state afterwards, and, bit for bit, the
    initial weights."""
    out = request.getfixturevalue(ranks)
    for name in cases:
        expected, found = (load_file(folder / f"{name}.safetensors") for folder in (one_rank, out))
        assert found.keys() == expected.keys()
        assert len({key.split()[0] for key in found}) == 2
        for key, value in expected.items():
            if key.endswith("updated"):  # Orthogonal in bf16: each number may differ by more, all together by little.
                assert (found[key] - value).norm() < 0.02 * value.norm(), f"{name}, {key}"
                continue
            if key.endswith("initial"):
                assert torch.equal(found[key], value), f"{name}, {key}"
            torch.testing.assert_close(
                found[key].view_as(value),
                value,
                rtol=1e-5 if key.endswith("loss") else 1e-4,
                atol=1e-6,
                msg=lambda m, k=f"{name}, {key}": f"{k}: {m}",
            )
        assert facts(out)["states"].get(name) == facts(one_rank)["states"].get(name)


@pytest.mark.parametrize("ranks", ["two_ranks", "four_ranks"])
def test_several_ranks_measure_what_one_measures(one_rank, request, ranks):
    """Bad rows, data hashes and the hash of the weights included, and with the averaged weights. Each rank decodes its
    part of the rows. In bf16, a classification head may have been gathered in bf16 by the pass of the set before."""
    alone = facts(one_rank)
    together = facts(request.getfixturevalue(ranks))
    for name in EVALUATED:
        assert together["measured"][name] == alone["measured"][name], name
        assert [result["skipped"] for result in together["measured"][name]] == [0, 0, 2, 0, 2, 2, 2]
        assert max(together["decoded"][name]) < 0.75 * alone["decoded"][name][0]
    assert together["in bf16"] == 7


@pytest.mark.parametrize("ranks", ["two_ranks", "four_ranks"])
def test_an_evaluation_changes_nothing_for_training(request, ranks):
    """And a stop of one rank ends the evaluation of all."""
    assert facts(request.getfixturevalue(ranks))["undisturbed"] == {name: True for name in EVALUATED}
    assert all(facts(request.getfixturevalue(ranks))["training after a stop"])


def test_ranks_share_what_one_of_them_prepares(two_ranks):
    """Rank 0 fits the tokenizer and decodes a cached source, and both start from the weights of another model."""
    prepared = facts(two_ranks)["prepared"]
    assert [rank["fitted"] for rank in prepared] == [1, 0]
    assert [rank["decoded"] for rank in prepared] == [1 + 24, 1], "each rank tries one row first"
    assert prepared[0]["tokenizer"] == prepared[1]["tokenizer"]
    assert all(rank["same weights"] for rank in prepared)


def test_an_evaluation_that_fails_ends_all_ranks_and_loses_no_step(two_ranks):
    assert all(message.startswith("evaluation.sets.colours") for message in facts(two_ranks)["evaluation"])
    assert (two_ranks / "evaluated" / "checkpoints" / "step-00000002" / "manifest.json").exists()


def test_a_run_on_two_ranks_resumes_on_one_and_on_four(little_data, two_ranks, four_ranks, tmp_path):
    """The four share the model in another way than the two did."""
    one = tmp_path / "one"
    two = tmp_path / "two"
    four = four_ranks / "resumed"
    shutil.copytree(two_ranks / "stopped", two)
    (saved,) = [path.name for path in (two / "checkpoints").iterdir() if path.name > "step-00000005"]
    assert saved < "step-00000024"
    assert train(recipe_of(little_data, *COMMON), one)
    assert train(recipe_of(little_data, *COMMON), two, resume=True)

    lines = read_lines(one / "metrics.jsonl")
    for folder in (two, four):
        for file in ("model", "ema"):
            expected, found = (dcp.read(r / "checkpoints" / "step-00000024" / file) for r in (one, folder))
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert (found[name] - value).norm() <= 2e-3 * value.norm() + 1e-4, f"{file}, {name}"
        for line, other in zip(lines, read_lines(folder / "metrics.jsonl"), strict=True):
            assert [*line["tasks"]] == [*other["tasks"]]
            for task, figures in line["tasks"].items():
                assert other["tasks"][task] == pytest.approx(figures, rel=1e-3)
            assert line["totals"] == other["totals"]
            assert line["samples"] == other["samples"]
        (first, *_), (same, *_) = (read_lines(r / "results.jsonl") for r in (one, folder))
        assert same["top1"] == first["top1"]


def test_a_streamed_run_on_two_ranks_resumes_on_one(little_data, two_ranks, tmp_path):
    """Each rank has read its own lane. The checkpoint has the positions of both."""
    changes = [*COMMON, *little.write_tars(little_data, two_ranks), *STREAMED, "train.num_workers=2"]
    resumed = Path(shutil.copytree(two_ranks / "streamed", tmp_path / "run"))
    for saved in sorted((resumed / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(saved)
    assert train(recipe_of(little_data, *changes), resumed, resume=True)
    ours, theirs = (read_lines(run / "metrics.jsonl") for run in (resumed, two_ranks / "streamed"))
    assert [line["samples"] for line in ours] == [line["samples"] for line in theirs]
    last = [run / "checkpoints/step-00000024/state.json" for run in (resumed, two_ranks / "streamed")]
    states = [json.loads(file.read_text()) for file in last]
    assert states[0]["cursors"] == states[1]["cursors"]
    assert states[0]["cursors"]["named"].keys() == {"0", "1"}


def test_an_environment_in_which_ranks_would_not_find_each_other_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with refuses():
        distributed.start()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with refuses():
        distributed.start()


def trainer_without_sets(folder: Path, run: Path, *changes: str) -> Trainer:
    """Its first two steps are of both tasks."""
    return trainer_of(folder, run, *COMMON, "evaluation={}", "alternation.kind=intervals", *changes)


def compute(folder: Path, out: Path) -> dict[str, Any]:
    """What is compared between numbers of ranks, besides the tensors that it writes."""
    return compute_gradients(folder, out) | evaluations(folder, out)


def compute_gradients(folder: Path, out: Path) -> dict[str, Any]:
    """Writes a file per case with what `gradients_of` returns, and notes the optimizer state."""
    states = {}
    distributed.run_on_rank_zero(lambda: write_vectors(folder / "pictures", out / "vectors.jsonl"))
    vectors = f"sources.pictures={{path: {out / 'vectors.jsonl'}, root: {folder / 'pictures'}}}"
    for name in CASES if distributed.world_size() < 4 else FOUR:
        changes = [*CASES[name], *([vectors] if "distillation" in name else [])]
        trainer = trainer_without_sets(folder, out / f"run {name}", *changes)
        tensors = gradients_of(trainer)
        states[name] = sorted(optimizer_state(trainer.model, trainer.updater.optimizers))
        if name == "replicas, chunks, Muon":
            trainer.save(wait=True)  # `prepared` starts from it.
        if distributed.rank() == 0:
            save_file(tensors, out / f"{name}.safetensors")
    return {"states": states}


def write_vectors(pictures: Path, file: Path) -> None:
    """A manifest of the pictures, with a vector for each. Those of two pictures are equal."""
    rng = np.random.default_rng(0)
    lines = []
    for picture in sorted(pictures.rglob("*.png")):
        vector = (np.ones(32) if len(lines) < 2 else rng.normal(size=32)).tolist()
        name = picture.relative_to(pictures).as_posix()
        lines.append(json.dumps({"file": name, "label": picture.parent.name, "vector": vector}) + "\n")
    file.write_text("".join(lines))


def gradients_of(trainer: Trainer) -> dict[str, Tensor]:
    """Losses and unsharded gradients of a step of each task; with Muon also its matrices after one update per task."""
    found = {f"named {name} initial": full_tensor(x).clone() for name, x in trainer.model.state_dict().items()}
    batches = [*load_batches(trainer.batches, 0, 2)]
    for loaded in batches:
        task = loaded.visit.task
        losses = trainer.forward(loaded)
        losses.total.backward()
        found[f"{task} loss"] = distributed.all_reduce_mean(losses.total.detach())
        reshard(trainer.model)  # Gradients belong to the shards.
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                found[f"{task} {name}"] = full_tensor(parameter.grad).clone()
        trainer.model.zero_grad()
    if trainer.recipe.optimizer.muon_lr:
        for loaded in batches:
            trainer.make_step(loaded)
        (group,) = trainer.updater.optimizers[1].param_groups
        hidden = [full_tensor(matrix.detach()).clone() for matrix in group["params"]]
        sums = distributed.all_gather_object(float(sum(matrix.double().sum() for matrix in hidden)))
        assert len({*sums}) == 1
        found |= {f"named {i} updated": matrix for i, matrix in enumerate(hidden)}
    return found


def evaluations(folder: Path, out: Path) -> dict[str, Any]:
    """By layout: the results of evaluating averaged weights, how many pictures each rank decodes for them, and whether
    the weights and the next gradients are what they would be without the evaluation."""
    if distributed.rank() == 0:
        shutil.copytree(folder / "pictures", out / "spoiled")
        for colour in ("blue", "red"):
            shutil.copy(out / "spoiled" / "green" / "0.png", out / "spoiled" / colour / "like another.png")
            (out / "spoiled" / colour / "broken.png").write_bytes(b"no picture")
        (out / "three.csv").write_text("file,label\n" + "".join(f"{c}/1.png,{c}\n" for c in ("red", "blue", "white")))
    distributed.barrier()
    sets = yaml.safe_load(SETS)
    changes = [
        f"evaluation={json.dumps({'sets': sets, 'batch_size': 3})}",
        f"sources.spoiled={{path: {out / 'spoiled'}}}",
    ]
    changes += [f"sources.three={{path: {out / 'three.csv'}, root: {out / 'spoiled'}}}"]
    found: dict[str, Any] = {"measured": {}, "decoded": {}, "undisturbed": {}}
    stop = Stop(lambda: False)
    stop.requested = distributed.rank() == distributed.world_size() - 1
    for name, layout in EVALUATED.items():
        run = out / f"evaluated {name}"
        decoded: list[Any] = []
        trainer = trainer_of(folder, run, *COMMON, "alternation.kind=intervals", *changes, *layout)
        assert trainer.updater.ema
        for average in trainer.updater.ema.weights.values():
            local_shard(average).mul_(1.5)
        loaded = next(iter(load_batches(trainer.batches, 0, 1)))
        before = state_of(trainer, loaded)
        with counted_calls(Image, "decode", decoded):
            trainer.evaluate()
        found["measured"][name] = read_lines(run / "results.jsonl")
        found["decoded"][name] = distributed.all_gather_object(len(decoded))
        after = state_of(trainer, loaded)
        same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        found["undisturbed"][name] = all(distributed.all_gather_object(same))
    with pytest.raises(Interrupted):
        trainer.evaluate(stop.watch)
    found["training after a stop"] = distributed.all_gather_object(trainer.model.training)
    trainer_of(folder, out / "in bf16", *COMMON, *changes, "train.precision=bf16").evaluate()
    found["in bf16"] = len(read_lines(out / "in bf16" / "results.jsonl"))
    return found


def state_of(trainer: Trainer, loaded: Any) -> dict[str, Tensor]:
    """This rank's shards of weights, averages, and the gradients of a batch."""
    assert trainer.updater.ema
    found = {f"weight {name}": local_shard(x).clone() for name, x in trainer.model.state_dict().items()}
    found |= {f"average {name}": local_shard(x).clone() for name, x in trainer.updater.ema.weights.items()}
    trainer.forward(loaded).total.backward()
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient {name}"] = local_shard(parameter.grad).clone()
    trainer.model.zero_grad()
    return found


@contextmanager
def counted_calls(owner: type, method: str, calls: list[Any]) -> Iterator[None]:
    """Appends to `calls` whenever a method is called."""
    original = getattr(owner, method)
    setattr(owner, method, lambda *args, **kwargs: (calls.append(args), original(*args, **kwargs))[1])
    try:
        yield
    finally:
        setattr(owner, method, original)


def prepared(folder: Path, out: Path) -> list[Any]:
    """For each rank: how often it fits the tokenizer, and how many pictures it decodes to fill a cache, which is empty
    at first; the tokenizer; and whether it starts from all weights of the checkpoint that two ranks have saved."""
    os.environ["OPENIMP_CACHE"] = str(out / "cache")
    decoded: list[Any] = []
    fitted: list[Any] = []
    with counted_calls(Image, "decode", decoded), counted_calls(Text, "fit", fitted):
        trainer = trainer_without_sets(folder, out / "cached", "sources.pictures.cache=memory")
    next(iter(load_batches(trainer.batches, 0, 1)))
    saved = out / "run replicas, chunks, Muon" / "checkpoints" / "step-00000002"
    warm = trainer_without_sets(folder, out / "warm", f"train.init={saved}")
    weights = dcp.read(saved / "model")
    same = all(torch.equal(full_tensor(x), weights[name]) for name, x in warm.model.state_dict().items())
    tokenizer = trainer.data.modalities["text"].state()
    return distributed.all_gather_object(
        {"fitted": len(fitted), "decoded": len(decoded), "tokenizer": tokenizer, "same weights": same}
    )


def train_streamed(folder: Path, out: Path) -> None:
    """A run whose pictures are streamed, with checkpoints after 10, 20 and 24 steps."""
    changes = distributed.run_on_rank_zero(lambda: little.write_tars(folder, out))
    trainer_of(folder, out / "streamed", *COMMON, *changes, *STREAMED).train()


def failed_evaluation(folder: Path, out: Path) -> list[str]:
    """The errors of all ranks if the pictures to be evaluated are replaced after the start."""
    if distributed.rank() == 0:
        shutil.copytree(folder / "pictures", out / "others")
    distributed.barrier()
    others = f"sources.others={{path: {out / 'others'}}}"
    changes = [*COMMON, "train.steps=2", others, "evaluation.sets.colours.source=others"]
    trainer = trainer_of(folder, out / "evaluated", *changes)
    if distributed.rank() == 0:
        for file in (out / "others").rglob("*.png"):
            file.write_bytes(b"no picture")
    with pytest.raises(UserError) as error:
        trainer.train()
    return distributed.all_gather_object(str(error.value))


def train_until_a_signal(folder: Path, run: Path) -> None:
    """A run of replicas that a signal to one of them stops."""
    trainer = trainer_of(folder, run, *COMMON, "parallel.shard_degree=1")
    make_step = trainer.make_step

    def make_step_and_send(loaded: Any) -> Any:
        if loaded.visit.step == 6 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_step(loaded)

    trainer.make_step = make_step_and_send  # type: ignore[method-assign]
    assert not trainer.train()


def on_two_ranks(folder: Path, out: Path) -> dict[str, Any]:
    found = compute(folder, out)
    found["prepared"] = prepared(folder, out)
    found["evaluation"] = failed_evaluation(folder, out)
    train_streamed(folder, out)
    train_until_a_signal(folder, out / "stopped")
    return found


def on_four_ranks(folder: Path, out: Path) -> dict[str, Any]:
    found = compute(folder, out)
    found["memory"] = {}
    for name, changes in PLANNED.items():
        peak = peak_memory(Trainer(set_up(Recipe.load("mixture", [*MEASURED, *changes]), out / name)))
        found["memory"][name] = max(distributed.all_gather_object(peak))
    changes = [*COMMON, "parallel={shard_degree: 2, expert_degree: 2}"]
    assert train(recipe_of(folder, *changes), out / "resumed", resume=True)
    return found
