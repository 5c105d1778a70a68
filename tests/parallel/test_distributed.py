"""Several processes, as torchrun starts them, against one: gradients, a whole training, and one that goes on elsewhere.

torchrun runs this very file to compute the gradients of all cases.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import COMMON, torchrun
from safetensors.torch import load_file, save_file
from torch import Tensor

from openimp.checkpoint import dcp
from openimp.checkpoint.folder import optimizer_state
from openimp.common.json_lines import read_lines
from openimp.data.loader import make_loader
from openimp.parallel import distributed, owners
from openimp.parallel.layout import full_tensor
from openimp.recipe.schema import Recipe
from openimp.training.trainer import Trainer

CASES = {
    "sparse": [],
    "dense, sigmoid": [
        "model.moe=null",
        "tasks.named.objectives=[{type: contrastive, loss: sigmoid}, {type: classification, label: label}]",
    ],
    "soft, several texts": [
        "model.moe={experts: 2, layers: 1, routing: soft}",
        'tasks.named.inputs.text={column: "a {label} square", draw: 2}',
    ],
    "classification first": ["tasks.named.objectives=[{type: classification, label: label}, {type: contrastive}]"],
    "in pieces": ["memory={chunk_size: 2, activation_checkpointing: true}", "model.moe.z_loss=1"],
    "Muon": ["optimizer={muon_lr: 0.07, warmup_steps: 1}"],
    "disjoint, a stem's own block": ["model.space=disjoint", "model.modality_specific_layers=1"],
    "replicas": ["parallel.shard_degree=1"],
    "replicas, in pieces": ["parallel.shard_degree=1", "memory={chunk_size: 2, activation_checkpointing: true}"],
    "replicas, Muon": ["parallel.shard_degree=1", "optimizer={muon_lr: 0.07, warmup_steps: 1}"],
    "replicas, Muon, zero gradients": [
        "parallel.shard_degree=1",
        "optimizer={muon_lr: 0.07, warmup_steps: 1, zero_missing_grads: true}",
    ],
    "shards in two groups": ["parallel.shard_degree=2"],
    "experts apart, replicas": [
        "parallel={shard_degree: 1, expert_degree: 2}",
        "optimizer={muon_lr: 0.07, warmup_steps: 1}",
    ],
    "experts apart, shards": ["parallel={expert_degree: 2}", "memory={chunk_size: 2, activation_checkpointing: true}"],
    "soft experts apart": ["parallel={expert_degree: 2}", "model.moe={experts: 2, layers: 1, routing: soft}"],
}


def gradients(training: Trainer) -> dict[str, Tensor]:
    """Whole, of a step of each task, by task and parameter."""
    found: dict[str, Tensor] = {}
    for loaded in make_loader(training.data, 0):
        task = loaded.visit.task
        if f"{task} loss" not in found:
            losses = training.forward(loaded)
            losses.total.backward()
            found[f"{task} loss"] = distributed.all_reduce_mean(losses.total.detach())
            found |= {f"{task} {name}": grad for name, grad in whole_gradients(training).items()}
            training.model.zero_grad()
    if training.recipe.optimizer.muon_lr:
        training.update(training.data[0])
        hidden = [full_tensor(matrix.detach()) for matrix in training.model.hidden_matrices()]
        muon = training.updater.optimizers[1]
        updates = sum(distributed.all_gather_object(sum(len(group["params"]) for group in muon.param_groups)))
        copies = training.recipe.parallel.shard_degree == 1
        assert updates == len(hidden) * (1 if copies else distributed.world_size())
        sums = distributed.all_gather_object(float(sum(matrix.double().sum() for matrix in hidden)))
        assert len({*sums}) == 1
        found |= {f"named {i} updated": full_tensor(w.detach()) for i, w in enumerate(training.model.hidden_matrices())}
    return found


def whole_gradients(training: Trainer) -> dict[str, Tensor]:
    """Of all processes; of one copy, each has those of its share."""
    found = {
        name: full_tensor(parameter.grad).clone()
        for name, parameter in training.model.named_parameters()
        if parameter.grad is not None
    }
    return found


def write_gradients(folder: Path, out: Path) -> None:
    """Of all cases, a file each, by the first process."""
    for name, changes in CASES.items():
        training = Trainer(
            Recipe.load(folder / "recipe.yaml", [*COMMON, "evaluation={}", *changes]), out / f"run {name}", False
        )
        found = gradients(training)
        if distributed.rank() == 0:
            save_file(found, out / f"{name}.safetensors")


def signalled(torchrun: subprocess.Popen[str], at: str, number: signal.Signals) -> list[str]:
    """All lines that torchrun's processes print, of which the last one gets a signal when a line begins with `at`."""
    assert torchrun.stdout is not None
    lines: list[str] = []
    for line in torchrun.stdout:
        if line.startswith(at) and not any(before.startswith(at) for before in lines):
            children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
            os.kill(int(children[-1]), number)
        lines.append(line)
    return lines


