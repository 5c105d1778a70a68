"""The schema of what a training does with its tasks: alternation, optimizer, memory, ranks, and the loop."""

from typing import Annotated, Literal

from pydantic import Field

from openimp.common.schema import Count, Positive, RecipePath, Share, Strict, Whole


class Alternation(Strict):
    """The function step -> (task, view)."""

    kind: Literal["random", "intervals", "cycle", "sequence"] = "random"
    """Drawn by weight (the paper's figure 1), each task every `interval` rounds (the authors' release), a
    low-discrepancy sequence by weight, or one task after the other, each for its share of the steps."""


class Optimizer(Strict):
    """Fused AdamW with one schedule for all tasks (arXiv 2305.06324); Muon beside it by option."""

    renamed = {
        "clip": "max_grad_norm",
        "ema": "ema_decay",
        "warmup": "warmup_steps",
        "final_lr": "min_lr_ratio",
        "zero_grads": "zero_missing_grads",
    }

    lr: Positive = 8e-4
    """Peak learning rate; the paper: S 8e-4, B 1e-3, L 5e-4."""
    muon_lr: Positive | None = None
    """Peak learning rate of Muon (arXiv 2502.16982), which then updates the encoder's dense matrices and the linear
    layers about it, while AdamW keeps the rest; four times `lr` is a good start. null: AdamW updates everything."""
    warmup_steps: Whole | None = None
    """Steps of linear warm-up; null: one step in twenty, as the paper's S and B."""
    min_lr_ratio: Annotated[float, Field(ge=0)] = 0.0
    """Where the cosine ends, as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Weight decay of AdamW and Muon. It applies to the kernels of linear layers and experts; not to tables, norms,
    biases and temperatures."""
    eps: Positive = 1e-7
    """AdamW's epsilon."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Decay of AdamW's means of the gradient and of its square."""
    zero_missing_grads: bool = False
    """Update parameters that a step's task does not use with a gradient of zero, as in the authors' release: their
    optimizer state decays, and AdamW's momentum still moves them. false: their values and state stay unchanged."""
    max_grad_norm: Positive | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the averaged weights that are evaluated and saved beside the trained ones; null: none are kept."""


class Memory(Strict):
    """How much of a batch is in memory at once: the same gradients for less memory, and one more forward pass."""

    renamed = {"micro": "chunk_size", "recompute": "activation_checkpointing"}

    chunk_size: Count | None = None
    """Examples of one modality that the encoder takes at a time; their activations are forgotten and computed again
    when the gradient of the whole batch's loss is known (GradCache, arXiv 2101.06983). null: all at once."""
    activation_checkpointing: bool = False
    """Forget the activations within each block of the encoder and compute them again (arXiv 1604.06174)."""


class Parallel(Strict):
    """How torchrun's processes hold the model between them; losses and gradients are the same in any way."""

    renamed = {"shard": "shard_degree", "experts": "expert_degree"}

    shard_degree: Count | None = None
    """Processes that share one copy of weights, gradients and moments (FSDP2); each such group has its own (HSDP). 1: a
    whole copy in every process, for small models; processes on the CPUs of one Linux machine then have one together,
    unless `experts` is above 1. null: all processes share one."""
    expert_degree: Count = 1
    """Processes that share the experts of each sparse layer, each with some of them whole; tokens travel to them and
    back (expert parallelism). They are among those that share a copy, unless every process has a whole one."""


class Train(Strict):
    """The loop."""

    renamed = {
        "workers": "num_workers",
        "prefetch": "prefetch_factor",
        "keep": "keep_last",
        "max_bad": "max_bad_fraction",
    }

    steps: Count = 200_000
    """Gradient steps, over all tasks; the paper: S 200k, B and L 500k."""
    init: RecipePath | None = None
    """Initial weights and tokenizer: a run, a checkpoint or a model's folder, relative to the recipe, or a model of the
    Hugging Face Hub as hub:OWNER/NAME@REVISION. Heads and stems that it lacks are initialized randomly. null:
    everything is initialized randomly."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast where it is faster."""
    compile: bool = False
    """torch.compile, once for each signature (modality, view, batch); needs a C++ compiler."""
    num_workers: Whole = 2
    """Processes that read and decode; 0: the training process does."""
    prefetch_factor: Count = 4
    """Batches that each worker prepares ahead."""
    log_every: Count = 50
    """Steps between two lines of metrics."""
    save_every: Count = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: Count = 2
    """Checkpoints that are kept."""
    max_bad_fraction: Share = 0.01
    """The share of unreadable examples, of all that a task has read, above which the run stops (from 100 on)."""
