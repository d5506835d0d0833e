"""Stage 2, few labels: evidential fusion, pseudo-labels, distribution shift (arXiv 2509.17492).

docs/method.md describes each term and gives its source.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from mics_fast.data.batch import PairBatch
from mics_fast.engine.distributed import gather_rows
from mics_fast.engine.plan import Losses
from mics_fast.models.classifier import FUSION, Classifier, ClassifierOutput
from mics_fast.options import CompileScope, FinetuneConfig
from mics_fast.stages.compiled import compile_parts
from mics_fast.stages.dropout import drop_modalities
from mics_fast.stages.health import finetune_warnings
from mics_fast.stages.means import masked_mean, moments_over_ranks
from mics_fast.stages.pseudo_labels import (
    NO_LABEL,
    PseudoLabels,
    make_alignment,
    make_limits,
    propose,
)
from mics_fast.stages.ramp import ramps
from mics_kernels import (
    ClassStatistics,
    class_moments,
    evidential_fusion_loss,
    evidential_loss,
    opinion,
    shift_features,
    shifted_cross_entropy,
)

Seen = tuple[Tensor, Tensor, Tensor]  # features (R, D), labels (R,), weights (R,)


@dataclass
class Rows:
    """The rows of the student's forward pass: labelled ones, then unlabelled ones.

    Args:
        views: modality -> (R, 3, H, W): weak views of labelled, strong views of unlabelled rows.
        present: (R, M) bool.
        sample_id: (R,) int64.
        label: (R,) int64, a label or an accepted pseudo-label; ``NO_LABEL`` if there is neither.
        weight: (R,): 1 for a label, 1 - uncertainty for a pseudo-label.
        sizes: number of labelled and of unlabelled rows.
    """

    views: dict[str, Tensor]
    present: Tensor
    sample_id: Tensor
    label: Tensor
    weight: Tensor
    sizes: tuple[int, int]

    def means(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Average over all labelled and over all unlabelled rows; 0 without rows."""
        labelled, unlabelled = (
            own.mean() if len(own) else own.sum() for own in values.split(self.sizes)
        )
        return labelled, unlabelled


@dataclass
class Scalars:
    """Weights that change from step to step; 0-d, float32 except the step.

    Args:
        step: int64.
        kl_weight: weight of the KL term.
        pseudo_weight: weight of pseudo-labelled rows.
        shift_strength: strength of the shift for a row of weight 1.
        accepted_share: share of the unlabelled rows to accept under the rule "curriculum".
    """

    step: Tensor
    kl_weight: Tensor
    pseudo_weight: Tensor
    shift_strength: Tensor
    accepted_share: Tensor


