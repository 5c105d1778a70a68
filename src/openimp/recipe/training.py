"""The schema of training: alternation, optimizer, memory, parallelism and the loop."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from openimp.common.device import Precision
from openimp.common.schema import (
    Count,
    NotNegative,
    PartialShare,
    Positive,
    PositiveShare,
    RecipePath,
    Share,
    Strict,
    Whole,
)


class Alternation(Strict):
    """The order in which tasks are visited."""

    kind: Literal["random", "intervals", "cycle", "sequence"] = "random"
    """random: drawn by weight (figure 1 of the paper). intervals: each task once per `interval` rounds (the authors'
    release). cycle: a low-discrepancy sequence by weight. sequence: one task after the other, each for its share of the
    steps."""
    views: Literal["drawn", "sequence"] = "drawn"
    """drawn: each step of a task draws one of the task's views by weight. sequence: a task uses one view after the
    other, each for its share of the task's steps; for example, views with a quarter of the tokens and then with all of
    them. The cosine of the learning rate then follows the share of the run's FLOPs, not of its steps."""


class Optimizer(Strict):
    """Fused AdamW with one schedule for all tasks (arXiv 2305.06324), optionally combined with Muon."""

    lr: Positive = 8e-4
    """Peak learning rate. The paper: S 8e-4, B 1e-3, L 5e-4."""
    muon_lr: Positive | None = None
    """Peak learning rate of Muon (arXiv 2502.16982); try four times `lr` first. Muon then updates the linear layers of
    stems, encoder and projection heads, and the experts. It orthogonalizes queries, keys, values and each expert
    separately. AdamW updates all other parameters: patch embeddings (with `conv_channels`, the convolution instead),
    token and position tables, routers, classification heads, norms and temperatures. null: AdamW updates everything."""
    muon_momentum: PartialShare = 0.95
    """Share of Muon's momentum that a step keeps. A gradient then counts in about 1 / (1 - momentum) steps that use
    the weight; of a weight that tasks share, also in steps of other tasks. Try 0.8 if a task with few of the steps
    learns slowly; 0.95 is better for the recipe demo."""
    warmup_steps: Whole | None = None
    """Steps of linear warm-up. null: 5% of the steps, as for the paper's S and B."""
    lr_scale: dict[str, NotNegative] = {}
    """Factors of the learning rates by part of the model. A part is a parameter's name up to one of its dots, such as
    `encoder`, `encoder.blocks.0`, `stems.vision` or `projections`; of several that fit, the longest one counts. 0
    freezes the part: it has no gradients, no optimizer state and no EMA of its own."""
    layer_decay: PositiveShare = 1.0
    """Factor of the learning rates from each block to the one below it, for fine-tuning (as in BEiT, arXiv 2106.08254,
    and timm): heads and the stems' last layers have the full rate, the last block this factor, the block below it the
    square of it, and the stems below the first block the smallest rate."""
    min_lr_ratio: NotNegative = 0.0
    """Learning rate at the end of the cosine schedule, as a share of the peak."""
    weight_decay: NotNegative = 1e-4
    """Weight decay of AdamW and Muon. It applies to the weights of linear layers and experts, but not to embedding
    tables, norms, biases and temperatures."""
    eps: Positive = 1e-7
    """AdamW's epsilon."""
    betas: Annotated[list[PartialShare], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW's decay rates of the means of the gradient and of its square."""
    zero_missing_grads: bool = False
    """Updates parameters that a step's task does not use with a gradient of zero, as in the authors' release: their
    optimizer state decays, and AdamW's momentum still moves them. false: they and their state stay unchanged."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are scaled down to this norm if theirs is larger; null: no clipping."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average (EMA) of the weights, which is evaluated, and saved in addition to the
    weights. null: no average."""

    @model_validator(mode="after")
    def _muon_is_used(self) -> "Optimizer":
        if self.muon_lr is None:
            self.refuse(("muon_momentum",), "is for Muon; remove it, or set muon_lr")
        return self


class Memory(Strict):
    """Options that save memory at the cost of one more forward pass. The gradients stay the same."""

    chunk_size: Count | None = None
    """Number of examples of each modality that the encoder processes at a time. Their activations are discarded, and
    computed again after the loss of the whole batch (GradCache, arXiv 2101.06983). null: the whole batch at once."""
    activation_checkpointing: bool = False
    """Discards the activations within each block of the encoder and computes them again in the backward pass (arXiv
    1604.06174)."""


class Parallel(Strict):
    """How the model is distributed over the ranks of torchrun. It does not change losses and gradients."""

    shard_degree: Count | None = None
    """Number of ranks over which weights, gradients and optimizer state are sharded (FSDP2). Each such group of ranks
    has a replica (HSDP). 1: each rank has a full replica. null: on GPUs, 1 if weights, gradients, optimizer state and
    EMA take at most 45 % of a GPU's memory; otherwise the GPUs of a node if that suffices; otherwise all ranks. On
    CPUs, null is all ranks. `openimp plan` recommends a layout."""
    expert_degree: Count = 1
    """Number of ranks over which the experts of each sparse layer are distributed, and between which tokens are
    exchanged (expert parallelism). It must divide `shard_degree` or, if that is 1, the number of ranks."""
    reshard_after_forward: bool = True
    """true: a block's gathered weights are freed after it has computed, and gathered again for the backward pass and
    for each chunk. false: they are kept until the update, which needs memory for the weights of all blocks but gathers
    each block only once per step. `openimp plan` shows what the recipe's value costs."""


class Train(Strict):
    """The training loop."""

    removed = {"upcycle": (False, True)}

    steps: Annotated[int, Field(ge=1, le=10**12)] = 200_000
    """Optimizer steps, over all tasks. The paper: S 200k, B and L 500k."""
    init: RecipePath | None = None
    """Source of initial weights and tokenizer: the folder of a run, a checkpoint or a model, relative to the recipe, or
    openimp:base, or hub:OWNER/NAME@REVISION for a model of the Hugging Face Hub. timm:NAME is a public vision
    Transformer, from which the encoder and the stem of pictures start; `timm:FOLDER` is one in a folder.
    Heads and stems that the source lacks are initialized randomly. null: everything is initialized randomly."""
    precision: Precision = "auto"
    """auto: bf16 if it is faster on the device, else fp32. Parameters, optimizer state, routers, similarities and
    losses are fp32 in any case."""
    compile: bool = False
    """Compiles the blocks of the encoder with torch.compile, which needs a C++ compiler: once per combination of view
    and batch size."""
    num_workers: Whole = 2
    """Worker processes per rank that read and decode data, each of them a part of every batch; 0: the training process
    does it."""
    prefetch_factor: Count = 4
    """Number of batches that the workers prepare in advance."""
    log_every: Count = 50
    """Steps between log records. Checkpoints and evaluations write one, too. On other steps, except a task's first, the
    training waits at most for the GPU's previous step, and ranks exchange nothing but tensors of the model."""
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    """What shows the figures of the run, besides metrics.jsonl. wandb and trackio must be installed; a resumed run
    continues theirs."""
    save_every: Count = 1000
    """Steps between checkpoints. The last step is always saved."""
    keep_last: Count = 2
    """Number of checkpoints that are kept."""
    max_bad_fraction: Share = 0.01
    """The run stops if more than this share of a task's examples is unreadable. It is checked with each log record,
    from 100 examples on. With any share, the run stops if no example of 10 in a row (a batch, if larger) can be read.
    In a stream, these are of one lane, so a shard of unreadable media stops the run: remove it. The unreadable rest of
    a damaged tar counts as one example."""


def tolerant_fraction(bad: float) -> float:
    """A value of `max_bad_fraction` for data with this share of bad rows, with room for chance."""
    return round(min(1.0, 1.5 * bad + 0.02), 2)
