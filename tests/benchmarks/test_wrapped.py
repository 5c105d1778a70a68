"""The benchmark of wrapped models compares equal vectors of equal pictures."""

import public
import pytest
import wrapped

pytestmark = pytest.mark.slow


def test_openimp_and_the_library_embed_the_same_pictures(tmp_path):
    public.write("clip", tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    files = wrapped.write_pictures(tmp_path / "pictures", 5)
    ratios, speeds = wrapped.compare(tmp_path / "model", files, 2)
    assert len(ratios) == 2
    assert min(ratios) > 0
    assert speeds.keys() == {"embed_with_openimp", "embed_with_library"}
