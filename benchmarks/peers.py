"""Compares openimp on recognised data with what people would use instead, at equal time on equal cores.

    pip install -e '.[bench,peers]' pandas lightly-train   # lightly-train is optional; its license is the AGPL
    python -m benchmarks.peers photos cifar10-train.parquet cifar10-test.parquet --write
    python -m benchmarks.peers speech fsdd.parquet --minutes 3 --write
    python -m benchmarks.peers drafts cifar10-train.parquet cifar10-test.parquet fsdd.parquet --write
    python -m benchmarks.peers photos TRAIN TEST --minutes 5 --tune        # chooses learning rates on held-out rows

All arms train on the same rows with one thread each. An arm first makes a few steps, which tell its CPU time per step.
Then it makes as many steps as fit into the budget, so that its learning rate schedule ends with the budget. CPU time
includes that of the workers that read data; other load on the machine does not count. The budget is for the steps
alone, not for opening the data and the test. All arms are trained with seed 0, then all with seed 1, and so on.

The arms of photos are the recipe photos_and_speech with its task `photos` alone; the same with one option changed; a
ViT of timm of the same size, with AdamW; and the training programs of lightly-train and open_clip. The arms of speech
are the recipe with its task `digits` alone, and a convolutional network: on the official split, and with each speaker
held out. The arms of drafts are these two tasks of the recipe, and the recipes that `openimp init` drafts for the data.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import yaml

from benchmarks import results_page
from openimp.common.errors import counted
from openimp.common.progress import console
from openimp.evaluation.results import main_metric, read_results

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "photos_and_speech.yaml"
TITLES = {
    "photos": "CIFAR-10, compared with peers at equal time",
    "speech": "Spoken digits, compared with a peer",
    "drafts": "Recipes that openimp init drafts, compared with a recipe by hand at equal time",
}
INTRODUCTIONS = {
    "photos": """\
The first row is the recipe `photos_and_speech` with its task `photos` alone. The predicted class is the name with the
nearest embedding; without texts, the classification head tells it. In each of the next rows, up to `classification loss
alone`, one option is changed, or four. The last rows are other training programs, with a ViT of the same size as
openimp's. The learning rates of openimp, of AdamW and of the other programs are the best of two or three candidates in
trainings of 1.5 minutes on nine tenths of the training rows, measured on the rest (`--tune`). open_clip's loss takes
other pictures of a batch with the same text as negatives; openimp's does not (`positives_by`).""",
    "speech": """\
openimp is the recipe `photos_and_speech` with its task `digits` alone. The predicted digit is the name with the nearest
embedding. The peer is a convolutional network on log-mel spectrograms. In the official split, the speakers of the test
are those of the training. `without george`: trained on the other five speakers, and tested on recordings of george. The
recipe's options for sounds were chosen by trainings without george, jackson, lucas and nicolas, with seed 0.""",
    "drafts": """\
The photographs are CIFAR-10, and the digits the official split of the spoken digits. The recipe by hand is
`photos_and_speech` with one of its tasks. The drafted recipe is what `openimp init` writes for the training rows. The
predicted class is the name with the nearest embedding.""",
}
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
MUON_RATES = (4e-3, 8e-3)  # candidates of --tune, as are the next ones
ADAMW_RATES = (3e-4, 1e-3, 3e-3)
CNN_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
LIGHTLY_RATES = (1e-4, 3.5e-4, 1e-3)  # lightly-train multiplies them by sqrt(batch size / 16)
# The best of `photos --tune --minutes 1.5 --seeds 1`. The lowest candidates were added after that.
ADAMW_LR = 1e-3
TIMM_LR = 1e-3
TIMM_STRONG_LR = 1e-3
LIGHTLY_LR = 3.5e-4
OPEN_CLIP_LR = 1e-3
CNN_LR = 2e-3  # of `speech --tune --minutes 1 --seeds 1`, in which the three highest candidates were equal
PILOT_STEPS = 100
"""Steps that tell the CPU time per step."""


