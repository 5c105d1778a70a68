"""torch.compile for the blocks of the encoder, once per signature and class of blocks.

The signature of a pass has the number of examples and tokens of each of its inputs, and whether they have a mask. If
stems have their own experts, it has the stems as well.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openimp.common.cache import cache_folder
from openimp.common.errors import UserError
from openimp.common.modality import Modalities
from openimp.common.safe_files import private_folder
from openimp.model.embedder import Embedder, pass_sizes
from openimp.recipe.schema import Recipe

Signature = tuple[tuple[str, int, int, bool], ...]
"""(stem or "", examples, tokens, whether there is a mask) of each input of a pass."""


def signatures(recipe: Recipe, modalities: Modalities, ranks: int) -> set[Signature]:
    """The signatures of all passes through a block on one of `ranks` ranks, in a training run."""
    passes = set()
    depends_on_stem = bool(recipe.model.moe and recipe.model.moe.experts_by_stem)
    for task in recipe.tasks.values():
        if not task.weight:
            continue
        for view, batch_size in zip(task.views, task.batch_sizes):
            rows = {name: batch_size * spec.draw // ranks for name, spec in task.inputs.items()}
            for sizes in pass_sizes(rows, recipe.memory.chunk_size):
                inputs = []
                for name, examples in sizes.items():
                    modality = modalities[name]
                    stem = modality.stem if depends_on_stem else ""
                    inputs.append((stem, examples, modality.length(view[name]), modality.masked))
                passes.add(tuple(inputs))
                if recipe.model.modality_specific_layers:
                    passes.update((single_input,) for single_input in inputs)
    return passes


def compilations_per_signature(model: Embedder) -> int:
    """The maximum number of times that each class of blocks is compiled per signature.

    It is 1 if no part of the model is frozen. Otherwise a block is compiled once per pattern of frozen weights, and
    for each pattern with and without trained weights below the block.
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        return 1
    frozen_patterns = {tuple(parameter.requires_grad for parameter in block.parameters()) for block in model.blocks()}
    return 2 * len(frozen_patterns)


def compile_blocks(blocks: Sequence[nn.Module], limit: int, uncompiled: Iterable[nn.Module] = ()) -> None:
    """Compiles the forward passes of a model's blocks in place, before FSDP2 shards them.

    Blocks of the same class have the same code, so each class is compiled once per signature. More than `limit`
    signatures are an error: torch would only log a line and run the block uncompiled. `uncompiled` are modules within
    the blocks that are left out.
    """
    if not blocks:
        raise UserError("train.compile: this model has no blocks that can be compiled; set train.compile=false")
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch executes the code that it finds in its cache folder. By default that is in the temporary folder, where
    # another user could have created it. Precompiled headers are stored there whatever the variable says.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder("inductor"))
    private_folder(Path(default_cache_dir()), "TMPDIR")
    torch._dynamo.reset()  # Signatures are counted per function, so those of an earlier model would count as well.
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for module in uncompiled:
        _set_forward(module, torch.compiler.disable(module.forward))
    for block in blocks:
        # Not `block.compile()`, which would compile the hooks of FSDP2 too.
        _set_forward(block, CompiledForward(block))


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.__dict__["forward"] = forward


class CompiledForward:
    """The forward pass of a block: compiled in training. In evaluation, which has other signatures, it is not."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.eager = block.forward
        self.compiled = torch.compile(block.forward, dynamic=False)

    def __call__(self, x_TD: torch.Tensor, shapes: Any, *others: Any) -> Any:
        if not self.block.training:
            return self.eager(x_TD, shapes, *others)
        from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit
        from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

        try:
            return self.compiled(x_TD, shapes, *others)
        except FailOnRecompileLimitHit:
            raise UserError(
                f"train.compile: {[tuple(shape) for shape in shapes]} (examples, tokens) occurs in no step of the "
                "recipe, so it is not compiled"
            ) from None
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, InvalidCxxCompiler | CppCompileError):
                raise
            raise UserError(
                "train.compile: torch's C++ code does not compile here; install a compiler, such as g++, and Python's "
                "headers, or set train.compile=false"
            ) from None
