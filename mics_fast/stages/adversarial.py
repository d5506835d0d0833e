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

from mics_fast.engine.distributed import sum_over_ranks, world_size
from mics_fast.models.discriminator import Discriminator
from mics_fast.stages.means import masked_mean

# r is at most exp(10); a reconstruction seen through so surely would drown all others.
LOWEST_LOGIT = -10.0
LARGEST_RATIO = 1e4


@dataclass
class Sequences:
    """Patch sequences of all modalities, stacked along the batch (R = M * B rows).

    Args:
        real: (R, n, patch_dim), the true normalised patches.
        fake: (R, n, patch_dim), true where visible, predicted where hidden; gets a gradient.
        places: (R, n) int64, which patches of the image they are; None: all, in order.
        present: (R,) bool, which images are there.
        noise: (R, n, patch_dim), added to both before they are judged; None: nothing.
    """

    real: Tensor
    fake: Tensor
    places: Tensor | None
    present: Tensor
    noise: Tensor | None = None

    def seen(self, patches: Tensor) -> Tensor:
        """Patches as the discriminator sees them."""
        return patches if self.noise is None else patches + self.noise


def judge(
    discriminator: Discriminator, sequences: Sequences, leaf: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The discriminator's loss on true and reconstructed sequences, in one forward.

    Args:
        discriminator: gets gradients.
        sequences: what to tell apart; no gradient.
        leaf: ``sequences.fake`` cut off from the model; gets a gradient where it asks for one.

    Returns:
        0-d loss; the logits (R,) of the reconstructions and the share of sequences that were
        judged rightly, 0-d, both without a gradient.
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
    """The model's loss, 0-d, by a forward of its own; the discriminator gets no gradient.

    Args:
        discriminator: judges.
        sequences: the places, images and noise of the reconstructions.
        leaf: ``sequences.fake`` cut off from the model; gets a gradient.
    """
    # Not by ``requires_grad_(False)`` for the time being: torch 2.10 would take blocks that it has
    # compiled for frozen weights for those of the discriminator's own step.
    frozen = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    logits = functional_call(discriminator, frozen, (sequences.seen(leaf), sequences.places))
    return masked_mean(softplus(-logits), sequences.present)


def reversed_gradient(
    sequences: Sequences, gradient: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The model's loss and its gradient from the backward pass of ``judge``.

    Args:
        sequences: which images are there.
        gradient: (R, n, patch_dim), of ``judge``'s loss in ``leaf``. Both losses are means over
            the same rows, so their divisors cancel.
        logits: (R,), of the reconstructions.

    Returns:
        The value of ``fool``, 0-d, and its gradient in the reconstructions under the weights that
        judged; and the share of logits below -10, whose gradient is held at that of -10.
    """
    ratio = -torch.exp(-logits.clamp(min=LOWEST_LOGIT))
    loss = masked_mean(softplus(-logits), sequences.present)
    clamped = masked_mean((logits < LOWEST_LOGIT).to(logits.dtype), sequences.present)
    return loss, gradient * ratio[:, None, None], clamped


def with_gradient(sequences: Sequences, loss: Tensor, gradient: Tensor) -> Tensor:
    """A loss, 0-d, whose gradient in ``sequences.fake`` is the given one."""
    surrogate = (sequences.fake * gradient).sum()
    return surrogate + (loss - surrogate).detach()


@torch.no_grad()
def gradient_ratio(sequences: Sequences, gradient: Tensor, scale: float) -> Tensor:
    """How much larger the reconstruction's gradient is than the adversary's, 0-d, at most 10,000.

    Both are norms over the predicted patches that are judged, which are the decoder's last output:
    so no backward pass is needed. The last layer's weights, of which VQGAN takes the norms, see
    both through the same inputs.

    Args:
        sequences: their errors are those of the reconstruction.
        gradient: (R, n, patch_dim), of the adversarial loss in ``fake``.
        scale: weight of an image's squared error, summed over its predicted patches.

    Source: Esser et al., Taming Transformers, CVPR 2021, equation 7.
    """
    errors = sequences.fake - sequences.real  # 0 where a patch is visible
    predicted = (errors != 0).any(-1, keepdim=True)
    there = sequences.present[:, None, None]
    # In the dtype of the errors: a number over an integer tensor would be float32.
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
