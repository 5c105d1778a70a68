"""Heads on the vectors of two public encoders: what openimp drafts, beside ten lines of PyTorch.

    python -m benchmarks.towers [--rows 1000] [--seeds 3] [--write]    # needs '.[dev]'; 20 minutes on two cores

Two sets of bundled pictures with texts: stills (emoji by two artists) and icons. EfficientNet-Lite0 (timm) reads the
pictures, all-MiniLM-L6-v2 (sentence-transformers) the texts. Both are frozen.

- openimp: `openimp train FOLDER --tower ... --tower ...`, as it is drafted.
- Ten lines: `train_linear`, a linear layer from the pictures' vectors into the space of the texts, with all rows in
  each step. Its learning rate and number of steps are chosen on a tenth of the training rows, for each set.

Both train on the same nine tenths of the rows, and retrieve among the other tenth. A mean reciprocal rank is the mean
of both directions. Seconds are wall-clock time with one thread: of the training steps alone, and of all from the
folder to the model, in a process of its own with an empty cache.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from benchmarks.results_page import head, parse, publish, table
from openimp.common.json_lines import read_lines
from openimp.common.texts import text_key
from openimp.data.sources import open_source
from openimp.modalities.image import upright
from openimp.modalities.vision import to_rgb
from openimp.recipe.schema import Recipe
from tools.public_weights import efficientnet_lite0, minilm

DEMO = Path(__file__).parents[1] / "src" / "openimp" / "data" / "demo"
SETS = ("stills", "icons")
GRID = [(lr, steps) for lr in (1e-3, 3e-3, 1e-2) for steps in (50, 100, 200)]


def write_set(name: str, rows: int, folder: Path) -> None:
    """Writes pictures and captions.jsonl to a folder: a fixed sample of the bundled training rows."""
    folder.mkdir()
    found = [row for row in pq.read_table(DEMO / f"{name}.parquet").to_pylist() if row["split"] == "train"]
    random.Random(0).shuffle(found)
    lines = []
    for number, row in enumerate(found[:rows]):
        (folder / f"{number}.webp").write_bytes(row["image"])
        lines.append(json.dumps({"file": f"{number}.webp", "caption": row["name"]}))
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")


def rows_of(recipe: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows that a drafted recipe trains on, and those that it holds out."""
    sources = Recipe.load(recipe).sources
    (train,) = (name for name in sources if not name.endswith("_test"))
    tables = [open_source(name, sources[name]) for name in (train, f"{train}_test")]
    return tuple([{**row, "file": str(table.root / row["file"])} for row in table.iterate(["file", "caption"])]
                 for table in tables)  # fmt: skip


@torch.no_grad()
def embed(rows: list[dict[str, Any]], pictures: Path) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors of the pictures and of the texts by their libraries, and a number for each distinct text."""
    from sentence_transformers import SentenceTransformer

    model = timm.create_model(f"local-dir:{pictures}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    images = []
    for start in range(0, len(rows), 64):
        batch = []
        for row in rows[start : start + 64]:
            with upright(row["file"]) as opened:
                picture = to_rgb(opened)
                batch.append(transform(white_background(picture)))
        images.append(model(torch.stack(batch)))
    texts = SentenceTransformer(str(minilm()), device="cpu").encode(
        [row["caption"] for row in rows], convert_to_tensor=True, show_progress_bar=False
    )
    _, numbers = np.unique([text_key(row["caption"]) for row in rows], return_inverse=True)
    return torch.cat(images), F.normalize(texts, dim=-1), torch.from_numpy(numbers)


def white_background(picture: Any) -> Any:
    import PIL.Image

    if picture.mode != "RGBA":
        return picture
    background = PIL.Image.new("RGB", picture.size, "white")
    background.paste(picture, mask=picture.getchannel("A"))
    return background


def train_linear(images: Tensor, texts: Tensor, numbers: Tensor, lr: float, steps: int, seed: int) -> nn.Module:
    """The ten lines. Pictures with equal texts are positives of each other."""
    torch.manual_seed(seed)
    layer = nn.Linear(images.shape[1], texts.shape[1])
    log_temperature = nn.Parameter(torch.tensor(0.05).log())
    optimizer = torch.optim.AdamW([*layer.parameters(), log_temperature], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    positives = (numbers[:, None] == numbers).float()
    positives /= positives.sum(1, keepdim=True)
    for _ in range(steps):
        logits = F.normalize(layer(images), dim=-1) @ texts.T / log_temperature.exp()
        loss = F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return layer


@torch.no_grad()
def reciprocal_rank(layer: nn.Module, images: Tensor, texts: Tensor, numbers: Tensor) -> float:
    """The mean reciprocal rank over both directions, as openimp's retrieval counts it."""
    distinct, first = np.unique(numbers.numpy(), return_index=True)
    similarities = F.normalize(layer(images), dim=-1) @ texts[first].T  # pictures, distinct texts
    own = torch.from_numpy(np.searchsorted(distinct, numbers.numpy()))
    text_ranks = (similarities > similarities.gather(1, own[:, None])).sum(1) + 1
    is_own = own == torch.arange(len(distinct))[:, None]  # distinct texts, pictures
    best = similarities.T.masked_fill(~is_own, -2).amax(1, keepdim=True)
    picture_ranks = ((best < similarities.T) & ~is_own).sum(1) + 1
    return float((1 / text_ranks.float()).mean() + (1 / picture_ranks.float()).mean()) / 2


