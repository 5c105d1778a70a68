"""Embedding on a real Ray cluster of two workers on this machine."""

from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import openimp
from openimp.inference.ray import embed_dataset

pytestmark = pytest.mark.slow
pytest.importorskip("ray.data")


@pytest.fixture(scope="module", autouse=True)
def ray():
    """A cluster of two CPUs."""
    import ray.data

    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # The paths of its sockets would be too long in pytest's folder.
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


def test_the_rows_of_a_dataset_are_embedded_once_each(ray, tiny_model_folder, media_folder, tmp_path):
    """By Ray's own checkpoints: the first attempt fails at one of the rows, and the second one does the others."""
    contents = [(media_folder / f"{i % 3}.png").read_bytes() for i in range(40)]
    contents[5] = b"no picture"
    for i in range(4):
        rows = pa.table({"id": range(10 * i, 10 * i + 10), "content": contents[10 * i : 10 * i + 10]})
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(rows, tmp_path / "in" / f"{i}.parquet")

    def attempt(fail: bool) -> None:
        def check(table: pa.Table) -> pa.Table:
            if fail and 35 in table["id"].to_pylist():
                raise RuntimeError("the first attempt fails")
            return table

        data = ray.data.read_parquet(str(tmp_path / "in"), override_num_blocks=4)
        data.context.checkpoint_config = ray.data.checkpoint.CheckpointConfig("id", str(tmp_path / "checkpoint"))
        data.context.enable_progress_bars = False
        # The worker of a failed attempt may live on, and occupies its share of the two CPUs.
        options = {"compute": ray.data.ActorPoolStrategy(size=1), "num_cpus": 0.5}
        embedded = embed_dataset(data, tiny_model_folder, "content", "image", **options)
        embedded.map_batches(check, batch_format="pyarrow").drop_columns(["content"]).write_parquet(
            str(tmp_path / "out")
        )

    with pytest.raises(Exception, match="the first attempt fails"):
        attempt(fail=True)
    attempt(fail=False)
    found = pq.read_table(tmp_path / "out").sort_by("id").to_pylist()
    assert [row["id"] for row in found] == list(range(40))
    assert [row["id"] for row in found if row["error"]] == [5]
    assert found[5]["embedding"] is None
    wanted = openimp.load(tiny_model_folder).encode_image([*contents[:5], *contents[6:]], normalize=True)
    vectors = np.array([row["embedding"] for row in found if row["embedding"]])
    assert vectors == pytest.approx(wanted.numpy(), abs=1e-2)


@pytest.mark.parametrize("kind", ["array", "path", "text"])
def test_a_dataset_has_arrays_paths_or_texts(ray, tiny_model_folder, media_folder, kind):
    model = openimp.load(tiny_model_folder)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    value = {"array": pixels, "path": str(media_folder / "0.png"), "text": "a red square"}[kind]
    modality = "text" if kind == "text" else "image"
    data = embed_dataset(ray.data.from_items([{"x": value}]), tiny_model_folder, "x", modality)
    (row,) = data.take_all()
    assert row["error"] is None
    assert row["embedding"] == pytest.approx(model.encode(modality, [value], normalize=True)[0].tolist(), abs=1e-2)