@dataclass(frozen=True)
class Arm:
    """A way to train a model.

    Attributes:
        command: of a training: the number of steps, the seed and a folder for its files.
        top1: the accuracy on the test rows, from that folder.
    """

    name: str
    command: Callable[[int, int, Path], list[str]]
    top1: Callable[[Path], float]

    @property
    def method(self) -> str:
        """The name before the semicolon. Arms of the same method take the same time per step."""
        return self.name.split("; ")[0]


@dataclass
class Measured:
    """The trainings of an arm, one per seed."""

    steps: int
    top1: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of CPU time, with reading the data and the test


def openimp_arm(name: str, recipe: Path, changes: list[str], evaluation_set: str) -> Arm:
    """A training by `openimp train`, and the accuracy on an evaluation set of its recipe."""

    def command(steps: int, seed: int, folder: Path) -> list[str]:
        settings = [*changes, f"train.steps={steps}", f"seed={seed}", "train.save_every=100000"]
        settings.append("evaluation.every=null")  # Drafts evaluate during training as well.
        flags = [part for setting in settings for part in ("--set", setting)]
        return [sys.executable, "-m", "openimp", "train", str(recipe), "--run", str(folder / "run"), *flags]

    def top1(folder: Path) -> float:
        results = read_results(folder / "run" / "results.jsonl")
        return float(next(main_metric(result) for result in results if result["set"] == evaluation_set))

    return Arm(name, command, top1)


def drafted_arm(name: str, train: dict[str, Any], test: dict[str, Any], file: Path) -> Arm:
    """A training of the recipe that `openimp init` drafts for the file of training rows. `file`: where to write it."""
    command = [sys.executable, "-m", "openimp", "init", train["path"]]
    draft = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    recipe = yaml.safe_load(draft.stdout)
    (source,) = recipe["tasks"]
    recipe["sources"] = {source: {**train, "cache": "memory"}, f"{source}_test": test}
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return openimp_arm(name, file, [], evaluation_set=source)


def peer_arm(name: str, kind: str, options: dict[str, Any]) -> Arm:
    """A training by benchmarks/peer_models.py."""

    def command(steps: int, seed: int, folder: Path) -> list[str]:
        file = folder / "options.json"
        file.write_text(json.dumps({**options, "steps": steps, "seed": seed}), encoding="utf-8")
        return [sys.executable, "-m", "benchmarks.peer_models", kind, str(file), str(folder / "result.json")]

    def top1(folder: Path) -> float:
        return float(json.loads((folder / "result.json").read_text(encoding="utf-8"))["top1"])

    return Arm(name, command, top1)