def ten_lines(recipe: Path, pictures: Path, seeds: int) -> dict[str, Any]:
    """Embeds, tunes and trains. Seconds from the start of the process to the first model leave out the tuning."""
    train_rows, test_rows = rows_of(recipe)
    images, texts, numbers = embed(train_rows, pictures)
    embedded = time.perf_counter()
    normalized = F.normalize(images, dim=-1) * images.shape[1] ** 0.5
    held_out = numbers % 10 == 0
    parts = [(normalized[part], texts[part], numbers[part]) for part in (~held_out, held_out)]

    def validation(choice: tuple[float, int]) -> float:
        return reciprocal_rank(train_linear(*parts[0], *choice, seed=0), *parts[1])

    lr, steps = max(GRID, key=validation)
    tuned = time.perf_counter()
    layers = [train_linear(normalized, texts, numbers, lr, steps, seed) for seed in range(seeds)]
    seconds = (time.perf_counter() - tuned) / seeds
    test_images, test_texts, test_numbers = embed(test_rows, pictures)
    test_images = F.normalize(test_images, dim=-1) * images.shape[1] ** 0.5
    ranks = [reciprocal_rank(layer, test_images, test_texts, test_numbers) for layer in layers]
    return {"ranks": ranks, "seconds": seconds, "embedded": embedded, "lr": lr, "steps": steps}


def openimp_run(folder: Path, run: Path, towers: list[str], seed: int, cache: Path) -> tuple[float, float, float]:
    """The mean reciprocal rank of a training, the seconds of its steps, and those of the whole command."""
    command = [sys.executable, "-m", "openimp", "train", str(folder), "--run-dir", str(run), "--set", f"seed={seed}"]
    for tower in towers:
        command += ["--tower", tower]
    start = time.perf_counter()
    environment = {**os.environ, "OPENIMP_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    whole = time.perf_counter() - start
    results = [*read_lines(run / "results.jsonl")]
    last_step = max(result["step"] for result in results)
    rank = mean(result["mrr"] for result in results if result["step"] == last_step)
    seconds = sum(line["seconds"] for line in read_lines(run / "metrics.jsonl"))
    return rank, seconds, whole


def ten_lines_process(recipe: Path, pictures: Path, seeds: int) -> tuple[dict[str, Any], float]:
    """`ten_lines` in a process of its own, and its seconds from the start to a trained model, without the tuning."""
    code = (
        "import json, sys, time; start = time.perf_counter(); "
        "from pathlib import Path; from benchmarks.towers import ten_lines; "
        "result = ten_lines(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])); "
        "result['embedded'] -= start; print(json.dumps(result))"
    )
    command = [sys.executable, "-c", code, str(recipe), str(pictures), str(seeds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    result = json.loads(done.stdout)
    return result, result["embedded"] + result["seconds"]


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    args = parse(parser)
    lines = [["set", "way", "MRR, mean of both directions", "seconds of the steps", "seconds from folder to model"]]
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        pictures = efficientnet_lite0(work / "efficientnet_lite0")
        towers = [f"timm:{pictures}", f"sentence_transformers:{minilm()}"]
        for name in SETS:
            write_set(name, args.rows, work / name)
            runs = [
                openimp_run(work / name, work / f"{name}-{seed}", towers, seed, work / f"cache-{name}")
                for seed in range(args.seeds)
            ]
            ranks, seconds, whole = zip(*runs)
            lines.append([name, "openimp", spread([*ranks]), f"{mean(seconds):.1f}", f"{whole[0]:.0f}"])
            result, total = ten_lines_process(work / f"{name}-0" / "recipe.yaml", pictures, args.seeds)
            method = f"ten lines (lr {result['lr']:g}, {result['steps']} steps)"
            lines.append([name, method, spread(result["ranks"]), f"{result['seconds']:.1f}", f"{total:.0f}"])
            print(yaml.safe_dump(lines[-2:]), file=sys.stderr)
    title = "Heads on public encoders: openimp beside ten lines of PyTorch"
    size = f"{args.rows} rows, {args.seeds} seeds."
    text = f"{head(title, 'torch', 'timm', 'sentence-transformers')}\n{size}\n\n{table(*lines)}"
    publish(text, "towers", args.write)


if __name__ == "__main__":
    main()
