"""Stage 1, without labels: consistency, reconstruction, alignment (arXiv 2509.17492).

docs/method.md describes each term and gives its source.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mics_fast.data.batch import PairBatch
from mics_fast.engine.distributed import (
    gather_rows,
    own_first,
    rank,
    sum_over_ranks,
    world_size,
)
from mics_fast.engine.plan import Losses
from mics_fast.models.discriminator import Discriminator
from mics_fast.models.masked_autoencoder import random_mask
from mics_fast.models.pretraining import PretrainModel, PretrainOutput, paste_patches
from mics_fast.models.sizes import Size
from mics_fast.models.vit import Pool, take_rows
from mics_fast.options import CompileScope, PretrainConfig, contrasted_pairs
from mics_fast.stages.adversarial import (
    Sequences,
    fool,
    gradient_ratio,
    judge,
    reversed_gradient,
    with_gradient,
)
from mics_fast.stages.compiled import compile_parts
from mics_fast.stages.health import pretrain_warnings
from mics_fast.stages.means import masked_mean, part_of_mean
from mics_fast.stages.ramp import ramp
from mics_kernels import FeatureQueue, multimodal_consistency_loss, shift_features

TURBO_SHARE = 0.25  # share of the patches that the discriminator sees in the turbo preset
NOISE_KEY = 2**32  # added to the seed: no other random numbers of a run use this key
NOISE_AT_START = 4.0  # standard deviation; that of true patches is 1
NOISE_RANGE = 0.01, 100.0
NOISE_RATE = 0.15  # rate at which the noise follows the discriminator's accuracy
WANTED_ACCURACY = 0.7  # of the discriminator: above chance (0.5), so that it can still teach


@dataclass
class Keys:
    """The teacher's features of a batch, or of a part of one, gathered over ranks in order.

    Args:
        teachers: one (K, P) per modality.
        ids: (K,) int64, contrastive ids.
        present: (K, M) bool.
    """

    teachers: Sequence[Tensor]
    ids: Tensor
    present: Tensor


class PretrainStage(nn.Module):
    """A shared encoder for all modalities, a momentum teacher, a decoder and a discriminator.

    Args:
        config: options of the stage.
        size: of the networks.
        modalities: names, in the order of ``PairBatch.present``.
        pool, projection: see ``options.ModelConfig``.
        queue_size: rows of each modality's queue of negatives.
        steps_per_epoch: for the teacher's share ``alpha``, which grows over the first epoch.
        seed: of the masks.
        autocast: dtype of the encoders' arithmetic, None for float32.
        contrastive_loss: the consistency term, with the arguments of
            ``multimodal_consistency_loss``; benchmarks pass other implementations.
    """

    noise: Tensor

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
        contrastive_loss: Callable[..., Tensor] = multimodal_consistency_loss,
    ) -> None:
        super().__init__()
        self.contrastive_loss = contrastive_loss
        self.config, self.size, self.modalities = config, size, tuple(modalities)
        self.steps_per_epoch, self.seed, self.autocast = steps_per_epoch, seed, autocast
        self.model = PretrainModel(
            size,
            self.modalities,
            pool=pool,
            projection=projection,
            temperature=config.temperature,
            visible_only=config.preset == "turbo",
        )
        self.discriminator = Discriminator(
            size.num_patches,
            size.patch_dim,
            size.discriminator_width,
            size.discriminator_depth,
            size.discriminator_heads,
        )
        self.queues = nn.ModuleList(FeatureQueue(queue_size, projection) for _ in self.modalities)
        self.balances = config.adversarial_weight > 0 and config.adversarial_balance == "adaptive"
        if self.balances:
            self.register_buffer("noise", torch.tensor(NOISE_AT_START))
        self._accuracies: list[Tensor] = []
        self.pairs = contrasted_pairs(config, len(modalities))
        self._keys: list[Keys] = []

    def losses(self, batch: tuple[PairBatch], step: Tensor, share: float = 1.0) -> Iterator[Losses]:
        """Yield the discriminator's loss, then the model's, from one forward pass of the model.

        Args:
            batch: of pairs, or one part of a batch.
            step: 0-d int64.
            share: of the batch that this part makes up; ``after_step`` follows the last part.
        """
        (pairs,) = batch
        config = self.config
        output, sequences = self._forward(pairs, step)
        keys = None
        if self.pairs:
            keys = self._gather(output, pairs)
            self._keys.append(keys)
        terms: dict[str, Tensor] = {}
        weights: dict[str, Tensor | float] = {}
        metrics: dict[str, Tensor | float] = {}
        if sequences is not None:
            terms["adversarial"], ratio = yield from self._align(sequences, share, metrics)
            weights["adversarial"] = config.adversarial_weight * ratio
        alpha = config.alpha * ramp(step, self.steps_per_epoch)
        rest, more = self._model_losses(output, pairs.present, keys, alpha)
        terms |= rest
        weights |= {name: getattr(config, f"{name}_weight") for name in rest}
        on_log = {"teacher_similarity": partial(teacher_similarity, keys)} if keys else {}
        yield Losses("model", terms, weights, metrics | more, on_log)

    @torch.no_grad()
    def after_step(self) -> None:
        """Advance teacher, queues and power iteration by this step's batch."""
        self.model.update_teacher(self.config.teacher_momentum)
        if self.config.adversarial_weight:
            self.discriminator.advance_power_iteration()
        for keys in self._keys:
            for column, queue in enumerate(self._queues()):
                queue.enqueue(keys.teachers[column], keys.ids, keys.present[:, column])
        self._keys = []
        if self.balances:
            self._adapt_noise()

    def compile_parts(self, scope: CompileScope) -> None:
        """Compile each block, or the computation of each optimiser's losses as one graph."""
        methods = ("_forward", "_judge", "_fool", "_adversarial_term", "_model_losses")
        compile_parts(self, scope, methods)

    def networks(self) -> list[nn.Module]:
        """Return the networks that ``shard_parameters`` splits: all large ones but the
        discriminator."""
        return [self.model.encoder, self.model.teacher_encoder, self.model.decoder]

    def warnings(self, record: Mapping[str, float]) -> list[str]:
        """Return warnings about a log record."""
        return pretrain_warnings(self.config, record)

    def _align(
        self, sequences: Sequences, share: float, metrics: dict[str, Tensor | float]
    ) -> Generator[Losses, None, tuple[Tensor, Tensor | float]]:
        """Yield the discriminator's loss; return the model's adversarial term and its ratio."""
        simultaneous = self.config.adversarial == "simultaneous"
        leaf = sequences.fake.detach().requires_grad_(simultaneous)
        loss, logits, accuracy = self._judge(sequences, leaf)
        metrics["discriminator_accuracy"] = accuracy
        if self.balances:
            metrics["discriminator_noise"] = self.noise.clone()
            self._accuracies.append(accuracy)
        yield Losses("discriminator", {"discriminator": loss})
        if simultaneous:
            assert leaf.grad is not None, "no backward pass was made"
            loss, gradient, clamped = reversed_gradient(sequences, leaf.grad / share, logits)
            metrics["adversarial_clamped"] = clamped
        else:
            leaf = sequences.fake.detach().requires_grad_()
            loss = self._fool(sequences, leaf)
            (gradient,) = torch.autograd.grad(loss, leaf)
        return self._adversarial_term(sequences, loss.detach(), gradient)

    @torch.no_grad()
    def _adapt_noise(self) -> None:
        """Raise the noise if the discriminator is too accurate, lower it otherwise."""
        accuracy = sum_over_ranks(torch.stack(self._accuracies).mean()) / world_size()
        self._accuracies = []
        self.noise *= torch.exp(NOISE_RATE * (accuracy - WANTED_ACCURACY))
        self.noise.clamp_(*NOISE_RANGE)

    def _forward(self, pairs: PairBatch, step: Tensor) -> tuple[PretrainOutput, Sequences | None]:
        """Run the model on a batch; also return the sequences for the discriminator."""
        seed, patches = (self.seed, 0), self.size.num_patches
        masks = {
            name: random_mask(seed, pairs.sample_id, step, patches, self.config.mask_ratio, stream)
            for stream, name in enumerate(self.modalities)
        }
        device = pairs.label.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            output = self.model(pairs.views, masks, pairs.teacher, contrast=bool(self.pairs))
        if not self.config.adversarial_weight:
            return output, None
        return output, self._sequences(output, pairs, step)

    def _sequences(self, output: PretrainOutput, pairs: PairBatch, step: Tensor) -> Sequences:
        """Return true and reconstructed patches; in the turbo preset a random quarter of them."""
        real, fake = self._stack(output.targets), self._stack(self._reconstructions(output))
        present = pairs.present.T.flatten()
        if self.config.preset == "paper":
            return Sequences(real, fake, None, present, self._noise_like(real, pairs, step))
        streams = [len(self.modalities) + column for column in range(len(self.modalities))]
        patches = self.size.num_patches
        drawn = [
            random_mask((self.seed, 0), pairs.sample_id, step, patches, 1 - TURBO_SHARE, stream)[0]
            for stream in streams
        ]
        places = torch.cat(drawn)
        real, fake = take_rows(real, places), take_rows(fake, places)
        return Sequences(real, fake, places, present, self._noise_like(real, pairs, step))

    @torch.no_grad()
    def _noise_like(self, patches: Tensor, pairs: PairBatch, step: Tensor) -> Tensor | None:
        """Draw normal noise per image, a function of seed, step, sample and modality."""
        if not self.balances:
            return None
        seed = torch.stack([torch.full_like(step, self.seed + NOISE_KEY), step])
        count = len(self.modalities)
        rows = [pairs.sample_id * count + column for column in range(count)]
        nothing = torch.zeros_like(patches).flatten(1)
        noise = shift_features(
            nothing,
            torch.zeros_like(pairs.sample_id).repeat(count),
            torch.ones_like(nothing[:1]),
            strength=self.noise.to(nothing.dtype).expand(len(nothing)),
            seed=seed,
            row_ids=torch.cat(rows),
        )
        return noise.view_as(patches)

    def _queues(self) -> list[FeatureQueue]:
        return [queue for queue in self.queues if isinstance(queue, FeatureQueue)]

    def _reconstructions(self, output: PretrainOutput) -> dict[str, Tensor]:
        """Return predictions on the masked patches and true values elsewhere."""
        return {
            name: paste_patches(output.targets[name], output.hidden[name], predicted)
            for name, predicted in output.predictions.items()
        }

    def _stack(self, by_modality: dict[str, Tensor]) -> Tensor:
        """Stack modalities along the batch, in the order of ``present.T.flatten()``."""
        return torch.cat([by_modality[name] for name in self.modalities])

    def _judge(self, sequences: Sequences, leaf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return judge(self.discriminator, sequences, leaf)

    def _fool(self, sequences: Sequences, leaf: Tensor) -> Tensor:
        return fool(self.discriminator, sequences, leaf)

    def _adversarial_term(
        self, sequences: Sequences, loss: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """Return the adversarial term, and a factor for its weight."""
        term = with_gradient(sequences, loss, gradient)
        if not (self.balances and self.config.reconstruction_weight):
            return term, 1.0
        size = self.size
        predicted = round(size.num_patches * self.config.mask_ratio) * size.patch_dim
        scale = self.config.reconstruction_weight / predicted
        return term, gradient_ratio(sequences, gradient, scale)

    def _model_losses(
        self, output: PretrainOutput, present: Tensor, keys: Keys | None, alpha: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
        """Compute the model's own enabled terms, and further values to log."""
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor | float] = {"temperature": self.model.temperature().detach()}
        if self.config.reconstruction_weight:
            terms["reconstruction"] = self._reconstruction(output, present)
        if keys is not None:
            terms["consistency"] = self._consistency(output, keys, alpha)
            metrics |= self._health(output, present)
        return terms, metrics

    def _reconstruction(self, output: PretrainOutput, present: Tensor) -> Tensor:
        """Compute the mean squared error on the masked patches of present images (MAE)."""
        errors = []
        for name in self.modalities:
            hidden = output.hidden[name].unsqueeze(-1)
            truth = torch.take_along_dim(output.targets[name], hidden, dim=1)
            errors.append((output.predictions[name] - truth).square().mean((1, 2)))
        return masked_mean(torch.stack(errors, 1), present)

    @torch.no_grad()
    def _health(self, output: PretrainOutput, present: Tensor) -> dict[str, Tensor]:
        """Compute the mean cosine of positives, and the queue's age in steps."""
        positives, complete = [], []
        for a, b in self.pairs:
            own, other = output.features[self.modalities[a]], output.teachers[self.modalities[b]]
            positives.append((own * other).sum(-1))
            complete.append(present[:, a] & present[:, b])
        lengths = torch.stack([queue.length for queue in self._queues()])
        return {
            "positive_similarity": masked_mean(torch.stack(positives), torch.stack(complete)),
            "queue_age": lengths.amax() / self.config.batch_size,
        }

    def _gather(self, output: PretrainOutput, pairs: PairBatch) -> Keys:
        """Gather the keys for the queries of all ranks, which also enter every queue."""
        teachers = gather_rows(torch.cat([output.teachers[name] for name in self.modalities], 1))
        return Keys(
            teachers.chunk(len(self.modalities), dim=1),
            gather_rows(pairs.group_id),
            gather_rows(pairs.present),
        )

    def _consistency(self, output: PretrainOutput, keys: Keys, alpha: Tensor) -> Tensor:
        """Compute the soft-target contrastive loss over pairs of student and teacher (ALBEF)."""
        queues = self._queues()
        features = [output.features[name] for name in self.modalities]
        present = own_first(keys.present)
        total = self.contrastive_loss(
            features,
            [output.teachers[name] for name in self.modalities],
            [queue.features for queue in queues],
            keys=[own_first(teachers) for teachers in keys.teachers],
            temperature=self.model.temperature(),
            alpha=alpha,
            queue_lengths=[queue.length for queue in queues],
            key_ids=own_first(keys.ids),
            queue_ids=[queue.ids for queue in queues],
            present=present,
            pairs=self.pairs,
            reduction="sum",
        )
        there = present[: len(features[0])].unbind(1)
        complete = torch.stack([there[a] & there[b] for a, b in self.pairs])
        return part_of_mean(total, complete.sum())


@torch.no_grad()
def teacher_similarity(keys: Keys) -> Tensor:
    """Compute the mean cosine between teacher features of different groups, a sign of collapse.

    Each rank compares its own rows with all keys, so memory grows with the global batch, not with
    its square.

    Args:
        keys: gathered over all ranks.

    Returns:
        This rank's share of the mean, 0-d; see ``masked_mean``.
    """
    rows = len(keys.ids) // world_size()
    own = slice(rank() * rows, (rank() + 1) * rows)
    teachers, there = torch.stack(list(keys.teachers)), keys.present.T
    others = keys.ids[own].unsqueeze(1) != keys.ids.unsqueeze(0)
    both = there[:, own].unsqueeze(2) & there.unsqueeze(1) & others
    return masked_mean(teachers[:, own] @ teachers.mT, both)
