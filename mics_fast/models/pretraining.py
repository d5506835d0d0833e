"""The model of the first stage: a shared encoder, its momentum teacher, and the decoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mics_fast.common.errors import InputError
from mics_fast.models.masked_autoencoder import MaskedDecoder, patch_targets
from mics_fast.models.sizes import Size
from mics_fast.models.vit import (
    Pool,
    at_least_float32,
    pool_tokens,
    tokens_read,
)

LOWEST_TEMPERATURE, TEMPERATURE_RANGE = 0.001, 0.499


@dataclass
class PretrainOutput:
    """Inputs of the losses of the first stage, each keyed by modality.

    Their dtype is float32, or float64 after ``.double()``. Features and teachers are empty with
    ``contrast=False``.

    Args:
        features: (B, P), L2-normalised, of the student.
        teachers: (B, P), L2-normalised, of the momentum teacher; no gradient.
        predictions: (B, h, patch_dim), the decoder's predictions of the masked patches.
        targets: (B, N, patch_dim), the normalised patches of the image.
        hidden: (B, h) int64, indices of the masked patches.
    """

    features: dict[str, Tensor]
    teachers: dict[str, Tensor]
    predictions: dict[str, Tensor]
    targets: dict[str, Tensor]
    hidden: dict[str, Tensor]


def paste_patches(targets: Tensor, hidden: Tensor, predictions: Tensor) -> Tensor:
    """Replace the masked patches of an image by their predictions.

    Args:
        targets: (B, N, patch_dim), the true normalised patches.
        hidden: (B, h) int64, the patches to replace.
        predictions: (B, h, patch_dim), in the dtype of ``targets``; gets a gradient.

    Returns:
        (B, N, patch_dim).
    """
    return targets.scatter(1, hidden.unsqueeze(-1).expand_as(predictions), predictions)


class PretrainModel(nn.Module):
    """The networks of pre-training, except the discriminator.

    Args:
        size: of the networks.
        modalities: names of the modalities; one encoder serves them all.
        pool: input of the contrastive feature: "cls" or "mean".
        projection: width P of the contrastive feature.
        temperature: initial value, within (0.001, 0.5).
        visible_only: compute the student's contrastive features from the visible patches only, so
            that it needs no second forward pass (Assran et al., Masked Siamese Networks, 2022).

    Raises:
        InputError: the temperature is outside its range.
    """

    def __init__(
        self,
        size: Size,
        modalities: Sequence[str],
        *,
        pool: Pool,
        projection: int,
        temperature: float,
        visible_only: bool = False,
    ) -> None:
        super().__init__()
        share = (temperature - LOWEST_TEMPERATURE) / TEMPERATURE_RANGE
        if not 0 < share < 1:
            raise InputError(
                f"temperature is {temperature:g}, wanted a number between "
                f"{LOWEST_TEMPERATURE:g} and {LOWEST_TEMPERATURE + TEMPERATURE_RANGE:g}"
            )
        self.modalities = tuple(modalities)
        self.pool, self.visible_only = pool, visible_only
        self.patch_size = size.patch
        self.encoder = size.encoder()
        self.projection_head = nn.Linear(size.width, projection)
        self.decoder = MaskedDecoder(
            size.num_patches,
            size.patch_dim,
            size.width,
            size.decoder_width,
            size.decoder_depth,
            size.decoder_heads,
        )
        self.theta = nn.Parameter(torch.tensor(math.log(share / (1 - share))))
        self.teacher_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.teacher_projection = copy.deepcopy(self.projection_head).requires_grad_(False)

    def temperature(self) -> Tensor:
        """Return the contrastive temperature, 0-d, within (0.001, 0.5); differentiable."""
        return LOWEST_TEMPERATURE + TEMPERATURE_RANGE * self.theta.sigmoid()

    def forward(
        self,
        views: dict[str, Tensor],
        masks: dict[str, tuple[Tensor, Tensor]],
        teacher_views: dict[str, Tensor] | None = None,
        *,
        contrast: bool = True,
    ) -> PretrainOutput:
        """Encode every view: masked, whole, and by the teacher. Changes no state.

        Args:
            views: modality -> (B, 3, image, image), normalised. Rows of a missing modality hold any
                finite numbers; the losses ignore them.
            masks: modality -> (visible, hidden) from ``random_mask``.
            teacher_views: views for the teacher, of the same shapes; None: ``views``.
            contrast: also compute the contrastive features; otherwise whole views are not encoded.
        """
        images = torch.cat([views[name] for name in self.modalities])
        visible = torch.cat([masks[name][0] for name in self.modalities])
        hidden = torch.cat([masks[name][1] for name in self.modalities])
        targets = patch_targets(images, self.patch_size)
        tokens = self.encoder(images, visible)
        features, teachers = {}, {}
        if contrast:
            wanted = tokens_read(self.pool)
            whole = tokens if self.visible_only else self.encoder(images, wanted=wanted)
            features = self._by_modality(self._features(whole, self.projection_head))
            with torch.no_grad():
                if teacher_views is not None:
                    images = torch.cat([teacher_views[name] for name in self.modalities])
                taught = self.teacher_encoder(images, wanted=wanted)
                teachers = self._by_modality(self._features(taught, self.teacher_projection))
        predictions = at_least_float32(self.decoder(tokens, visible, hidden))
        return PretrainOutput(
            features=features,
            teachers=teachers,
            predictions=self._by_modality(predictions),
            targets=self._by_modality(targets),
            hidden=self._by_modality(hidden),
        )

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Update the teacher: teacher = momentum * teacher + (1 - momentum) * student.

        Source: He et al., Momentum Contrast, CVPR 2020, equation 2.
        """
        # Child by child: each is sharded as a whole or not at all.
        for teacher, student in (
            (self.teacher_encoder, self.encoder),
            (self.teacher_projection, self.projection_head),
        ):
            torch._foreach_lerp_(
                list(teacher.parameters()), list(student.parameters()), 1 - momentum
            )

    def _features(self, tokens: Tensor, projection: nn.Linear) -> Tensor:
        pooled = pool_tokens(tokens, self.pool)
        return F.normalize(at_least_float32(projection(pooled)), dim=-1)

    def _by_modality(self, stacked: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.modalities, stacked.chunk(len(self.modalities)), strict=True))
