"""Alignment: the discriminator's loss, and the model's adversarial loss.

Samples in the discriminator's batch are independent, so its own backward pass also yields the
model's gradient, up to a factor per sample: with logit l of a reconstruction x,

    d softplus(-l) / dx = -sigmoid(-l) dl/dx = r d softplus(l) / dx,    r = -exp(-l).

``judge``, ``fool`` and ``fool_by_gradient`` have no side effects: each compiles into one graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import softplus

from mics_fast.engine.distributed import sum_over_ranks, world_size
from mics_fast.models.discriminator import Discriminator
from mics_fast.stages.means import masked_mean

# |r| is at most exp(10), so that a reconstruction recognised with certainty does not dominate.
LOWEST_LOGIT = -10.0
LARGEST_RATIO = 1e4


@dataclass
class Sequences:
    """Patch sequences of all modalities, stacked along the batch (R = M * B rows).

    Args:
        real: (R, n, patch_dim), true normalised patches.
        fake: (R, n, patch_dim), true where visible, predicted where masked; gets a gradient.
        places: (R, n) int64, positions of the patches in the image; None: all, in order.
        present: (R,) bool, False for missing images.
        noise: (R, n, patch_dim), added to both before the discriminator; None: no noise.
    """

    real: Tensor
    fake: Tensor
    places: Tensor | None
    present: Tensor
    noise: Tensor | None = None

    def seen(self, patches: Tensor) -> Tensor:
        """Return the patches as the discriminator sees them."""
        return patches if self.noise is None else patches + self.noise


def judge(
    discriminator: Discriminator, sequences: Sequences, leaf: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the discriminator's loss on true and reconstructed sequences, in one forward pass.

    Args:
        discriminator: gets gradients.
        sequences: true and reconstructed; no gradient.
        leaf: ``sequences.fake`` detached from the model; gets a gradient if it requires one.

    Returns:
        The loss, 0-d; the logits of the reconstructions, (R,), and the discriminator's accuracy,
        0-d, both without gradient.
    """
    places = sequences.places
    twice = None if places is None else torch.cat([places, places])
    patches = torch.cat([sequences.seen(sequences.real), sequences.seen(leaf)])
    on_real, on_fake = discriminator(patches, twice).chunk(2)
    loss = masked_mean(softplus(-on_real) + softplus(on_fake), sequences.present)
    with torch.no_grad():
        right = ((on_real > 0).to(loss.dtype) + (on_fake < 0).to(loss.dtype)) / 2
        accuracy = masked_mean(right, sequences.present)
    return loss, on_fake.detach(), accuracy


def fool(discriminator: Discriminator, sequences: Sequences, leaf: Tensor) -> Tensor:
    """Compute the model's loss, 0-d, by a separate forward pass without discriminator gradients.

    Args:
        discriminator: the judge.
        sequences: give places, present images and noise.
        leaf: ``sequences.fake`` detached from the model; gets a gradient.
    """
    # Not by a temporary ``requires_grad_(False)``: torch 2.10 would then reuse the blocks compiled
    # for frozen weights in the discriminator's own step.
    frozen = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    logits = functional_call(discriminator, frozen, (sequences.seen(leaf), sequences.places))
    return masked_mean(softplus(-logits), sequences.present)


def reversed_gradient(
    sequences: Sequences, gradient: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derive the model's loss and its gradient from the backward pass of ``judge``.

    Args:
        sequences: give the present images.
        gradient: (R, n, patch_dim), of ``judge``'s loss with respect to ``leaf``. Both losses are
            means over the same rows, so their divisors cancel.
        logits: (R,), of the reconstructions.

    Returns:
        The value of ``fool``, 0-d; its gradient with respect to the reconstructions, for the
        weights before the discriminator's step; and the share of logits below -10, whose gradient
        is clamped to that at -10.
    """
    ratio = -torch.exp(-logits.clamp(min=LOWEST_LOGIT))
    loss = masked_mean(softplus(-logits), sequences.present)
    clamped = masked_mean((logits < LOWEST_LOGIT).to(logits.dtype), sequences.present)
    return loss, gradient * ratio[:, None, None], clamped


def with_gradient(sequences: Sequences, loss: Tensor, gradient: Tensor) -> Tensor:
    """Return a loss, 0-d, with the given gradient with respect to ``sequences.fake``."""
    surrogate = (sequences.fake * gradient).sum()
    return surrogate + (loss - surrogate).detach()


@torch.no_grad()
def gradient_ratio(sequences: Sequences, gradient: Tensor, scale: float) -> Tensor:
    """Compute the ratio of the reconstruction's to the adversary's gradient norm, at most 10,000.

    Both norms are over the predicted patches that are judged, which are the decoder's output, so
    no backward pass is needed. VQGAN takes the norms in the last layer's weights instead, which
    see both through the same inputs.

    Args:
        sequences: give the errors of the reconstruction.
        gradient: (R, n, patch_dim), of the adversarial loss with respect to ``fake``.
        scale: weight of an image's squared error, summed over its predicted patches.

    Source: Esser et al., Taming Transformers, CVPR 2021, equation 7.
    """
    errors = sequences.fake - sequences.real  # 0 where a patch is visible
    predicted = (errors != 0).any(-1, keepdim=True)
    there = sequences.present[:, None, None]
    # In the dtype of the errors: a float divided by an integer tensor would be float32.
    images = sum_over_ranks(sequences.present.sum()).clamp(min=1).to(errors.dtype)
    ours = torch.where(there, 2 * errors, torch.zeros_like(errors)) * (
        scale * world_size() / images
    )
    theirs = torch.where(there & predicted, gradient, torch.zeros_like(gradient))
    squares = sum_over_ranks(torch.stack([ours.square().sum(), theirs.square().sum()]))
    return (
        (squares[0] / squares[1].clamp(min=torch.finfo(squares.dtype).tiny))
        .sqrt()
        .clamp(max=LARGEST_RATIO)
    )
