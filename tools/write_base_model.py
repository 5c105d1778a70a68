"""Writes the model that comes with openimp, `openimp:base`, from a finished run of recipes/base.yaml.

    openimp train base
    python -m tools.write_base_model runs/base
    python -m tools.write_base_model             # only measures openimp:base again, after a change of the code

The weights are stored in fp16, which halves the size of the package. The card has the results of these weights.
"""

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

import openimp
from openimp.checkpoint.find import BUNDLED_MODELS
from openimp.common.json_lines import read_lines
from openimp.inference.model import load
from openimp.inference.model_card import model_card
from openimp.inference.publish import write

FOLDER = BUNDLED_MODELS / "base"
CARD = FOLDER / "README.md"
LICENSE = "apache-2.0"
RESULTS, LIMITS = "## Results\n", "## Limits\n"
KNOWLEDGE = """The model knows emoji, icons and single notes of instruments, and their English names and keywords. It
knows no photographs, no scenes and no speech. It finds what it was trained on much better than new things."""


def write_model(run: Path) -> None:
    """Writes the weights in fp16, and the card."""
    model = load(run, "cpu")
    with TemporaryDirectory() as written:  # A half-written FOLDER would count as a change of openimp's version.
        write(model, "openimp:base", LICENSE, Path(written))
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(written, FOLDER)
    hours = sum(line["seconds"] for line in read_lines(run / "metrics.jsonl")) / 3600
    cores = torch.get_num_threads()
    trained = f"The model was trained with `openimp train base` in {hours:.1f} hours on {cores} cores of a CPU."
    text = CARD.read_text(encoding="utf-8")
    text = text.replace("## Limits\n", f"## Limits\n\n{KNOWLEDGE}\n").replace(
        "## Reproduction\n", f"## Reproduction\n\n{trained}"
    )
    CARD.write_text(text, encoding="utf-8")
    (weights,) = (FOLDER / "model").glob("*.safetensors")
    halved = {name: tensor.to(torch.float16) for name, tensor in load_file(weights).items()}
    save_file(halved, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    for notice in FOLDER.glob("NOTICE*"):
        notice.unlink()  # The package has them beside the data.


def write_results() -> None:
    """Measures openimp:base, and replaces the results in its card."""
    results = openimp.evaluate("openimp:base")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "base"
        shutil.copytree(FOLDER, folder)
        lines = "".join(json.dumps(result) + "\n" for result in results)
        (folder / "results.jsonl").write_text(lines, encoding="utf-8")
        measured = model_card(load(folder, "cpu"), folder, "openimp:base", LICENSE)
    before, _, rest = CARD.read_text(encoding="utf-8").partition(RESULTS)
    _, _, after = rest.partition(LIMITS)
    table = measured.partition(RESULTS)[2].partition(LIMITS)[0]
    CARD.write_text(f"{before}{RESULTS}{table}{LIMITS}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    if run := parser.parse_args().run:
        write_model(run)
    write_results()


if __name__ == "__main__":
    main()
