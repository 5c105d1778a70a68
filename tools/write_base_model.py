"""Writes the model that comes with openimp, `openimp:base`, from a finished run of recipes/base.yaml.

    openimp train base
    python tools/write_base_model.py runs/base

The weights are stored in fp16, which halves the size of the package.
"""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from openimp.checkpoint.find import BUNDLED_MODELS
from openimp.common.json_lines import read_lines
from openimp.inference.model import load
from openimp.inference.publish import write

FOLDER = BUNDLED_MODELS / "base"
KNOWLEDGE = """The model knows emoji, icons and single notes of instruments, and their English names and keywords. It
knows no photographs, no scenes and no speech. It finds what it was trained on much better than new things."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    model = load(run, "cpu")
    with TemporaryDirectory() as written:  # A half-written FOLDER would count as a change of openimp's version.
        write(model, "openimp:base", "apache-2.0", Path(written))
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(written, FOLDER)
    hours = sum(line["seconds"] for line in read_lines(run / "metrics.jsonl")) / 3600
    cores = torch.get_num_threads()
    trained = f"The model was trained with `openimp train base` in {hours:.1f} hours on {cores} cores of a CPU."
    card = FOLDER / "README.md"
    text = card.read_text(encoding="utf-8")
    text = text.replace("## Limits\n", f"## Limits\n\n{KNOWLEDGE}\n").replace(
        "## Reproduction\n", f"## Reproduction\n\n{trained}"
    )
    card.write_text(text, encoding="utf-8")
    (weights,) = (FOLDER / "model").glob("*.safetensors")
    halved = {name: tensor.to(torch.float16) for name, tensor in load_file(weights).items()}
    save_file(halved, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    for notice in FOLDER.glob("NOTICE*"):
        notice.unlink()  # The package has them beside the data.


if __name__ == "__main__":
    main()
