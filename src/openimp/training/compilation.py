"""torch.compile for the blocks of the encoder, once per signature for dense and once for sparse blocks.

The signature of a pass has the number of examples and tokens of each of its inputs, and whether they have a mask. If
stems have their own experts, it has the stems as well. If parts are frozen, a block is compiled once per pattern of
frozen weights, and for each pattern with and without trained weights below the block.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openimp.common.cache import cache_folder
from openimp.common.errors import UserError, one_line
from openimp.common.safe_files import private_folder

MAX_COMPILATIONS = 256
"""Maximum number of times that blocks are compiled, far more than the views of any recipe need."""


def compile_blocks(blocks: Sequence[nn.Module], uncompiled: Iterable[nn.Module] = ()) -> None:
    """Compiles the forward passes of a model's blocks in place, before FSDP2 shards them.

    All dense blocks have the same code, and so have all sparse ones, so both are compiled once per signature.
    `uncompiled` are modules within the blocks that are left out.
    """
    if not blocks:
        raise UserError("train.compile: this model has no blocks that can be compiled; set train.compile=false")
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch executes the code that it finds in its cache folder. By default that is in the temporary folder, where
    # another user could have created it. Precompiled headers are stored there whatever the variable says.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder("inductor"))
    private_folder(Path(default_cache_dir()), "TMPDIR")
    torch._dynamo.reset()  # Compilations are counted per function, so those of an earlier model would count as well.
    torch._dynamo.config.recompile_limit = MAX_COMPILATIONS
    # Otherwise torch would only log a line and run the block uncompiled.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for module in uncompiled:
        _set_forward(module, torch.compiler.disable(module.forward))
    for block in blocks:
        # Not `block.compile()`, which would compile the hooks of FSDP2 too.
        _set_forward(block, _compiled_in_training(block))


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.__dict__["forward"] = forward


def _compiled_in_training(block: nn.Module) -> Callable[..., Any]:
    """The forward pass of a block: compiled in training. In evaluation, which has other signatures, it is not."""
    from torch._dynamo.exc import BackendCompilerFailed

    eager = block.forward
    compiled = torch.compile(eager, dynamic=False)

    def forward(*inputs: Any) -> Any:
        try:
            return compiled(*inputs) if block.training else eager(*inputs)
        except BackendCompilerFailed as error:  # Usually, there is no C++ compiler.
            raise UserError(f"train.compile: {one_line(error.inner_exception)}; set train.compile=false") from None

    return forward