def cpu_seconds(command: list[str]) -> float:
    """Runs a command with one thread, and returns the CPU time of its process and of those that it started."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with TemporaryFile() as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        # Not `process.wait()`, which does not tell the time of a single child.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{output.read().decode()[-3000:]}")
    return usage.ru_utime + usage.ru_stime


def steps_within(arm: Arm, seconds: float) -> int:
    """The steps of an arm that take this much CPU time, by two short trainings.

    Their difference leaves out what does not depend on the steps: reading the data, and the test.
    """
    times = []
    for steps in (PILOT_STEPS, 3 * PILOT_STEPS):
        with TemporaryDirectory() as folder:
            times.append(cpu_seconds(arm.command(steps, 0, Path(folder))))
    return max(1, round(seconds * 2 * PILOT_STEPS / (times[1] - times[0])))


def measure(arms: list[Arm], seeds: int, seconds: float, jobs: int, smoke: bool) -> dict[str, Measured]:
    """Trains each arm with each seed, in `jobs` processes at once. All arms have a turn before the next seed.

    With `smoke`, a training is a single step.
    """

    def count_steps(arm: Arm) -> int:
        steps = 1 if smoke else steps_within(arm, seconds)
        console.print(f"{arm.method}: {counted(steps, 'step')}", soft_wrap=True)
        return steps

    def train(turn: tuple[int, Arm]) -> None:
        seed, arm = turn
        results = measured[arm.name]
        with TemporaryDirectory() as folder:
            taken = cpu_seconds(arm.command(results.steps, seed, Path(folder)))
            top1 = arm.top1(Path(folder))
        results.top1.append(top1)
        results.seconds.append(taken)
        console.print(f"{arm.name}, seed {seed}: {100 * top1:.1f} % in {taken:.0f} s of CPU time", soft_wrap=True)

    with ThreadPoolExecutor(jobs) as pool:
        methods = {arm.method: arm for arm in arms}
        steps = dict(zip(methods, pool.map(count_steps, methods.values())))
        measured = {arm.name: Measured(steps[arm.method]) for arm in arms}
        list(pool.map(train, [(seed, arm) for seed in range(seeds) for arm in arms]))
    return measured


def write_recipe(task: str, sources: dict[str, dict[str, Any]], file: Path, objective: str | None = None) -> Path:
    """Writes the recipe photos_and_speech with a single task and local sources, which name classes in column `name`.

    With `objective`, the task keeps only this objective, and the evaluation sets that need no other.
    """
    text = RECIPE.read_text(encoding="utf-8").replace(": label", ": name").replace("{label}", "{name}")
    recipe = yaml.safe_load(text)
    kept = recipe["tasks"][task]
    sets = {name: recipe["evaluation"]["sets"][name] for name in (task, f"{task}_classes")}
    if objective is not None:
        kept["objectives"] = [options for options in kept["objectives"] if options["type"] == objective]
        del sets[f"{task}_classes" if objective == "contrastive" else task]
    stems: tuple[str, ...] = ("text", "vision" if task == "photos" else "audio")
    if objective == "classification":
        stems = stems[1:]
        for part in (kept["inputs"], *kept["views"]):
            del part["text"]
    # The recipe's lower momentum was chosen for its three tasks together. The published figures are of the default.
    del recipe["optimizer"]["muon_momentum"]
    recipe["tasks"] = {task: kept}
    recipe["sources"] = sources
    recipe["evaluation"]["sets"] = sets
    recipe["modalities"] = {stem: recipe["modalities"][stem] for stem in stems}
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


def photo_arms(train: dict[str, Any], test: dict[str, Any], folder: Path, tune: bool) -> list[Arm]:
    """openimp, openimp with one thing changed, and peers. `tune`: candidates for learning rates instead."""
    sources = {"photos": {**train, "cache": "memory"}, "photos_test": test}
    recipe = write_recipe("photos", sources, folder / "photos.yaml")
    contrastive = write_recipe("photos", sources, folder / "contrastive.yaml", "contrastive")
    classes = write_recipe("photos", sources, folder / "classes.yaml", "classification")
    model = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["model"]
    sizes = {key: model[key] for key in ("width", "layers", "heads")}
    options = {"train": train, "test": test, "media": "img", "label": "name", **sizes}

    def ours(name: str, *changes: str) -> Arm:
        return openimp_arm(name, recipe, list(changes), "photos")

    def timm(name: str, lr: float, strong: bool) -> Arm:
        return peer_arm(name, "timm", {**options, "lr": lr, "strong": strong})

    def lightly(name: str, lr: float) -> Arm:
        return peer_arm(name, "lightly", {**options, "lr": lr})

    has_lightly = find_spec("lightly_train") is not None

    if tune:
        return [
            *(ours(f"openimp; lr {lr}", f"optimizer.muon_lr={lr}", f"optimizer.lr={lr / 4}") for lr in MUON_RATES),
            *(ours(f"AdamW; lr {lr}", "optimizer.muon_lr=null", f"optimizer.lr={lr}") for lr in ADAMW_RATES),
            *(timm(f"timm, light augmentation; lr {lr}", lr, False) for lr in ADAMW_RATES),
            *(timm(f"timm, its usual augmentation; lr {lr}", lr, True) for lr in ADAMW_RATES),
            *(lightly(f"lightly-train; lr {lr}", lr) for lr in LIGHTLY_RATES if has_lightly),
            *(peer_arm(f"open_clip; lr {lr}", "open_clip", {**options, "lr": lr}) for lr in ADAMW_RATES),
        ]
    adamw = ["optimizer.muon_lr=null", f"optimizer.lr={ADAMW_LR}"]
    random_attention = "model.attention_init=release"
    no_convolution = "modalities.vision.conv_channels=0"
    all_tokens = "tasks.photos.views.0.image.drop_tokens=0"
    return [
        ours("openimp, by the names of the classes"),
        ours("AdamW instead of Muon", *adamw),
        ours("random instead of mimetic attention", random_attention),
        ours("patches without a convolution", no_convolution),
        ours("no token dropped", all_tokens),
        ours("all four of these changes", *adamw, random_attention, no_convolution, all_tokens),
        ours("views drawn, not one after the other", "alternation.views=drawn"),
        ours("batches twice as large", "tasks.photos.batch_size=256"),
        openimp_arm("contrastive loss alone", contrastive, [], "photos"),
        openimp_arm("classification loss alone, without texts", classes, [], "photos_classes"),
        timm("timm's ViT, light augmentation", TIMM_LR, False),
        timm("timm's ViT, its usual augmentation", TIMM_STRONG_LR, True),
        *([lightly("lightly-train, a ViT of the same size", LIGHTLY_LR)] if has_lightly else []),
        peer_arm("open_clip's training code", "open_clip", {**options, "lr": OPEN_CLIP_LR}),
    ]


def speech_arms(data: str, folder: Path, tune: bool) -> list[Arm]:
    """openimp and a convolutional network, with the official split and without one of the speakers.

    `tune`: candidates for learning rates instead.
    """
    arms = []

    def network(name: str, train: dict[str, Any], test: dict[str, Any], lr: float = CNN_LR) -> Arm:
        options = {"train": train, "test": test, "media": "audio", "label": "name", "lr": lr}
        return peer_arm(f"convolutional network; {name}", "cnn", {**options, "batch_size": 64, "width": 16})

    if tune:
        rows = {"path": data, "where": {"split": ["train"]}}
        train = {**rows, "part": {"of": 10, "drop": [0]}}
        test = {**rows, "part": {"of": 10, "keep": [0]}}
        recipe = write_recipe(
            "digits", {"digits": {**train, "cache": "memory"}, "digits_test": test}, folder / "tune.yaml"
        )
        for lr in MUON_RATES:
            rates = [f"optimizer.muon_lr={lr}", f"optimizer.lr={lr / 4}"]
            arms.append(openimp_arm(f"openimp; lr {lr}", recipe, rates, "digits"))
        return [*arms, *(network(f"lr {lr}", train, test, lr) for lr in CNN_RATES)]
    for name, train_rows, test_rows in (
        ("official split", {"split": ["train"]}, {"split": ["test"]}),
        *(
            (f"without {name}", {"speaker": [x for x in SPEAKERS if x != name]}, {"speaker": [name]})
            for name in SPEAKERS
        ),
    ):
        train = {"path": data, "where": train_rows}
        test = {"path": data, "where": test_rows}
        sources = {"digits": {**train, "cache": "memory"}, "digits_test": test}
        file = folder / f"{name.replace(' ', '_')}.yaml"
        arms.append(openimp_arm(f"openimp; {name}", write_recipe("digits", sources, file), [], "digits"))
        arms.append(network(name, train, test))
    return arms


def draft_arms(photos: str, photos_test: str, digits: str, folder: Path) -> list[Arm]:
    """The recipe photos_and_speech, and drafted recipes, on the photos and on the official split of the digits."""
    arms = []
    for task, train, test in (
        ("photos", {"path": photos}, {"path": photos_test}),
        ("digits", *({"path": digits, "where": {"split": [split]}} for split in ("train", "test"))),
    ):
        sources = {task: {**train, "cache": "memory"}, f"{task}_test": test}
        recipe = write_recipe(task, sources, folder / f"{task}.yaml")
        arms.append(openimp_arm(f"{task}, recipe by hand", recipe, [], task))
        arms.append(drafted_arm(f"{task}, drafted recipe", train, test, folder / f"{task}_draft.yaml"))
    return arms


def _percent(top1: list[float]) -> str:
    """The mean over the seeds, and its standard deviation if there are several."""
    spread = f" ± {100 * statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
    return f"{100 * statistics.mean(top1):.1f}{spread}"


def report(measured: dict[str, Measured], args: argparse.Namespace) -> str:
    """The results as a page."""
    rows = [["training", "top-1", "steps", "CPU minutes"]]
    held_out: dict[str, list[list[float]]] = {}
    for name, arm in measured.items():
        minutes = statistics.mean(arm.seconds) / 60
        rows.append([name, _percent(arm.top1), f"{arm.steps:,}", f"{minutes:.1f}"])
        method, _, test = name.partition("; ")
        if test.startswith("without "):
            held_out.setdefault(method, []).append(arm.top1)
    for method, top1_of_speakers in held_out.items():
        means = [statistics.mean(top1) for top1 in zip(*top1_of_speakers)]  # over the speakers, per seed
        rows.append([f"{method}; mean over the held-out speakers", _percent(means), "", ""])
    seeds = "one seed" if args.seeds == 1 else f"mean and standard deviation over {args.seeds} seeds"
    return f"""{results_page.head(TITLES[args.data], "torch", "timm", "open_clip_torch")}
{INTRODUCTIONS[args.data]}

