"""An index with damaged rows: the search page answers each request with a page or one clear sentence."""

import math
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from openimp.common.safe_files import file_state
from openimp.search import build_index, open_index
from openimp.search.folder import METADATA
from openimp.search.server import create_app
from openimp.search.table import ITEMS, Items, import_lancedb
from tests.messages import refuses

pytest.importorskip("lancedb")
NAN, INFINITE = math.nan, math.inf


@pytest.fixture(scope="module")
def media(media_folder: Path, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(media_folder, tmp_path_factory.mktemp("top") / "media"))
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture(scope="module")
def index(tiny_recipe, write_tiny, media, tmp_path_factory) -> Path:
    model = write_tiny(tiny_recipe(model={"space": "joint"}), tmp_path_factory.mktemp("joint"))
    return build_index(model, [media], media.parent / "x.index").folder


@pytest.fixture
def damaged(index, tmp_path):
    """Changes the first picture, or with `all` all rows, and writes the table again."""

    def write(change: dict[str, Any] | None = None, schema: pa.Schema | None = None, all: bool = False) -> Path:
        copy = Path(shutil.copytree(index, tmp_path / "x.index"))
        database = import_lancedb().connect(copy)
        table = database.open_table(ITEMS).to_arrow()
        rows = table.to_pylist()
        rows.sort(key=lambda row: not row["path"].endswith("/0.png"))
        for row in rows if all else rows[:1]:
            row.update(change or {})
        database.drop_table(ITEMS)
        database.create_table(ITEMS, pa.Table.from_pylist(rows, schema or table.schema))
        if schema is None:
            Items(copy).compact()
        return copy

    return write


def answers(index: Path) -> dict[str, Any]:
    """The answers to requests of all kinds. The client raises what the server would answer with 500."""
    opened = open_index(index)
    client = TestClient(create_app(opened), base_url="http://127.0.0.1")
    ids = [id for id in opened.vectors()["id"].to_pylist()[:2] if id]  # Of the changed row, and of another.
    under = quote(str(index.parent))
    searches = [
        "",
        "q=a+red+square",
        "q=noise&by=words",
        "q=a+red+square&by=meaning",
        "k=100",
        f"q=red&under={under}",
        "q=red&min=0.1",
        "q=red&since=2001-01-01",
        *(f"{kind}={id}" for id in ids for kind in ("more", "less")),
    ]
    urls = [f"{path}?{search}" for search in searches for path in ("/", "/api/search")]
    urls += [f"/{kind}/{id}" for id in ids for kind in ("api/items", "media", "thumbnails")]
    found = {url: client.get(url, headers={"accept": "text/html"}) for url in urls}
    for url, answer in found.items():
        assert answer.status_code < 500, url
        assert "Traceback" not in answer.text
    return found


@pytest.mark.parametrize(
    "change",
    [
        {"id": None}, {"path": None}, {"state": None}, {"modality": None}, {"part": None}, {"parts": None},
        {"modality": "smell"}, {"modality": ""}, {"path": "/x\0.png"}, {"part": -1}, {"parts": -3},
        {"start": NAN, "end": 1.0}, {"start": -1.0, "end": 1.0}, {"start": 2.0, "end": 1.0}, {"start": 1.0},
        {"end": 1.0}, {"start": 0.0, "end": INFINITE}, {"start": 1e300, "end": 1e301}, {"start": NAN, "end": NAN},
        {"latitude": NAN}, {"longitude": -INFINITE}, {"source": "s", "row": -1, "column": "c"},
    ],
    ids=str,
)  # fmt: skip
def test_a_row_that_makes_no_sense_is_told_in_one_sentence(damaged, change):
    index = damaged(change)
    found = answers(index)
    assert found["/?k=100"].status_code == 400
    assert f"{index}: damaged: item " in found["/?k=100"].text
    assert found["/api/search?k=100"].json()["error"].endswith("; make a new index")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"path": "media/0.png"}, "is in no folder that you indexed"),
        ({"path": ""}, "is in no folder that you indexed"),
        ({"path": "/" + "x" * 5000}, "is in no folder that you indexed"),
        ({"path": "/none/0.png"}, "is in no folder that you indexed"),
        ({"state": "x"}, "is gone or has changed"),
        ({"source": "none", "row": 1, "column": "image"}, "the model&#39;s recipe has no source"),
        ({"source": "none", "row": 1}, "the model&#39;s recipe has no source"),
    ],
    ids=str,
)
def test_a_row_whose_media_cannot_be_read_is_marked(damaged, change, problem):
    found = answers(damaged(change))
    assert found["/?k=100"].status_code == 200
    assert problem in found["/?k=100"].text


