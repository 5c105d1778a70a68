"""Embedding on a real Ray cluster of two workers on this machine."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import openimp
from openimp.common.errors import UserError
from openimp.inference.embed import Embedded, embed
from openimp.inference.parts import Parts
from openimp.inference.ray import _PartEncoder, cluster, embed_dataset, embed_with_ray

if find_spec("ray") is None:
    pytest.skip("Ray is not installed", allow_module_level=True)
# Ray is not imported here: `cluster` sets it up before it is first imported.

STORE = '''
import os
import signal

from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


class Store(DirFileSystem):
    """An object store whose objects are files in the folder $STORE. Whoever opens DEADLY.png is killed."""

    protocol = "store"

    def __init__(self, **options):
        super().__init__(os.environ["STORE"], LocalFileSystem(auto_mkdir=True), **options)

    def open(self, path, *arguments, **options):
        if path.endswith("DEADLY.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(path, *arguments, **options)
'''


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the objects below store://, a file system of an installed package."""
    folder, packages = tmp_path_factory.mktemp("objects"), tmp_path_factory.mktemp("packages")
    (packages / "kept_store.py").write_text(STORE, encoding="utf-8")
    info = packages / "kept_store-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kept-store\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[fsspec.specs]\nstore = kept_store:Store\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(packages)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(packages), os.environ["PYTHONPATH"]]))
        patch.setenv("STORE", str(folder))
        fsspec.register_implementation("store", "kept_store.Store", clobber=True)
        yield folder


@pytest.fixture(scope="module", autouse=True)
def ray(store):
    """A cluster of two CPUs."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # The paths of its sockets would be too long in pytest's folder.
        patch.setenv("RAY_TMPDIR", stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True)))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        for attempts_left in (2, 1, 0):
            try:
                ray = stack.enter_context(cluster(2))
                break
            except UserError:  # On a busy machine, Ray may take longer than the 30 s that it allows itself.
                if not attempts_left:
                    raise
        yield ray


@pytest.fixture
def media(media_folder, tmp_path) -> Path:
    """Media of each modality, three of them unreadable, and a file of an unknown type."""
    top = Path(shutil.copytree(media_folder, tmp_path / "in"))
    (top / "1 broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    (top / "broken.txt").write_bytes(b"\xff\xfe\xfa")
    (top / "notes.docx").write_bytes(b"PK")
    shutil.copy(top / "0.png", os.fsencode(top) + b"/\xff.png")
    return top


def assert_equal(found: Embedded, wanted: Embedded) -> None:
    """The same rows in the same order, bit for bit, and the same errors."""
    assert pq.read_table(f"{found.out}/vectors").equals(pq.read_table(wanted.out))
    assert (found.rows, found.skipped, found.unknown) == (wanted.rows, wanted.skipped, wanted.unknown)
    errors = pq.read_table(f"{found.out}/errors").to_pylist()
    assert [f"{row['path']}: {row['error']}" for row in errors] == wanted.skipped


def children() -> dict[int, bytes]:
    """The processes that this one started, and those that they started, with their command lines."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # The process has ended.
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])

    def is_ours(process: int) -> bool:
        return process == os.getpid() or (process in parents and is_ours(parents[process]))

    return {process: names[process] for process, parent in parents.items() if is_ours(parent)}


def kill_a_worker() -> None:
    os.kill(min(process for process, name in children().items() if name.startswith(b"ray::MapWorker")), signal.SIGKILL)


def test_a_cluster_on_this_machine_listens_on_the_loopback_address_only():
    inodes = set()
    for process in children():
        with suppress(OSError):  # It has ended.
            inodes |= {os.readlink(file) for file in Path(f"/proc/{process}/fd").iterdir()}
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in inodes:
                addresses.append(local.partition(":")[0])
    assert addresses
    # 127.0.0.1, in IPv4 and in IPv6, as the kernel writes it.
    assert {*addresses} <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_a_cluster_on_this_machine_accepts_nobody_without_its_token(ray):
    code = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR'); print(ray.cluster_resources())"
    command = [sys.executable, "-c", code, ray.get_runtime_context().gcs_address]
    env = {**os.environ, "RAY_gcs_server_port_wait_time_s": "1"}
    assert "'CPU': 2.0" in subprocess.run(command, env=env, capture_output=True, text=True).stdout
    other = subprocess.run(command, env={**env, "RAY_AUTH_TOKEN": "0" * 64}, capture_output=True, text=True)
    assert other.returncode
    assert "CPU" not in other.stdout


def test_the_tables_equal_those_of_one_process(tiny_model_folder, media, tmp_path, capsys):
    one = embed(tiny_model_folder, [media], tmp_path / "one.parquet", batch_size=2)
    capsys.readouterr()
    done = embed_with_ray(tiny_model_folder, [media], tmp_path / "out", batch_size=2)
    assert done.rows == {"image": 3, "text": 3, "video": 3, "audio": 3}
    assert len(done.skipped) == 3
    assert_equal(done, one)
    assert "12 embeddings (3 video, 3 image, 3 text, 3 audio)" in capsys.readouterr().out


