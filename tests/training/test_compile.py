"""`train.compile`: it computes what the eager model does."""

import shutil
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from openimp.common.modality import Tokens
from openimp.data.loader import load_batches
from openimp.training.compilation import compile_blocks
from tests.messages import refuses
from tests.trained import trainer_of

QUICK = ["tasks.heard.weight=0", "evaluation={}", "model.layers=2", "model.moe=null", "train.precision=fp32",
         "tasks.named.views=[{image: {size: 16}, text: {length: 8}}]", "train.steps=6"]  # fmt: skip

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles its CPU code with g++")


@pytest.fixture(autouse=True)
def limits():
    """Leaves torch's limits as they were."""
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("frozen", "moe"),
    [
        ("{stems: 0, encoder.blocks.0: 0}", "null"),
        ("{}", "{experts: {vision: 2, text: 3, audio: 2}, layers: 1}"),
    ],
)
def test_a_compiled_run_has_the_losses_of_the_eager_one(little_data, tmp_path, capsys, monkeypatch, frozen, moe):
    """And its code is in the user's own cache."""
    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    losses = {}
    # In chunks of 4 too: of 8 examples, twice the same shape.
    for compiled, memory in (("false", "{}"), ("true", "{chunk_size: 4, activation_checkpointing: true}")):
        changes = [*QUICK, f"train.compile={compiled}", f"memory={memory}", f"optimizer.lr_scale={frozen}"]
        changes.append(f"model.moe={moe}")
        training = trainer_of(little_data, tmp_path / compiled, *changes)
        losses[compiled] = [
            float(training.make_step(loaded).total.detach()) for loaded in load_batches(training.batches, 0)
        ]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)
    assert "fp32, compiled, into" in capsys.readouterr().out
    assert list((tmp_path / "cache" / "inductor").rglob("*.so"))
    assert (tmp_path / "cache" / "inductor").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_another_user_made_for_torchs_code_is_refused(tmp_path, monkeypatch, foreign_folder):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    planted = Path(default_cache_dir())
    planted.symlink_to(foreign_folder)
    with refuses():
        compile_blocks([torch.nn.Identity()])


def test_a_compiler_that_is_missing_is_told_in_one_sentence(tiny_recipe, tiny_model):
    model, _ = tiny_model(tiny_recipe({"layers": 1, "moe": None}))
    tokens = Tokens(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, 1, dtype=torch.int64))
    missing = {"cpp.cxx": (None, "/nowhere/g++"), "force_disable_caches": True}
    compile_blocks(model.train().blocks())
    with torch._inductor.config.patch(missing), refuses():
        model.encode_all({"text": tokens})


def test_a_model_without_blocks_is_not_said_to_be_compiled():
    with refuses():
        compile_blocks([])