@pytest.fixture(scope="module")
def alone(little_data, tmp_path_factory) -> Path:
    """The gradients of one process."""
    out = tmp_path_factory.mktemp("alone")
    write_gradients(little_data, out)
    return out


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_have_the_gradients_of_one(little_data, alone, tmp_path, processes):
    command = torchrun(processes, __file__, little_data, tmp_path)
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    for name in CASES:
        expected, found = (load_file(folder / f"{name}.safetensors") for folder in (alone, tmp_path))
        assert found.keys() == expected.keys()
        assert len({key.split()[0] for key in found}) == 2
        for key, value in expected.items():
            if key.endswith("updated"):  # Orthogonal in bf16: each number may differ by more, all together by little.
                assert (found[key] - value).norm() < 0.02 * value.norm(), f"{name}, {key}"
                continue
            torch.testing.assert_close(
                found[key].view_as(value),
                value,
                rtol=1e-5 if key.endswith("loss") else 1e-4,
                atol=1e-6,
                msg=lambda m, k=f"{name}, {key}": f"{k}: {m}",
            )


def test_a_training_of_two_processes_goes_on_in_one_and_in_four(little_data, tmp_path):
    """The two have one copy of the model; a signal to one of them stops both after the same step."""
    command = ["-m", "openimp", "train", little_data / "recipe.yaml"]
    for change in COMMON:
        command += ["--set", change]
    one, two, four = (tmp_path / name for name in ("one", "two", "four"))
    subprocess.run([sys.executable, *command, "--run", one], check=True, capture_output=True, timeout=300)

    copied = torchrun(2, *command, "--set", "parallel.shard_degree=1", "--run-dir", two)
    started = subprocess.Popen(copied, stdout=subprocess.PIPE, text=True)
    *_, last = signalled(started, "step 6/24", signal.SIGTERM)
    assert started.wait(timeout=300) == 0
    assert last.startswith("stopped at step"), last
    (saved,) = [path.name for path in (two / "checkpoints").iterdir() if path.name > "step-00000005"]
    assert saved < "step-00000024"

    subprocess.run(["cp", "-r", two, four], check=True)
    subprocess.run([sys.executable, *command, "--run", two, "--resume"], check=True, capture_output=True, timeout=300)
    # Four, of which one is killed; torchrun starts all again, and they go on from step 15.
    # They hold the model otherwise than the two did.
    changed = ["--set", "parallel={shard_degree: 2, expert_degree: 2}"]
    resumed = torchrun(4, *command, *changed, "--run-dir", four, "--resume", "auto", restarts=1)
    restarted = subprocess.Popen(resumed, stdout=subprocess.PIPE, text=True)
    steps = [line.split()[1] for line in signalled(restarted, "step 17/24", signal.SIGKILL) if line.startswith("step ")]
    assert restarted.wait(timeout=300) == 0
    assert steps[-1] == "24/24"
    assert steps.count("17/24") == 2

    lines = read_lines(one / "metrics.jsonl")
    for run in (two, four):
        for file in ("model", "ema"):
            expected, found = (dcp.read(r / "checkpoints" / "step-00000024" / file) for r in (one, run))
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert (found[name] - value).norm() <= 2e-3 * value.norm() + 1e-4, f"{file}, {name}"
        for line, other in zip(lines, read_lines(run / "metrics.jsonl"), strict=True):
            assert [*line["tasks"]] == [*other["tasks"]]
            for task, figures in line["tasks"].items():
                assert other["tasks"][task] == pytest.approx(figures, rel=1e-3)
            assert line["totals"] == other["totals"]
            assert line["samples"] == other["samples"]
        (first, *_), (same, *_) = (read_lines(folder / "results.jsonl") for folder in (one, run))
        assert same["top1"] == first["top1"]