def test_a_killed_worker_costs_no_row(tiny_model_folder, media, tmp_path):
    def killing(items, name):
        for number, item in enumerate(items):
            if number == 1:
                kill_a_worker()
            yield item

    one = embed(tiny_model_folder, [media], tmp_path / "one.parquet", batch_size=1)
    done = embed_with_ray(tiny_model_folder, [media], tmp_path / "out", batch_size=1, progress=killing)
    paths = pq.read_table(f"{done.out}/vectors")["path"].to_pylist()
    assert len(paths) == len({*paths}) == 12
    assert_equal(done, one)


def test_an_interrupted_call_is_resumed_by_the_same_call_only(tiny_model_folder, media, tmp_path):
    def interrupted(items, name):
        yield items[0]
        yield items[1]
        raise KeyboardInterrupt

    def parts() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "vectors").glob("*.parquet")}

    one = embed(tiny_model_folder, [media], tmp_path / "one.parquet", batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        embed_with_ray(tiny_model_folder, [media], tmp_path / "out", batch_size=1, progress=interrupted)
    begun = parts()
    assert begun
    with pytest.raises(UserError, match="out: was begun with other files, another model or other options"):
        embed_with_ray(tiny_model_folder, [media / "0.png"], tmp_path / "out", batch_size=1)
    with pytest.raises(UserError, match="out: was begun with other files, another model or other options"):
        embed_with_ray(tiny_model_folder, [media], tmp_path / "out", batch_size=2)
    assert_equal(embed_with_ray(tiny_model_folder, [media], tmp_path / "out", batch_size=1), one)
    assert begun.items() <= parts().items()
    with pytest.raises(UserError, match="in: expected a new or empty folder"):
        embed_with_ray(tiny_model_folder, [media], media)


def test_files_and_parts_may_be_in_an_object_store(tiny_model_folder, media_folder, store, tmp_path):
    shutil.copytree(media_folder, store / "photos")
    (store / "photos" / "broken.png").write_bytes(b"no picture")
    one = embed(tiny_model_folder, [media_folder], tmp_path / "one.parquet")
    done = embed_with_ray(tiny_model_folder, ["store://photos", "store://photos/0.png"], "store://out/deep")
    assert [file.partition(": ")[0] for file in done.skipped] == ["store://photos/broken.png"]
    found = pq.read_table(store / "out" / "deep" / "vectors")
    assert found["path"].to_pylist() == [
        path.replace(str(media_folder), "store://photos") for path in pq.read_table(one.out)["path"].to_pylist()
    ]
    assert found["embedding"].equals(pq.read_table(one.out)["embedding"])
    again = embed(tiny_model_folder, ["store://photos"], tmp_path / "again.parquet")
    assert again.skipped == done.skipped
    assert pq.read_table(again.out).equals(found)
    with pytest.raises(UserError, match="store://nothing: no such file or folder"):
        embed_with_ray(tiny_model_folder, ["store://nothing"], "store://out/deep")


def test_a_file_that_kills_each_worker_ends_the_call(tiny_model_folder, media_folder, store, tmp_path):
    (store / "deadly").mkdir()
    shutil.copy(media_folder / "0.png", store / "deadly" / "DEADLY.png")
    with pytest.raises(UserError, match="workers died 4 times at the same part"):
        embed_with_ray(tiny_model_folder, ["store://deadly"], tmp_path / "out")


def test_a_worker_refuses_other_weights(tiny_model_folder, media_folder, tmp_path):
    """They may change during a call, for example if the model is still being trained."""
    Parts(str(tmp_path / "out")).prepare({"image": [media_folder / "0.png"]}, {"image": "text"}, "other weights", 1, 1)
    worker = _PartEncoder(str(tmp_path / "out"), str(tiny_model_folder), ".", 1)
    with pytest.raises(UserError, match="its weights are not those with which the embedding was begun"):
        worker({"item": np.array([0])})


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


def test_the_command_connects_to_the_cluster_that_a_variable_names(ray, tiny_model_folder, media_folder, tmp_path):
    address = ray.get_runtime_context().gcs_address

    def embed_at(address: str) -> subprocess.CompletedProcess[str]:
        """As users start it, because Ray starts processes of its own."""
        command = [sys.executable, "-m", "openimp", "embed", tiny_model_folder, media_folder, "--ray"]
        changed = {**os.environ, "RAY_ADDRESS": address, "RAY_gcs_server_port_wait_time_s": "1"}
        return subprocess.run(command, cwd=tmp_path, env=changed, capture_output=True, text=True, timeout=300)

    done = embed_at(address)
    assert done.returncode == 0, done.stderr
    assert "embeddings: 12 embeddings (3 video, 3 image, 3 text, 3 audio)" in done.stdout
    assert pq.read_table(tmp_path / "embeddings" / "vectors").num_rows == 12
    assert "Traceback" not in done.stderr
    failed = embed_at("127.0.0.1:1")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("openimp: RAY_ADDRESS=127.0.0.1:1: ")  # Ray logs before it.
