"""torch.compile for the encoder, once per signature: modality, number of examples, number of tokens."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from openimp.common.errors import UserError
from openimp.common.modality import Modalities, Tokens
from openimp.common.safe_files import cache_folder, private_folder
from openimp.model.embedder import Embedder, Encoded, chunk_sizes
from openimp.recipe.schema import Recipe


def signatures(recipe: Recipe, modalities: Modalities) -> set[tuple[str, int, int]]:
    """The signatures of all forward passes in a training run: (modality, examples, tokens)."""
    return {
        (name, rows, modalities[name].length(view[name]))
        for task in recipe.tasks.values()
        if task.weight
        for view in task.views
        for name, spec in task.inputs.items()
        for rows in chunk_sizes((view.batch_size or task.batch_size) * spec.draw, recipe.memory.chunk_size)
    }


class CompiledEncode:
    """`model.encode`, compiled once per signature.

    More than `limit` signatures are an error: torch would only log a line and run the pass uncompiled.
    """

    def __init__(self, model: Embedder, limit: int) -> None:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        # torch executes the code that it finds in its cache folder. By default that is in the temporary folder, where
        # another user could have created it. Precompiled headers are stored there whatever the variable says.
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder("inductor"))
        private_folder(Path(default_cache_dir()), "TMPDIR")
        torch._dynamo.reset()  # Signatures are counted per function, so those of an earlier model would count as well.
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        self.limit, self.compiled = limit, torch.compile(model.encode, dynamic=False)

    def __call__(self, inputs: Mapping[str, Tokens]) -> Encoded:
        from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit
        from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

        try:
            return self.compiled(inputs)
        except FailOnRecompileLimitHit:
            shapes = {name: tuple(tokens.coords.shape[:2]) for name, tokens in inputs.items()}
            raise UserError(
                f"train.compile: {shapes} (examples, tokens) is none of the {self.limit} shapes of the recipe's views"
            ) from None
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, InvalidCxxCompiler | CppCompileError):
                raise
            raise UserError(
                "train.compile: torch's C++ code does not compile here; install a compiler, such as g++, and Python's "
                "headers, or set train.compile=false"
            ) from None
