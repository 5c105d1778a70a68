"""Writes the model that comes with openimp, `openimp:base`, from a finished run of recipes/base.yaml.

    openimp train base
    python tools/write_base_model.py runs/base

The weights are stored in fp16, which halves the size of the package.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from openimp.checkpoint.find import BUNDLED_MODELS
from openimp.inference.model import load
from openimp.inference.publish import write

FOLDER = BUNDLED_MODELS / "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    model = load(parser.parse_args().run, "cpu")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    write(model, "openimp:base", "apache-2.0", FOLDER)
    (weights,) = (FOLDER / "model").glob("*.safetensors")
    halved = {name: tensor.to(torch.float16) for name, tensor in load_file(weights).items()}
    save_file(halved, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    for notice in FOLDER.glob("NOTICE*"):
        notice.unlink()  # The package has them beside the data.


if __name__ == "__main__":
    main()
