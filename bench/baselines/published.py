"""The pre-training step of the published code (LQH89757/MICS, ``Pretrain.py``), reimplemented.

Kept, because it determines the cost of the step:

- the whole model runs twice, without gradients for the discriminator and then for its own loss;
- one modality after the other, attention with materialised scores, in float32, not compiled, with
  PyTorch's default kind of optimiser;
- all patches are embedded before three quarters are dropped, and the decoder's head also runs on
  visible patches;
- the discriminator judges four sequences one by one, each time with a full singular value
  decomposition in every block, and two more for the model's loss, whose backward pass also computes
  unused gradients of the discriminator's weights;
- the queue is copied behind the keys, repeats are not masked, five numbers are read back.

Corrected, at no cost or a lower one, so that the step trains and has the losses of ``mics_fast``:

- the model's loss reaches the model; fakes are reconstructions of both modalities, pasted into true
  patches, and real sequences are true patches; targets are normalised;
- the decoder has positions and a class token; both passes use the same mask;
- attention by distance prefers near tokens, by the squared distance of tied queries and keys
  (eleven matrices instead of twelve); logits instead of sigmoids;
- teacher and queue advance once per step, not twice; weights are rescaled, not re-created, so that
  they learn;
- the decomposition is that of the queries' matrix (d x d; published: queries, keys and values
  stacked, 3 d x d); the norms of the other matrices come from power iteration (published: none);
- the retained graph is freed when the next step begins, not after its forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from bench.baselines.albef import albef
from mics_fast.data.loaders import PairBatch
from mics_fast.models.discriminator import Discriminator, L2Block
from mics_fast.models.masked_autoencoder import MaskedDecoder, patch_targets, random_mask
from mics_fast.models.sizes import size_of
from mics_fast.models.vit import Attention, Block, VisionTransformer, pool_tokens, take_rows
from mics_fast.options import TrainConfig
from mics_fast.stages.pretrain import PretrainStage
from mics_fast.training.flops import block, contrastive, dense, distance_block, embedding, encoder
from mics_kernels import FeatureQueue


class PublishedStep:
    """The published step on the networks and queues of a stage with two modalities.

    Args:
        stage: provides parameters, buffers and options; its own step is not used.
        optimisers: "model" and "discriminator".
        svd: compute the norms of the queries' matrices by a full decomposition in every forward
            pass of the discriminator, as published; otherwise by one power iteration per step.
    """

    def __init__(
        self, stage: PretrainStage, optimisers: dict[str, Optimizer], *, svd: bool
    ) -> None:
        self.stage, self.optimisers, self.svd = stage, optimisers, svd
        self.kept: Tensor | None = None

    def __call__(self, batch: tuple[PairBatch, ...], step: int) -> dict[str, float]:
        """Train on a batch of complete pairs; return the losses by name."""
        self.release()
        (pairs,) = batch
        masks = self._masks(pairs, step)
        with torch.no_grad():
            first = forward(self.stage, pairs, masks, step)
        self.optimisers["discriminator"].zero_grad()
        losses = {"discriminator": 0.0}
        for sequences, sign in ((first.real, -1), (first.fake, 1)):
            logits = [self._judge(patches) for patches in sequences]
            loss = torch.stack([F.softplus(sign * logit).mean() for logit in logits]).mean()
            loss.backward()
            losses["discriminator"] += loss.item()
        self.optimisers["discriminator"].step()

        second = forward(self.stage, pairs, masks, step)
        logits = [self._judge(patches) for patches in second.fake]
        fooled = torch.stack([F.softplus(-logit).mean() for logit in logits]).mean()
        options = self.stage.config
        total = (
            options.reconstruction_weight * second.reconstruction
            + options.consistency_weight * second.consistency
            + options.adversarial_weight * fooled
        )
        self.optimisers["model"].zero_grad()
        total.backward(retain_graph=True)
        self.kept = total
        self.optimisers["model"].step()
        self._advance(second.teachers, pairs)
        return losses | {
            "adversarial": fooled.item(),
            "reconstruction": second.reconstruction.item(),
            "consistency": second.consistency.item(),
        }

    def release(self) -> None:
        """Free the retained graph and the gradients."""
        self.kept = None
        for optimiser in self.optimisers.values():
            optimiser.zero_grad()

    def _masks(self, pairs: PairBatch, step: int) -> list[tuple[Tensor, Tensor]]:
        stage = self.stage
        count, ratio = stage.size.num_patches, stage.config.mask_ratio
        return [
            random_mask((stage.seed, 0), pairs.sample_id, step, count, ratio, stream)
            for stream in range(len(stage.modalities))
        ]

    def _judge(self, patches: Tensor) -> Tensor:
        """Return the logits (B,) of patch sequences."""
        if self.svd:
            decompose(self.stage.discriminator)
        return judge(self.stage.discriminator, patches)

    @torch.no_grad()
    def _advance(self, teachers: list[Tensor], pairs: PairBatch) -> None:
        """Advance the teacher parameter by parameter, the queues and the power iteration."""
        self.stage.discriminator.advance_power_iteration()
        model, momentum = self.stage.model, self.stage.config.teacher_momentum
        for student, teacher in (
            (model.encoder, model.teacher_encoder),
            (model.projection_head, model.teacher_projection),
        ):
            for new, old in zip(student.parameters(), teacher.parameters(), strict=True):
                old.data = old.data * momentum + new.data * (1.0 - momentum)
        for queue, keys in zip(queues_of(self.stage), teachers, strict=True):
            queue.enqueue(keys, pairs.group_id)


@dataclass
class Forward:
    """Outputs of a forward pass of the model; lists hold one tensor per modality."""

    teachers: list[Tensor]  # (B, P) features
    real: list[Tensor]  # (B, N, patch_dim)
    fake: list[Tensor]  # (B, N, patch_dim)
    reconstruction: Tensor
    consistency: Tensor


def forward(
    stage: PretrainStage, pairs: PairBatch, masks: list[tuple[Tensor, Tensor]], step: int
) -> Forward:
    """Run the whole model on one modality after the other."""
    model = stage.model
    features, teachers, real, fake, errors = [], [], [], [], []
    for images, (visible, hidden) in zip(pairs.views.values(), masks, strict=True):
        pooled = pool_tokens(encode(model.encoder, images), model.pool)
        features.append(F.normalize(model.projection_head(pooled), dim=-1))
        with torch.no_grad():
            pooled = pool_tokens(encode(model.teacher_encoder, images), model.pool)
            teachers.append(F.normalize(model.teacher_projection(pooled), dim=-1))
        predicted = decode(model.decoder, encode(model.encoder, images, visible), visible, hidden)
        target = patch_targets(images, model.patch_size)
        mask = torch.ones(target.shape[:2], device=target.device).scatter(1, visible, 0.0)
        errors.append(((predicted - target).square().mean(-1) * mask).sum() / mask.sum())
        real.append(target)
        fake.append(torch.where(mask.bool().unsqueeze(-1), predicted, target))
    consistency = torch.stack(
        [
            albef(
                features[one],
                teachers[one],
                teachers[other],
                queues_of(stage)[other].features.T,
                temperature=model.temperature(),
                alpha=stage.config.alpha * min(1.0, step / stage.steps_per_epoch),
            )
            for one, other in ((0, 1), (1, 0))
        ]
    ).mean()
    return Forward(teachers, real, fake, torch.stack(errors).mean(), consistency)


def queues_of(stage: PretrainStage) -> list[FeatureQueue]:
    """Return the queue of each modality."""
    return list(cast(Iterable[FeatureQueue], stage.queues))


def encode(vit: VisionTransformer, images: Tensor, visible: Tensor | None = None) -> Tensor:
    """Encode (B, 3, H, W) to (B, 1 + n, width): embed all patches, keep the visible ones."""
    projection = vit.patch_embed.proj
    tokens = F.conv2d(images, projection.weight, projection.bias, stride=vit.patch_size)
    tokens = tokens.flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
    if visible is not None:
        tokens = take_rows(tokens, visible)
    cls_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
    tokens = torch.cat([cls_token, tokens], dim=1)
    for layer in cast(Iterable[Block], vit.blocks):
        tokens = transformer_block(layer, tokens)
    return vit.norm(tokens)


def decode(decoder: MaskedDecoder, tokens: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
    """Decode (B, 1 + n, encoder_width) to (B, N, patch_dim), with predictions for all patches."""
    embedded = decoder.embed(tokens)
    guesses = decoder.mask_token.expand(*hidden.shape, -1)
    patches = torch.cat([embedded[:, 1:], guesses], dim=1)
    restore = torch.cat([visible, hidden], dim=1).argsort(dim=1)
    sequence = torch.cat([embedded[:, :1], take_rows(patches, restore) + decoder.positions], dim=1)
    for layer in cast(Iterable[Block], decoder.blocks):
        sequence = transformer_block(layer, sequence)
    return decoder.head(decoder.norm(sequence))[:, 1:]


def transformer_block(layer: Block, tokens: Tensor) -> Tensor:
    """Run a pre-norm block with materialised attention."""
    tokens = tokens + attend(layer.attn, layer.norm1(tokens))
    return tokens + layer.mlp(layer.norm2(tokens))


def attend(layer: Attention, tokens: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v, materialised."""
    qkv = layer.qkv(tokens).unflatten(-1, (3, layer.heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    return layer.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def judge(discriminator: Discriminator, patches: Tensor) -> Tensor:
    """Map (B, N, patch_dim) to logits (B,)."""
    tokens = discriminator.embed(patches)
    cls_token = discriminator.cls_token.expand(len(tokens), -1, -1)
    tokens = torch.cat([cls_token, tokens], dim=1) + discriminator.pos_embed
    for layer in cast(Iterable[L2Block], discriminator.blocks):
        tokens = judging_block(layer, tokens)
    return discriminator.head(discriminator.norm(tokens[:, 0])).squeeze(-1)


def judging_block(layer: L2Block, tokens: Tensor) -> Tensor:
    """Run a block whose attention weights are softmax_j(-|q_i - q_j|^2 / sqrt(d)), materialised."""
    features = layer.norm1(tokens)
    points = layer.points(features).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    values = layer.values(features).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    squares = points.square().sum(-1, keepdim=True)
    distances = squares + squares.transpose(-2, -1) - 2 * points @ points.transpose(-2, -1)
    weights = (distances * -(points.shape[-1] ** -0.5)).softmax(-1)
    tokens = tokens + layer.proj((weights @ values).transpose(1, 2).flatten(2))
    return tokens + layer.fc2(F.gelu(layer.fc1(layer.norm2(tokens))))


@torch.no_grad()
def decompose(discriminator: Discriminator) -> None:
    """Set the singular vectors of every block's queries by a full decomposition."""
    for layer in cast(Iterable[L2Block], discriminator.blocks):
        left, _, right = torch.linalg.svd(layer.points.weight, full_matrices=False)
        layer.points.u, layer.points.v = left[:, 0], right[0]  # the old ones' graphs need them


def published_flops(config: TrainConfig) -> float:
    """Count the FLOPs of one step on two modalities as ``mics_fast.training.flops`` does.

    The decompositions are not counted.
    """
    options, size, width = config.pretrain, size_of(config.model), config.model.projection
    assert options.queue_size is not None
    batch, images = options.batch_size, 2 * options.batch_size
    visible = size.num_patches - round(size.num_patches * options.mask_ratio)
    whole = encoder(size, size.num_patches) + dense(1, size.width, width)
    masked = (
        embedding(size.num_patches, size.patch_dim, size.width)
        + block(1 + visible, size.width) * size.depth
        + dense(1 + visible, size.width, size.decoder_width)
        + block(1 + size.num_patches, size.decoder_width) * size.decoder_depth
        + dense(1 + size.num_patches, size.decoder_width, size.patch_dim)
    )
    student = (whole + masked) * images
    teacher = (whole * images).forward()
    loss = 2 * contrastive(batch, batch + options.queue_size, width)
    first, second = student.forward() + teacher + loss * 2 / 3, student.trained() + teacher + loss
    tokens, wide = 1 + size.num_patches, size.discriminator_width
    blocks = distance_block(tokens, tokens, wide) * size.discriminator_depth
    judged = (embedding(size.num_patches, size.patch_dim, wide) + blocks) * images
    # The model's loss also computes gradients of the weights, and its input needs one.
    fooled = judged.trained() + judged.first
    return first + second + (judged * 2).trained() + fooled
