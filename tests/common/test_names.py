"""Names of models and data."""

import pytest

from openimp.common.names import Name, absolute_name
from openimp.recipe.tasks import Source


@pytest.mark.parametrize(
    ("name", "scheme", "rest", "folder"),
    [
        ("runs/demo", None, "runs/demo", None),
        ("a:b/c", None, "a:b/c", None),
        ("openimp:icons.parquet", "openimp", "icons.parquet", None),
        ("hub:me/cats@v1", "hub", "me/cats@v1", None),
        ("open_clip:ViT-B-32/laion", "open_clip", "ViT-B-32/laion", None),
        ("open_clip:local-dir:models/x", "open_clip", "local-dir:models/x", "models/x"),
        ("open_clip:./models/x", "open_clip", "./models/x", "./models/x"),
        ("sentence_transformers:/models/x", "sentence_transformers", "/models/x", "/models/x"),
        ("sentence_transformers:me/x@v1", "sentence_transformers", "me/x@v1", None),
        ("timm:~/vit", "timm", "~/vit", "~/vit"),
        ("timm:hf-hub:timm/vit_tiny", "timm", "hf-hub:timm/vit_tiny", None),
        ("timm:vit_tiny", "timm", "vit_tiny", None),
        ("hub:./x", "hub", "./x", None),
        ("s3://bucket/*.parquet", "url", "s3://bucket/*.parquet", None),
        ("simplecache::s3://bucket/x", "url", "simplecache::s3://bucket/x", None),
    ],
)
def test_a_name_has_a_scheme_and_a_rest(name, scheme, rest, folder):
    parsed = Name.parse(name)
    assert parsed == (scheme, rest)
    assert parsed.folder == folder


def test_a_source_may_name_a_data_set_of_the_hub_as_its_path():
    assert Source(path="hub:me/cats@v1", split="test") == Source(hub="me/cats", revision="v1", split="test")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "hub:"}, "expected hub:OWNER/NAME"),
        ({"path": "hub:../folder"}, "expected hub:OWNER/NAME"),
        ({"path": "hub:me/cats", "hub": "me/dogs"}, "give exactly one of path and hub"),
        ({"path": "hub:me/cats@v1", "revision": "v2"}, "revision is 'v2', and path names 'v1'"),
    ],
)
def test_a_path_on_the_hub_contradicts_no_other_key(source, message):
    with pytest.raises(ValueError, match=message):
        Source(**source)


def test_a_path_after_a_library_is_that_of_a_folder_with_and_without_local_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for library, folder, file in (
        ("open_clip", "clip", "open_clip_config.json"),
        ("open_clip", "ViT-B-32/openai", "open_clip_config.json"),
        ("timm", "my/vit", "config.json"),
        ("timm", "resnet18", "config.json"),
        ("sentence_transformers", "me/mini", "modules.json"),
        ("sentence_transformers", "bert", "config.json"),
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / file).touch()
        for path in (folder, f"./{folder}", str(tmp_path / folder)):
            found = absolute_name(f"{library}:{path}", tmp_path)
            if path in ("ViT-B-32/openai", "resnet18"):  # The library knows a model of this name.
                assert found == f"{library}:{path}"
            else:
                assert found == f"{library}:{tmp_path}/{folder}"
        assert absolute_name(f"{library}:local-dir:{folder}", tmp_path) == f"{library}:local-dir:{tmp_path}/{folder}"
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    for name in ("sentence_transformers:empty/folder", "timm:vit_tiny", "timm:hf-hub:my/vit", "open_clip:bert"):
        assert absolute_name(name, tmp_path) == name
    assert absolute_name("timm:~/vit", tmp_path) == f"timm:{tmp_path}/home/vit"