@pytest.mark.parametrize("name", ["folder", "pipe"])
def test_what_is_not_a_file_is_not_served(damaged, media, name):
    """A pipe would never end."""
    path = str(media / name)
    found = answers(damaged({"path": path, "state": file_state(path)}))
    assert "is not a file" in found["/?k=100"].text


@pytest.mark.parametrize(
    "change",
    [
        {"media_type": "image/png\r\nX: y"}, {"media_type": ""}, {"text": None}, {"text": "x" * 10**6}, {"text": "\0"},
        {"date": "tomorrow"}, {"date": ""}, {"row": 3}, {"column": "c"}, {"sha256": None}, {"start": 0.5, "end": 99.0},
        {"parts": 2**62}, {"part": 2**62}, {"id": "' OR 1=1 --"}, {"id": ""}, {"folded": None}, {"id": "x/../y"},
    ],
    ids=lambda change: f"{change!r:.40}",
)  # fmt: skip
def test_odd_values_do_no_harm(damaged, change):
    assert answers(damaged(change))["/?k=100"].status_code == 200


@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE, 0.0, 65504.0])
@pytest.mark.parametrize("all", [False, True])
def test_vectors_that_are_not_finite_do_no_harm(damaged, value, all):
    """LanceDB does not write NaN, so bytes of its file are changed."""
    index = damaged()
    (file,) = (index / f"{ITEMS}.lance" / "data").iterdir()
    data = file.read_bytes()
    vectors = [np.array(vector, np.float16).tobytes() for vector in open_index(index).vectors()["vector"].to_pylist()]
    for vector in vectors if all else vectors[:1]:
        assert vector in data
        data = data.replace(vector, np.full(len(vector) // 2, value, np.float16).tobytes())
    file.write_bytes(data)
    found = answers(index)
    for url in ("/?q=a+red+square&by=meaning", "/?q=noise&by=words", "/?k=100"):
        assert found[url].status_code == 200, url


@pytest.mark.parametrize(
    ("column", "kind"),
    [("start", pa.string()), ("part", pa.string()), ("vector", pa.string()), ("state", None), ("id", None),
     ("source", None), ("media_type", pa.int64())],
)  # fmt: skip
def test_columns_of_another_type_are_refused(damaged, index, column, kind):
    schema = import_lancedb().connect(index).open_table(ITEMS).schema
    at = schema.get_field_index(column)
    other = schema.remove(at) if kind is None else schema.set(at, pa.field(column, kind))
    with refuses():
        open_index(damaged({column: None}, schema=other, all=True))


def test_an_index_with_damaged_rows_is_not_updated(damaged, index, media):
    copy = damaged({"path": None})
    with refuses():
        build_index(open_index(index)._metadata.model, [media], copy)


def test_modalities_that_the_model_does_not_have_are_refused(index, tmp_path):
    copy = Path(shutil.copytree(index, tmp_path / "x.index"))
    metadata = (copy / METADATA).read_text()
    for other in ("smell", ""):
        (copy / METADATA).write_text(metadata.replace('"audio":', f'"{other}":', 1))
        with refuses():
            open_index(copy)


@pytest.mark.parametrize("change", [{"row": "1000000"}, {"column": "'none'"}, {"column": "null"}], ids=str)
def test_a_row_of_a_source_that_does_not_exist_is_told(tiny_recipe, write_tiny, media_folder, tmp_path, change):
    data = {"image": [(media_folder / "0.png").read_bytes()], "text": ["one"]}
    pq.write_table(pa.table(data), tmp_path / "all.parquet")
    task = {"source": "all", "inputs": {"image": "image", "text": "text"}, "objectives": [{"type": "contrastive"}]}
    tasks = {"named": {**task, "views": [{"image": {"size": 32}}]}}
    recipe = tiny_recipe(folder=tmp_path, tasks=tasks, modalities={"vision": {"patch": [2, 8, 8]}})
    model = write_tiny(recipe, tmp_path / "model")
    index = build_index(model, None, tmp_path / "x.index", allow_sources=True).folder
    import_lancedb().connect(index).open_table(ITEMS).update(values_sql=change)
    opened = open_index(index, allow_sources=True)
    (hit,) = opened.sample(9)
    with refuses():
        opened.read(hit.id)
    answer = TestClient(create_app(opened), base_url="http://127.0.0.1").get(f"/media/{hit.id}")
    assert (answer.status_code, answer.text.endswith("; make a new index")) == (404, True)