def test_moments_that_one_of_two_processes_has_are_saved_and_go_on_in_one(little_data, tmp_path):
    run, changes = tmp_path / "run", [*COMMON, "evaluation={}", "train.steps=4", "optimizer.muon_lr=1e-2"]
    command = [
        "-m",
        "openimp",
        "train",
        little_data / "recipe.yaml",
        "--run-dir",
        run,
        "--set",
        "parallel.shard_degree=1",
    ]
    for change in changes:
        command += ["--set", change]
    subprocess.run(torchrun(2, *command), check=True, capture_output=True, timeout=300)
    saved = [load_file(file) for file in sorted((run / "checkpoints" / "step-00000004" / "optimizer").iterdir())]
    training = Trainer(Recipe.load(little_data / "recipe.yaml", changes), run, resume=True)
    moments = optimizer_state(training.model, training.updater.optimizers)
    assert len(saved) == 2
    assert {name.rpartition("|")[2] for name in moments} == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    for kind in ("momentum_buffer", "exp_avg"):
        assert all(any(name.endswith(f"|{kind}") for name in part) for part in saved)
    assert sum(map(len, saved)) == len(moments)
    for name, moment in moments.items():
        (part,) = (part for part in saved if name in part)
        assert torch.equal(moment, part[name])
        assert moment.any(), name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["tasks.heard.batch_size=7"], "tasks.heard: batch_size 7 is not a multiple of 2 ranks"),
        (
            ["model.moe.experts=4", "parallel.expert_degree=4"],
            "parallel.expert_degree: the 2 ranks that share a replica cannot be divided into groups of 4",
        ),
        (
            ["parallel={expert_degree: 2}", "model.mlp_dim=63"],
            "parallel: an expert's weights cannot be sharded over 2 ranks",
        ),
    ],
)
def test_what_cannot_be_divided_is_told(little_data, tmp_path, changes, told):
    processes = 4 if "model.mlp_dim=63" in changes else 2
    command = ["-m", "openimp", "train", little_data / "recipe.yaml"]
    for change in [*COMMON, *changes]:
        command += ["--set", change]
    done = subprocess.run(torchrun(processes, *command, "--run-dir", tmp_path / "run"), capture_output=True, text=True)
    assert done.returncode
    assert told in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there_already_is_refused_however_often_torchrun_starts(little_data, tmp_path):
    command, run = (
        ["-m", "openimp", "train", little_data / "recipe.yaml", "--run-dir", tmp_path / "run"],
        tmp_path / "run",
    )
    for change in [*COMMON, "evaluation={}", "train.steps=4"]:
        command += ["--set", change]
    subprocess.run(torchrun(2, *command), check=True, capture_output=True, timeout=300)
    shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = subprocess.run(torchrun(2, *command, restarts=1), capture_output=True, text=True, timeout=300)
    assert done.returncode
    assert done.stderr.count(f"openimp: {run}: holds a run that saved no checkpoint") >= 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_evaluation_that_fails_in_the_first_process_ends_all_and_loses_no_step(own_data, tmp_path):
    """Its data is spoilt after the start, which looks at the source but reads no file of it."""
    shutil.copytree(own_data / "pictures", own_data / "others")
    command = ["-m", "openimp", "train", own_data / "recipe.yaml"]
    for change in [*COMMON, "sources.others={path: others}", "evaluation.sets.colours.source=others"]:
        command += ["--set", change]
    run = tmp_path / "run"
    started = subprocess.Popen(
        torchrun(2, *command, "--run-dir", run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    assert started.stderr is not None
    for line in started.stdout:
        if line.startswith("step 2/24"):
            for file in (own_data / "others").rglob("*.png"):
                file.write_bytes(b"no picture")
    told = started.stderr.read()
    assert started.wait(timeout=300)
    assert told.count("openimp: evaluation.sets.colours") == 2
    assert "Timed out" not in told
    assert (run / "checkpoints" / "step-00000024" / "manifest.json").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    owners.BUCKET_BYTES = 2**12  # A small model's matrices then need several buckets too.
    write_gradients(Path(sys.argv[1]), Path(sys.argv[2]))
    distributed.shut_down()
