"""recipes/public.yaml trains on small copies of its data sets, in the layouts that they have on the hub."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
from timm.models import save_for_hf

from openimp.common.json_lines import read_lines
from openimp.recipe.schema import Recipe
from openimp.training.trainer import train
from tests.little import png, write_tar
from tests.local_copies import sound


def write_pictures(folder: Path) -> None:
    """pixparse/cc12m-wds: tars of jpg, json and txt."""
    for shard in range(2):
        members = {}
        for i in range(8):
            key = f"{shard:04}{i:05}"
            about = json.dumps({"key": key, "url": "", "status": "success", "width": 60})
            members |= {f"{key}.jpg": png(i), f"{key}.json": about.encode(), f"{key}.txt": f"noise {i}".encode()}
        write_tar(folder / f"cc12m-train-{shard:04}.tar", members)


def write_rows(file: Path, **columns: list) -> None:
    """A Parquet file with eight rows, whose column `audio` `datasets` takes for sounds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({**columns, "audio": [sound(i) for i in range(8)]})
    features = datasets.Features.from_arrow_schema(table.schema).to_dict() | {"audio": {"_type": "Audio"}}
    about = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": about}), file)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Copies of the data sets, in folders of their names."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("pixparse/cc12m-wds", "OpenSound/AudioCaps", "agkphysics/AudioSet"):
        (tmp_path / name).mkdir(parents=True)
    write_pictures(tmp_path / "pixparse/cc12m-wds")
    captions = [f"a tone, number {i}" for i in range(8)]
    for split in ("train", "test"):
        write_rows(
            tmp_path / f"OpenSound/AudioCaps/data/{split}-00000-of-00001.parquet",
            audiocap_id=[*range(8)],
            youtube_id=[f"id{i}" for i in range(8)],
            start_time=[0] * 8,
            caption=captions,
        )
    labels = [["Speech"], ["Flute", "Music"], ["Music"], ["Rain"]] * 2
    write_rows(
        tmp_path / "agkphysics/AudioSet/data/bal_train/00.parquet",
        video_id=[f"id{i}" for i in range(8)],
        labels=[["/m/0"]] * 8,
        human_labels=labels,
    )
    (tmp_path / "agkphysics/AudioSet/README.md").write_text(
        "---\nconfigs:\n- config_name: balanced\n"
        "  data_files:\n  - {split: train, path: data/bal_train/*.parquet}\n---\n"
    )
    return tmp_path


def test_the_public_recipe_trains_on_copies_of_its_data(hub, tmp_path):
    weights = tmp_path / "siglip"
    vit = timm.create_model("vit_base_patch16_siglip_256", embed_dim=32, depth=2, num_heads=2, img_size=32)
    save_for_hf(vit, weights, safe_serialization=True)
    shrunk = [f"sources.{name}.hub={hub / Recipe.load('public').sources[name].hub}"
              for name in ("pictures", "sounds", "labelled_sounds", "test_sounds")]  # fmt: skip
    views = {task: "[{audio: {seconds: 1.024, drop_tokens: 0.5}, text: {length: 8}}]"
             for task in ("audio_text", "audio_class")}  # fmt: skip
    views["image_text"] = "[{image: {size: 32, drop_tokens: 0.5}, text: {length: 8}}]"
    shrunk += [f"tasks.{task}.views={view}" for task, view in views.items()]
    shrunk += [f"tasks.{task}.batch_size=8" for task in views]
    shrunk += [
        "model={width: 32, layers: 2, heads: 2, mlp_dim: 128, embed_dim: 32, bias: true, gelu: erf}",
        "modalities.vision.tables=[16, 2, 2]",
        "modalities.text={vocab_size: 300}",
        "evaluation.sets.sounds.view={audio: {seconds: 1.024}, text: {length: 8}}",
        "train.num_workers=0",
        "train.compile=false",
        "train.steps=6",
        "train.log_every=6",
        "alternation.kind=cycle",
        f"train.init=timm:local-dir:{weights}",
    ]
    assert train(Recipe.load("public", shrunk), tmp_path / "run")
    (record,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert record["tasks"].keys() == {"image_text", "audio_text", "audio_class"}
    assert "audio:human_labels" in record["tasks"]["audio_class"]
    assert not (tmp_path / "run" / "skipped.jsonl").exists()
    assert {result["set"] for result in read_lines(tmp_path / "run" / "results.jsonl")} == {"sounds"}