class FinetuneStage(nn.Module):
    """A classifier with several opinions, its moving average, and class-conditional statistics.

    Args:
        config: options of the stage.
        model: the classifier, its encoders pre-trained or not.
        num_classes: C.
        steps: length of the stage, for the ramps.
        seed: seed of the shifts and of modality dropout.
        autocast: dtype of the encoders' arithmetic, None for float32.
        class_weights: factor of the losses of the rows of each class, (C,) float32; None: all 1.
        class_shares: of the classes in the labelled rows, (C,) float32; None: all equal.
    """

    class_weights: Tensor | None
    ramp_ends: Tensor
    ramp_tops: Tensor

    def __init__(
        self,
        config: FinetuneConfig,
        model: Classifier,
        *,
        num_classes: int,
        width: int,
        steps: int,
        seed: int,
        autocast: torch.dtype | None = None,
        class_weights: Tensor | None = None,
        class_shares: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config, self.autocast = config, autocast
        # An option, not something learned: not in the state of the stage.
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.steps, self.seed = steps, seed
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False)
        rank = config.shift_rank if config.shift == "low-rank" else 0
        self.statistics = ClassStatistics(
            num_classes, width, momentum=config.shift_momentum, rank=rank
        )
        self.limits = make_limits(config, num_classes)
        self.alignment = make_alignment(config, num_classes, class_shares)
        self._add_ramps()
        # Parameters of the average and of the model, listed at the first step.
        self._averaged: list[tuple[list[Tensor], list[Tensor]]] = []
        self._seen: list[Seen] = []
        self._proposed: list[tuple[Tensor, Tensor]] = []  # probabilities, share to accept

    def _add_ramps(self) -> None:
        """Add ends and tops of the ramps of ``Scalars``, in its order."""
        config = self.config
        ends = [config.kl_anneal, config.unlabelled_ramp, 1.0, 1.0]
        tops = [config.kl_weight, config.unlabelled_weight, config.shift_strength,
                config.accepted_share]  # fmt: skip
        for name, own in (("ramp_ends", [end * self.steps for end in ends]), ("ramp_tops", tops)):
            self.register_buffer(name, torch.tensor(own, dtype=torch.float64), persistent=False)

    def losses(
        self, batch: tuple[PairBatch, ...], step: Tensor, share: float = 1.0
    ) -> Iterator[Losses]:
        """Run one forward pass of the average over weak unlabelled views, then one of the student.

        ``batch`` contains the labelled rows and, if a term reads them, the unlabelled ones. It may
        be called for several parts of a batch before ``after_step``.
        """
        config, scalars = self.config, self._scalars(step)
        terms, fused, seen, proposed = self._compute(batch, scalars)
        probability = proposed.probability if proposed else None
        if probability is not None and (self.limits is not None or self.alignment is not None):
            self._proposed.append((gather_rows(probability), scalars.accepted_share))
        if seen is not None and self.statistics.rank:  # directions are rows, in their order
            sizes = [len(part.label) for part in batch]
            feature, label, weight = (gather_parts(values, sizes) for values in seen)
            seen = (feature, label, weight)
        if seen is not None:
            self._seen.append(seen)
        weights: dict[str, Tensor | float] = {
            "pseudo": scalars.pseudo_weight,
            "modality_consistency": config.modality_consistency_weight,
            "shift": config.shift_weight,
        }
        weights = {name: weight for name, weight in weights.items() if name in terms}
        on_log: dict[str, Callable[[], Tensor | Mapping[str, Tensor]]] = {
            "student_uncertainty": lambda: opinion(fused).uncertainty.mean()
        }
        if proposed:
            on_log["pseudo_labels"] = partial(proposed.metrics, batch[1].label)
        yield Losses("model", terms, weights, {"kl_weight": scalars.kl_weight}, on_log)

    def compile_parts(self, scope: CompileScope) -> None:
        """Compile each block, or the computation of the losses as one graph."""
        compile_parts(self, scope, ("_compute",))

    def networks(self) -> list[nn.Module]:
        """Return the networks that ``shard_parameters`` splits over ranks: all but the heads."""
        encoders = [
            encoder for own in (self.model, self.average) for encoder in own.encoders.values()
        ]
        fusions = [own.fusion for own in (self.model, self.average) if own.fusion is not None]
        return [*encoders, *fusions]

    def warnings(self, record: Mapping[str, float]) -> list[str]:
        """Return warnings about a log record."""
        return finetune_warnings(self.config, record)

    def _scalars(self, step: Tensor) -> Scalars:
        values = (ramps(step, self.ramp_ends) * self.ramp_tops).float()
        return Scalars(step, *values.unbind())

    def _compute(
        self, batch: tuple[PairBatch, ...], scalars: Scalars
    ) -> tuple[dict[str, Tensor], Tensor, Seen | None, PseudoLabels | None]:
        """Compute terms, fused evidence, and inputs of statistics and limits, without side
        effects."""
        config = self.config
        proposed = self._pseudo_labels(batch[1]) if len(batch) > 1 else None
        rows = join_rows(batch, proposed)
        present = drop_modalities(
            rows.present,
            rows.sample_id,
            seed=self.seed,
            step=scalars.step,
            rate=config.modality_dropout,
        )
        output = self._forward(self.model, rows.views, present)
        per_row, fused = evidential_fusion_loss(
            output.logits,
            rows.label,
            kl_weight=scalars.kl_weight,
            present=output.present,
            weight=rows.weight,
            ignore_index=NO_LABEL,
            reduction="none",
        )
        terms, seen = {}, None
        terms["supervised"], pseudo = rows.means(self._weighted(per_row, rows.label))
        if config.unlabelled_weight:
            terms["pseudo"] = pseudo
        if config.modality_consistency_weight and len(self.model.modalities) > 1:
            terms["modality_consistency"] = self._agreement(output)
        shifts = config.shift != "none" and config.shift_weight > 0
        if shifts and output.fusion_feature is not None:
            per_row, seen = self._shift(output, rows, scalars)
            shifted, pseudo = rows.means(self._weighted(per_row, rows.label))
            terms["shift"] = shifted + scalars.pseudo_weight * pseudo
        return terms, fused, seen, proposed

    def _weighted(self, per_row: Tensor, label: Tensor) -> Tensor:
        """Weigh the loss of each row, (R,), by its label or pseudo-label."""
        if self.class_weights is None:
            return per_row
        # Rows of no label have no loss: any weight will do.
        return per_row * self.class_weights[label.clamp(min=0)]

    @torch.no_grad()
    def after_step(self) -> None:
        """Advance the averaged weights and the class statistics by this step's batch."""
        if not self._averaged:
            self._averaged = self._list_parameters()
        for average, model in self._averaged:
            torch._foreach_lerp_(average, model, 1 - self.config.ema_momentum)
        if self._seen:
            features, labels, weights = map(joined, zip(*self._seen, strict=True))
            if self.statistics.rank:
                self.statistics.update(features, labels, weights)
            else:
                classes = len(self.statistics.count)
                moments = class_moments(features, labels, classes, weight=weights)
                self.statistics.update_moments(moments_over_ranks(moments))
            self._seen = []
        if self._proposed:
            parts, shares = zip(*self._proposed, strict=True)
            probability = joined(parts)
            aligned = probability if self.alignment is None else self.alignment(probability)
            if self.limits is not None:
                self.limits.update(aligned, shares[0])
            if self.alignment is not None:
                self.alignment.update(probability)
            self._proposed = []

    def _list_parameters(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """List the parameters of average and model, child by child: each is sharded as a whole or
        not at all."""
        found: list[tuple[list[Tensor], list[Tensor]]] = []
        for average, model in zip(self.average.children(), self.model.children(), strict=True):
            own: list[Tensor] = list(average.parameters())
            if own:  # frozen encoders have none
                found.append((own, list(model.parameters())))
        return found

    def _forward(
        self, model: Classifier, views: dict[str, Tensor], present: Tensor
    ) -> ClassifierOutput:
        if self.autocast is None:
            return model(views, present)
        with torch.autocast(present.device.type, self.autocast):
            return model(views, present)

    @torch.no_grad()
    def _pseudo_labels(self, unlabelled: PairBatch) -> PseudoLabels | None:
        """Propose pseudo-labels from the averaged model on weak views; None if no term reads it."""
        if not self.config.unlabelled_weight:
            return None
        output = self._forward(self.average, unlabelled.views, unlabelled.present)
        return propose(self.config, output, self.limits, self.alignment)

    def _agreement(self, output: ClassifierOutput) -> Tensor:
        """Average 1 - sum_k sqrt(p_ak p_bk) over pairs of present modalities.

        It compares probabilities, not beliefs: minimising the conflict mass drives opinions to
        vacuity.
        """
        count = len(self.model.modalities)
        # p = alpha / S, the expected probability of an opinion.
        alpha = (softplus(output.logits[:, :count]) + 1).unbind(1)
        strength = [own.sum(-1) for own in alpha]
        present = output.present.unbind(1)
        distances, both = [], []
        for a, b in combinations(range(count), 2):
            affinity = (alpha[a] * alpha[b]).sqrt().sum(-1)
            distances.append(1 - affinity * (strength[a] * strength[b]).rsqrt())
            both.append(present[a] & present[b])
        return masked_mean(torch.stack(distances, 1), torch.stack(both, 1))

    def _shift(self, output: ClassifierOutput, rows: Rows, scalars: Scalars) -> tuple[Tensor, Seen]:
        """Compute the loss, (R,), of the fusion opinion on shifted features; also return the
        unshifted features for the statistics."""
        feature = output.fusion_feature
        assert feature is not None
        label = torch.where(output.present[:, -1], rows.label, NO_LABEL)
        seen = (feature.detach(), label, rows.weight)
        strength = scalars.shift_strength * rows.weight
        if self.config.shift == "closed-form":
            return rows.weight * self._bound(output, label, strength), seen
        moved = shift_features(
            feature,
            label,
            self.statistics.variance(),
            strength=strength,
            seed=torch.stack([torch.full_like(scalars.step, self.seed), scalars.step]),
            row_ids=rows.sample_id,
            directions=self.statistics.directions() if self.config.shift == "low-rank" else None,
        )
        loss = evidential_loss(
            softplus(self.model.fusion_logits(moved)),
            label,
            kl_weight=scalars.kl_weight,
            weight=rows.weight,
            ignore_index=NO_LABEL,
            reduction="none",
        )
        return loss, seen

    def _bound(self, output: ClassifierOutput, label: Tensor, strength: Tensor) -> Tensor:
        """Bound the fusion head's expected loss under the diagonal shift from above, (R,).

        The loss is softmax cross-entropy, because the evidential loss has no such bound.
        """
        head = self.model.heads[FUSION]
        assert isinstance(head, nn.Linear)
        return shifted_cross_entropy(
            output.logits[:, -1],
            label,
            head.weight,
            self.statistics.variance(),
            strength=strength,
            reduction="none",
        )


def join_rows(batch: tuple[PairBatch, ...], proposed: PseudoLabels | None) -> Rows:
    """Join the labelled rows and, if any, the unlabelled ones with their pseudo-labels."""
    labelled = batch[0]
    one = torch.ones_like(labelled.label, dtype=torch.float32)
    if len(batch) == 1:
        sizes = (len(labelled.label), 0)
        return Rows(
            labelled.views, labelled.present, labelled.sample_id, labelled.label, one, sizes
        )
    unlabelled = batch[1]
    assert unlabelled.strong is not None
    label = torch.full_like(unlabelled.label, NO_LABEL)
    weight = torch.zeros_like(label, dtype=torch.float32)
    if proposed is not None:
        label, weight = proposed.label, proposed.weight
    return Rows(
        {name: torch.cat([x, unlabelled.strong[name]]) for name, x in labelled.views.items()},
        torch.cat([labelled.present, unlabelled.present]),
        torch.cat([labelled.sample_id, unlabelled.sample_id]),
        torch.cat([labelled.label, label]),
        torch.cat([one, weight]),
        (len(labelled.label), len(unlabelled.label)),
    )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Join the rows of the parts of a batch, often a single one."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]  # type: ignore[arg-type]


def gather_parts(values: Tensor, sizes: list[int]) -> Tensor:
    """Gather labelled and unlabelled rows of all ranks in the order of the whole batch, so that the
    statistics do not depend on the number of ranks."""
    return torch.cat([gather_rows(part) for part in values.split(sizes)])
