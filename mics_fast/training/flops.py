"""Model FLOPs: floating-point operations of one optimiser step of each stage, by loss term.

They are counted in closed form: two for every multiply-add of matrix products, embeddings and
attention; none for norms, activations, optimisers, the evidential loss and class statistics. A
backward pass costs as much as its products: twice the forward pass for a layer whose input needs a
gradient, once for a layer whose input needs none (patch embeddings) or whose weights are frozen;
four products for the two of attention. ``torch.utils.flop_counter`` counts plain attention in the
same way; for fused kernels, which recompute the scores, it counts five. Unused tokens of a last
block and recomputations are not counted, so a share of the hardware's peak means the same for any
kernel (model FLOPs: Chowdhery et al., PaLM, appendix B). Every pair counts as complete, every queue
as full.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from mics_fast.models.pooled import NARROWER
from mics_fast.models.sizes import Size
from mics_fast.models.vit import tokens_read
from mics_fast.options import TrainConfig, contrasted_pairs
from mics_fast.stages.pretrain import TURBO_SHARE

LONGEST_QUEUE = 65536


@dataclass(frozen=True)
class Work:
    """FLOPs of one forward pass, by the cost of their backward pass.

    Args:
        inner: layers with weights whose input needs a gradient.
        first: layers with weights whose input needs none.
        attention: products without weights.
        frozen: layers whose weights are frozen and whose input needs a gradient.
        fixed: layers whose weights are frozen and whose input needs no gradient.
    """

    inner: float = 0.0
    first: float = 0.0
    attention: float = 0.0
    frozen: float = 0.0
    fixed: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Work:
        return Work(*(part * times for part in astuple(self)))

    def forward(self) -> float:
        """Count the forward pass only."""
        return sum(astuple(self))

    def trained(self) -> float:
        """Count forward, and backward to weights and inputs."""
        learned = 3 * self.inner + 2 * self.first
        return learned + 3 * self.attention + 2 * self.frozen + self.fixed

    def passed_through(self) -> float:
        """Count forward, and backward to the inputs only, including those of ``first``."""
        return 2 * self.inner + 2 * self.first + 3 * self.attention


def pretrain_flops(
    config: TrainConfig, size: Size, modalities: int, queue: int | None = None
) -> dict[str, float]:
    """Count the FLOPs of one step of stage 1.

    Args:
        config: of the run; a weight of 0 disables its term.
        size: of the networks.
        modalities: number M.
        queue: rows of each queue; default: the option's, or its largest default.

    Returns:
        One entry per enabled term: "consistency" (the student's whole views and their loss),
        "teacher", "reconstruction" (masked views and decoder, also needed by the adversarial term;
        in the turbo preset they are the student's views, too), "discriminator" (its own loss) and
        "adversarial" (the additional cost of the model's loss through the discriminator).
    """
    options, images = config.pretrain, config.pretrain.batch_size * modalities
    turbo = options.preset == "turbo"
    visible = size.num_patches - round(size.num_patches * options.mask_ratio)
    masked = options.reconstruction_weight > 0 or options.adversarial_weight > 0
    flops: dict[str, float] = {}
    if pairs := contrasted_pairs(options, modalities):
        read = tokens_read(config.model.pool)
        whole = encoder(size, size.num_patches, read)
        head = dense(1, size.width, config.model.projection)
        if turbo:
            student = head if masked else encoder(size, visible, read) + head
        else:
            student = whole + head
        keys = (queue or options.queue_size or LONGEST_QUEUE) + options.batch_size
        loss = contrastive(options.batch_size, keys, config.model.projection) * len(pairs)
        flops["consistency"] = (student * images).trained() + loss
        flops["teacher"] = ((whole + head) * images).forward()
    if masked:
        work = encoder(size, visible) + decoder(size, visible)
        flops["reconstruction"] = (work * images).trained()
    if options.adversarial_weight:
        share = TURBO_SHARE if turbo else 1.0
        judged = discriminator(size, round(size.num_patches * share)) * images
        flops["discriminator"] = (judged * 2).trained()
        # Simultaneous: beyond the discriminator's own backward pass, only the reconstructions'.
        alternates = options.adversarial == "alternating"
        flops["adversarial"] = judged.passed_through() if alternates else judged.first
    return flops


def finetune_flops(
    config: TrainConfig, size: Size, modalities: int, classes: int
) -> dict[str, float]:
    """Count the FLOPs of one step of stage 2.

    Args:
        config: of the run; a weight of 0 disables its term.
        size: of the networks.
        modalities: number M.
        classes: number C.

    Returns:
        One entry per enabled term: "supervised" (the student on labelled rows), "unlabelled" (on
        the others, shared by pseudo-labels and the agreement of modalities), "teacher" (the
        averaged weights' pseudo-labels) and "shift" (the fusion head on shifted features).
    """
    options = config.finetune
    model = classifier(size, modalities, classes, config)
    flops = {"supervised": (model * options.labelled_batch).trained()}
    rows = options.labelled_batch
    if options.unlabelled_weight or options.modality_consistency_weight:
        rows += options.unlabelled_batch
        flops["unlabelled"] = (model * options.unlabelled_batch).trained()
    if options.unlabelled_weight:
        flops["teacher"] = (model * options.unlabelled_batch).forward()
    if options.shift in ("diagonal", "low-rank") and options.shift_weight and modalities > 1:
        flops["shift"] = (dense(1, size.width, classes) * rows).trained()
    return flops


def dense(tokens: int, inputs: int, outputs: int) -> Work:
    """Count a linear layer."""
    return Work(inner=2.0 * tokens * inputs * outputs)


def embedding(tokens: int, inputs: int, outputs: int) -> Work:
    """Count a linear layer whose input needs no gradient."""
    return Work(first=2.0 * tokens * inputs * outputs)


def block(tokens: int, width: int, read: int | None = None) -> Work:
    """Count a transformer block: three width x width matrices on all tokens; on the ``read`` ones
    (default: all) one more, eight of the MLP, and the attention products."""
    read = tokens if read is None else read
    inner = 2.0 * (3 * tokens + 9 * read) * width**2
    return Work(inner=inner, attention=4.0 * tokens * read * width)


def blocks(depth: int, tokens: int, width: int, read: int | None = None) -> Work:
    """Count a stack of blocks; only the last one can be limited to the tokens that are read."""
    return block(tokens, width) * (depth - 1) + block(tokens, width, read)


def encoder(size: Size, patches: int, read: int | None = None) -> Work:
    """Count the vision transformer on some patches of one image."""
    stack = blocks(size.depth, 1 + patches, size.width, read)
    return embedding(patches, size.patch_dim, size.width) + stack


def lora_encoder(size: Size, patches: int, rank: int, read: int | None = None) -> Work:
    """Count the vision transformer with frozen weights and low-rank additions, on some patches."""
    tokens, width = 1 + patches, size.width
    work = Work(fixed=2.0 * patches * size.patch_dim * width)
    for number in range(size.depth):
        kept = tokens if read is None or number < size.depth - 1 else read
        qkv, down = 6.0 * tokens * width**2, 2.0 * tokens * width * rank
        # The first block's input depends on nothing that learns.
        work += Work(first=down, fixed=qkv) if number == 0 else Work(inner=down, frozen=qkv)
        work += dense(tokens, rank, 3 * width) + dense(kept, width, rank) + dense(kept, rank, width)
        work += Work(frozen=18.0 * kept * width**2, attention=4.0 * tokens * kept * width)
    return work


def decoder(size: Size, visible: int) -> Work:
    """Count the decoder on all tokens of one image, and its head on the masked ones."""
    return (
        dense(1 + visible, size.width, size.decoder_width)
        + block(1 + size.num_patches, size.decoder_width) * size.decoder_depth
        + dense(size.num_patches - visible, size.decoder_width, size.patch_dim)
    )


def discriminator(size: Size, patches: int) -> Work:
    """Count the discriminator on some patches of one image.

    In the last block only the class token is read. L2 attention counts as dot products of its
    width, with tied queries and keys."""
    tokens, width = 1 + patches, size.discriminator_width
    stack = distance_block(tokens, tokens, width) * (size.discriminator_depth - 1)
    last = distance_block(tokens, 1, width)
    return embedding(patches, size.patch_dim, width) + stack + last + dense(1, width, 1)


def distance_block(tokens: int, read: int, width: int) -> Work:
    """Count a block with L2 attention: two matrices on all tokens, nine on those that are read."""
    inner = 2.0 * (2 * tokens + 9 * read) * width**2
    return Work(inner=inner, attention=4.0 * tokens * read * width)


def contrastive(queries: int, keys: int, width: int) -> float:
    """Count the soft-target loss of one ordered pair of modalities: products of student and
    teacher with the keys, and the student's gradient."""
    return 3 * 2.0 * queries * keys * width


def classifier(size: Size, modalities: int, classes: int, config: TrainConfig) -> Work:
    """Count one encoder per modality, their fusion and one head per opinion, on one pair; with
    frozen encoders, fusion and heads alone."""
    model = config.model
    views, read = modalities + (modalities > 1), tokens_read(model.pool)
    heads = dense(1, size.width, classes) * views
    if config.finetune.encoder == "frozen":
        hidden = size.width // NARROWER
        joint = embedding(modalities, size.width, hidden) + dense(1, hidden, size.width)
        return heads + joint * (modalities > 1)
    patches = size.num_patches
    seen = read if modalities == 1 else None  # fusion reads all tokens
    if config.finetune.encoder == "lora":
        encoders = lora_encoder(size, patches, config.finetune.lora_rank, seen) * modalities
    else:
        encoders = encoder(size, patches, seen) * modalities
    if modalities == 1:
        return encoders + heads
    tokens = 1 + modalities * patches
    return encoders + blocks(model.fusion_depth, tokens, size.width, read) + heads