{results_page.table(*rows)}
Accuracy in percent: {seeds}. The steps have a budget of {args.minutes:g} CPU minutes; the column also counts reading
the data and the test. Each training has one thread.
"""


def main() -> None:
    parser = results_page.make_parser(__doc__)
    parser.add_argument("data", choices=list(TITLES))
    parser.add_argument("files", nargs="+", help="cifar10-train.parquet cifar10-test.parquet, fsdd.parquet, or all")
    parser.add_argument("--minutes", type=float, default=10.0, help="CPU time of each training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, each with one thread")
    parser.add_argument("--smoke", action="store_true", help="train for one step, to check that the benchmark runs")
    parser.add_argument(
        "--only", nargs="*", metavar="TEXT", help="train the arms whose names contain one of these texts"
    )
    parser.add_argument(
        "--tune", action="store_true", help="train on nine tenths of the training rows, and test on the rest"
    )
    args = results_page.parse(parser)
    files = [str(Path(file).resolve()) for file in args.files]
    with TemporaryDirectory() as folder:
        if args.data == "speech":
            arms = speech_arms(files[0], Path(folder), args.tune)
        elif args.data == "drafts":
            arms = draft_arms(*files, Path(folder))
        elif args.tune:
            train = {"path": files[0], "part": {"of": 10, "drop": [0]}}
            test = {"path": files[0], "part": {"of": 10, "keep": [0]}}
            arms = photo_arms(train, test, Path(folder), tune=True)
        else:
            arms = photo_arms({"path": files[0]}, {"path": files[1]}, Path(folder), tune=False)
        if args.only:
            arms = [arm for arm in arms if any(word in arm.name for word in args.only)]
        measured = measure(arms, args.seeds, 60 * args.minutes, args.jobs, args.smoke)
    results_page.publish(report(measured, args), f"peers-{args.data}", args.write)


if __name__ == "__main__":
    main()
