"""Alignment: the discriminator's loss, and what the model learns through the discriminator.

Nothing couples the samples of the discriminator's batch, so its own backward pass holds the model's
gradient, too, up to a factor a sample: with logit l of a reconstruction x,

    d softplus(-l) / dx = -sigmoid(-l) dl/dx = r d softplus(l) / dx,    r = -exp(-l).

``judge``, ``fool`` and ``fool_by_gradient`` change nothing: they compile into one graph each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import softplus

from mics_fast.models.discriminator import Discriminator
from mics_fast.stages.means import masked_mean

# r is at most exp(10); a reconstruction seen through so surely would drown all others.
LOWEST_LOGIT = -10.0


@dataclass
class Sequences:
    """Patch sequences of all modalities, stacked along the batch (R = M * B rows).

    Args:
        real: (R, n, patch_dim), the true normalised patches.
        fake: (R, n, patch_dim), true where visible, predicted where hidden; gets a gradient.
        places: (R, n) int64, which patches of the image they are; None: all, in order.
        present: (R,) bool, which images are there.
    """

    real: Tensor
    fake: Tensor
    places: Tensor | None
    present: Tensor


def judge(
    discriminator: Discriminator, sequences: Sequences, leaf: Tensor
) -> tuple[Tensor, Tensor]:
    """The discriminator's loss on true and reconstructed sequences, in one forward.

    Args:
        discriminator: gets gradients.
        sequences: what to tell apart; no gradient.
        leaf: ``sequences.fake`` cut off from the model; gets a gradient where it asks for one.

    Returns:
        0-d loss, and the logits (R,) of the reconstructions, without a gradient.
    """
    places = sequences.places
    twice = None if places is None else torch.cat([places, places])
    logits = discriminator(torch.cat([sequences.real, leaf]), twice)
    on_real, on_fake = logits.chunk(2)
    loss = masked_mean(softplus(-on_real) + softplus(on_fake), sequences.present)
    return loss, on_fake.detach()


def fool(discriminator: Discriminator, sequences: Sequences) -> Tensor:
    """The model's loss, 0-d, by a forward of its own; the discriminator gets no gradient."""
    # Not by ``requires_grad_(False)`` for the time being: torch 2.10 would take blocks that it has
    # compiled for frozen weights for those of the discriminator's own step.
    frozen = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    logits = functional_call(discriminator, frozen, (sequences.fake, sequences.places))
    return masked_mean(softplus(-logits), sequences.present)


def fool_by_gradient(
    sequences: Sequences, gradient: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """The model's loss from the backward pass of ``judge``, without another look at a network.

    Args:
        sequences: their ``fake`` gets the gradient.
        gradient: (R, n, patch_dim), of ``judge``'s loss in ``leaf``. Both losses are means over
            the same rows, so their divisors cancel.
        logits: (R,), of the reconstructions.

    Returns:
        0-d loss with the value and the gradient of ``fool`` under the weights that judged, and the
        share of logits below -10, whose gradient is held at that of -10.
    """
    with torch.no_grad():
        ratio = -torch.exp(-logits.clamp(min=LOWEST_LOGIT))
        direction = gradient * ratio[:, None, None]
        loss = masked_mean(softplus(-logits), sequences.present)
        clamped = masked_mean((logits < LOWEST_LOGIT).to(logits.dtype), sequences.present)
    surrogate = (sequences.fake * direction).sum()
    return surrogate + (loss - surrogate).detach(), clamped
