"""torch.compile for the encoder, once per signature: modalities, their numbers of examples and of tokens."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from openimp.common.errors import UserError
from openimp.common.modality import Modalities, Tokens
from openimp.common.safe_files import cache_folder, private_folder
from openimp.model.embedder import Embedder, Encoded, pass_sizes
from openimp.recipe.schema import Recipe


def signatures(recipe: Recipe, modalities: Modalities) -> set[tuple[tuple[str, int, int], ...]]:
    """The signatures of all passes in a training run: (modality, examples, tokens) of each of their modalities."""
    found = set()
    for task in recipe.tasks.values():
        for view in task.views if task.weight else ():
            batch_size = view.batch_size or task.batch_size
            rows = {name: batch_size * spec.draw for name, spec in task.inputs.items()}
            for sizes in pass_sizes(rows, recipe.memory.chunk_size):
                found.add(tuple((name, n, modalities[name].length(view[name])) for name, n in sizes.items()))
    return found


class CompiledEncodeAll:
    """`model.encode_all`, compiled once per signature.

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
        self.compiled = torch.compile(model.encode_all, dynamic=False)

    def __call__(self, inputs: Mapping[str, Tokens]) -> dict[str, Encoded]:
        from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit
        from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

        try:
            return self.compiled(inputs)
        except FailOnRecompileLimitHit:
            shapes = {name: tuple(tokens.coords.shape[:2]) for name, tokens in inputs.items()}
            raise UserError(
                f"train.compile: {shapes} (examples, tokens) occurs in no step of the recipe, so it is not compiled"
            ) from None
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, InvalidCxxCompiler | CppCompileError):
                raise
            raise UserError(
                "train.compile: torch's C++ code does not compile here; install a compiler, such as g++, and Python's "
                "headers, or set train.compile=false"
            ) from None
