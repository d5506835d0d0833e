"""Stage 1, without labels: consistency, reconstruction, alignment (arXiv 2509.17492).

What each term is and where it comes from: docs/method.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from mics_fast.config import PretrainConfig
from mics_fast.data.pipeline import PairBatch
from mics_fast.engine.loop import Losses
from mics_fast.models.discriminator import Discriminator
from mics_fast.models.masked_autoencoder import random_mask
from mics_fast.models.pretraining import PretrainModel, PretrainOutput, paste_patches
from mics_fast.models.sizes import Size
from mics_fast.models.vit import Pool
from mics_fast.stages.means import masked_mean
from mics_kernels import FeatureQueue, multimodal_consistency_loss


class PretrainStage(nn.Module):
    """One shared encoder for all modalities, a momentum teacher, a decoder, a discriminator.

    Args:
        config: options of the stage.
        size: of the networks.
        modalities: names, in the order of ``PairBatch.present``.
        pool, projection: see ``config.ModelConfig``.
        queue_size: rows of each modality's queue of negatives.
        steps_per_epoch: the teacher's share ``alpha`` grows over the first epoch.
        seed: of the masks.
        autocast: dtype of the encoders' arithmetic, None for float32.
    """

    def __init__(
        self,
        config: PretrainConfig,
        size: Size,
        modalities: Sequence[str],
        *,
        pool: Pool,
        projection: int,
        queue_size: int,
        steps_per_epoch: int,
        seed: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.size, self.modalities = config, size, tuple(modalities)
        self.steps_per_epoch, self.seed, self.autocast = steps_per_epoch, seed, autocast
        self.model = PretrainModel(
            size,
            self.modalities,
            pool=pool,
            projection=projection,
            temperature=config.temperature,
        )
        self.discriminator = Discriminator(
            size.num_patches,
            size.patch_dim,
            size.discriminator_width,
            size.discriminator_depth,
            size.discriminator_heads,
        )
        self.queues = nn.ModuleList(FeatureQueue(queue_size, projection) for _ in self.modalities)
        # Of each part of a step's batch: its teachers' features, and its rows.
        self._seen: list[tuple[dict[str, Tensor], PairBatch]] = []

    def losses(self, batch: tuple[PairBatch], step: int) -> Iterator[Losses]:
        """The discriminator's loss, then the model's: one forward of the model for both."""
        (pairs,) = batch
        config = self.config
        output = self._forward(pairs, step)
        terms: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        metrics: dict[str, Tensor | float] = {"temperature": self.model.temperature().detach()}
        if config.adversarial_weight:
            real = self._patches(output.targets)
            fake = self._patches(self._reconstructions(output))
            present = pairs.present.T.flatten()
            yield Losses("discriminator", {"discriminator": self._judge(real, fake, present)})
            terms["adversarial"] = self._fool(fake, present)
            weights["adversarial"] = config.adversarial_weight
        if config.reconstruction_weight:
            terms["reconstruction"] = self._reconstruction(output, pairs.present)
            weights["reconstruction"] = config.reconstruction_weight
        if config.consistency_weight and len(self.modalities) > 1:
            terms["consistency"] = self._consistency(output, pairs, step)
            weights["consistency"] = config.consistency_weight
        self._seen.append((output.teachers, pairs))
        yield Losses("model", terms, weights, metrics)

    @torch.no_grad()
    def after_step(self) -> None:
        """Advance the teacher and the queues by this step's batch, once."""
        self.model.update_teacher(self.config.teacher_momentum)
        for teachers, batch in self._seen:
            for column, name in enumerate(self.modalities):
                present = batch.present[:, column]
                self._queues()[column].enqueue(teachers[name], batch.group_id, present)
        self._seen.clear()

    def _forward(self, pairs: PairBatch, step: int) -> PretrainOutput:
        masks = {
            name: random_mask(
                (self.seed, 0),
                pairs.sample_id,
                step,
                self.size.num_patches,
                self.config.mask_ratio,
                stream,
            )
            for stream, name in enumerate(self.modalities)
        }
        device = pairs.label.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return self.model(pairs.views, masks)

    def _queues(self) -> list[FeatureQueue]:
        return [queue for queue in self.queues if isinstance(queue, FeatureQueue)]

    def _reconstructions(self, output: PretrainOutput) -> dict[str, Tensor]:
        """Predictions on the hidden patches, true values elsewhere."""
        return {
            name: paste_patches(output.targets[name], output.hidden[name], predicted)
            for name, predicted in output.predictions.items()
        }

    def _patches(self, by_modality: dict[str, Tensor]) -> Tensor:
        """Modalities stacked along the batch, in the order of ``present.T.flatten()``."""
        return torch.cat([by_modality[name] for name in self.modalities])

    def _judge(self, real: Tensor, fake: Tensor, present: Tensor) -> Tensor:
        """The discriminator's loss on true and on (detached) reconstructed patch sequences."""
        if not self._seen:  # once a step, before its first part
            self.discriminator.advance_power_iteration()
        logits = self.discriminator(torch.cat([real, fake.detach()]))
        on_real, on_fake = logits.chunk(2)
        return masked_mean(softplus(-on_real) + softplus(on_fake), present)

    def _fool(self, fake: Tensor, present: Tensor) -> Tensor:
        """The model's loss through a discriminator whose weights stand still."""
        self.discriminator.requires_grad_(False)
        loss = masked_mean(softplus(-self.discriminator(fake)), present)
        self.discriminator.requires_grad_(True)
        return loss

    def _reconstruction(self, output: PretrainOutput, present: Tensor) -> Tensor:
        """Mean squared error on the hidden patches of the images that are there (MAE)."""
        errors = []
        for name in self.modalities:
            hidden = output.hidden[name].unsqueeze(-1)
            truth = torch.take_along_dim(output.targets[name], hidden, dim=1)
            errors.append((output.predictions[name] - truth).square().mean((1, 2)))
        return masked_mean(torch.stack(errors, 1), present)

    def _consistency(self, output: PretrainOutput, pairs: PairBatch, step: int) -> Tensor:
        """Soft-target contrastive loss over ordered pairs of modalities (ALBEF)."""
        queues = self._queues()
        return multimodal_consistency_loss(
            [output.features[name] for name in self.modalities],
            [output.teachers[name] for name in self.modalities],
            [queue.features for queue in queues],
            temperature=self.model.temperature(),
            alpha=self.config.alpha * min(1.0, step / self.steps_per_epoch),
            queue_lengths=[queue.length for queue in queues],
            key_ids=pairs.group_id,
            queue_ids=[queue.ids for queue in queues],
            present=pairs.present,
        )
