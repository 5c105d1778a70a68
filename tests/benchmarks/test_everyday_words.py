"""benchmarks/everyday_words.py counts as right what has the word."""

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("lancedb")
from benchmarks.everyday_words import main
from openimp.search import build_index


def test_the_words_of_texts_are_found(tiny_model_folder, tmp_path, monkeypatch, capsys):
    captions = ["a dog"] * 5 + ["two cats"] * 4 + [None]  # Fewer than five cats, so `cat` is not searched.
    rng = np.random.default_rng(0)
    for number, caption in enumerate(captions):
        file = tmp_path / "media" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file)
        if caption:
            file.with_suffix(".txt").write_text(caption, encoding="utf-8")
    index = build_index(tiny_model_folder, [file.parent], tmp_path / "x.index").folder
    monkeypatch.setattr("sys.argv", ["everyday_words.py", str(index)])
    main()
    rows = [row[2:].split(" | ", 2) for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    found = {(kinds, by): result for kinds, by, result in rows}
    for kinds in ("pictures, clips", "everything"):
        assert found[kinds, "words"] == found[kinds, "both"] == "1 | 100.0% | 100.0% |"
        assert found[kinds, "meaning"] != found[kinds, "both"]
