"""Names of models and data."""

import pytest

from openimp.common.names import Name
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
        ("timm:vit_tiny", "timm", "vit_tiny", None),
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
