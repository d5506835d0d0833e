"""Class-conditional statistics: moments of a batch, exact merging, running statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mics_kernels import checks
from mics_kernels.backends import explain, native_on_cpu
from mics_kernels.shift import boundary, reference
from mics_kernels.shift.recent import RecentRows, append_rows, centred_directions, latest_rows
from mics_kernels.shift.records import ClassMoments, MomentsInputs


def class_moments(
    features: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    weight: Tensor | None = None,
    backend: str | None = None,
) -> ClassMoments:
    """Count, mean and sum of squared deviations of the features of each class.

    Args:
        features: (B, D), D >= 1, float32 / bfloat16 / float16 (float64: reference only). Gets no
            gradient: the result is a constant.
        target: (B,) int64 class labels, -1 for rows to skip, which are never read; or (B, C)
            posteriors, with which a row counts in every class.
        num_classes: C >= 1.
        weight: (B,) >= 0, an additional weight of each row.
        backend: see ``mics_kernels.backends``.

    Returns:
        ``ClassMoments(count (C,) float64, mean (C, D), m2 (C, D))``, mean and m2 in float32
        (float64 for float64 features).

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, a label or posterior out of range, negative weight.

    Source: Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample
    variances, 1979 (two-pass form).

    Examples:
        >>> import torch
        >>> from mics_kernels import class_moments
        >>> features = torch.tensor([[1.0], [3.0], [5.0], [9.0]])
        >>> moments = class_moments(features, torch.tensor([0, 0, 1, -1]), num_classes=2)
        >>> moments.count.tolist(), moments.mean.tolist(), moments.m2.tolist()
        ([2.0, 1.0], [[2.0], [5.0]], [[2.0], [0.0]])
    """
    checks.check_tensor("features", features, ("B", "D"))
    checks.check_not_empty("features", features, 1, "feature")
    checks.check_whole("num_classes", num_classes, 1)
    with torch.no_grad():
        return _moments(_checked_inputs(features, target, num_classes, weight, backend))


def _checked_inputs(
    features: Tensor, target: Tensor, num_classes: int, weight: Tensor | None, backend: str | None
) -> MomentsInputs:
    rows, device = len(features), features.device
    checks.check_target("target", target, rows, num_classes, device, ignored=-1)
    if weight is not None:
        checks.check_tensor("weight", weight, (rows,), checks.FLOATS, device)
        checks.check_values("weight", weight, 0.0)
    chosen = explain("moments", features, backend).backend
    return MomentsInputs(features.detach(), target, num_classes, weight, chosen)


def _moments(inputs: MomentsInputs) -> ClassMoments:
    if inputs.backend == "reference":
        return reference.class_moments(inputs)
    return boundary.moments(inputs)


def merge_moments(a: ClassMoments, b: ClassMoments) -> ClassMoments:
    """Merge the moments of ``a`` and ``b`` as if their rows were one batch.

    Args:
        a: moments of C classes and D features.
        b: moments of as many classes and features.

    Returns:
        The merged moments; mean and m2 in the wider of the two dtypes.

    Raises:
        ValueError: the two differ in classes, features or device.

    Source: Chan, Golub, LeVeque, 1979, equations 2.1.

    Examples:
        >>> import torch
        >>> from mics_kernels import class_moments, merge_moments
        >>> features, target = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 0])
        >>> halves = [class_moments(features[i], target[i], 1) for i in (slice(2), slice(2, 3))]
        >>> merge_moments(*halves).mean.tolist()
        [[3.0]]
    """
    checks.check_tensor("b.mean", b.mean, tuple(a.mean.shape), checks.FLOATS, a.mean.device)
    dtype = torch.promote_types(a.mean.dtype, b.mean.dtype)
    count = a.count + b.count
    share = (b.count / torch.where(count > 0, count, 1.0)).unsqueeze(1)
    distance = b.mean.double() - a.mean.double()
    mean = a.mean + distance * share
    m2 = a.m2.double() + b.m2.double() + distance.square() * share * a.count.unsqueeze(1)
    return ClassMoments(count, mean.to(dtype), m2.to(dtype))


class ClassStatistics(nn.Module):
    """Running class-conditional mean and variance of features.

    Without momentum all rows count equally. With momentum old rows fade: n new rows of a class
    weigh ``1 - (1 - momentum) ** n`` in its statistics. The distance between the old mean and the
    new rows enters the variance (Chan's merge), so that a class with one row per batch still gets
    its variance. A weighted row counts as that many rows.

    With a rank, the latest rows of each class are kept as well; they give low-rank ``directions``
    along which the class varies, correlations between features included.

    The state is in buffers: it is saved, restored and moved with the module. The buffers keep their
    dtypes when the module is converted to half precision.

    Args:
        num_classes: C >= 1.
        dim: feature width D >= 1.
        momentum: weight of one new row, in (0, 1); None: cumulative statistics.
        rank: number of rows per class kept for ``directions``, r >= 0.

    Attributes:
        count: (C,) float64, number of rows so far.
        mean: (C, D) float64.
        m2: (C, D) float64, count * variance.
        recent_rows: (C, r, D) float32, the latest rows, newest last.
        recent_weight: (C, r) float64, their weights; 0 in free slots.
        synced_*: the same five at the last ``sync``.
        pending_*: the same five of the rows of this rank since then.

    Raises:
        TypeError: num_classes, dim or rank is not an int.
        ValueError: num_classes or dim below 1, rank below 0, or momentum outside (0, 1).

    Source: Wang et al., Implicit Semantic Data Augmentation, NeurIPS 2019, section 3.1; the
    momentum form is this project's.

    Examples:
        >>> import torch
        >>> from mics_kernels import ClassStatistics
        >>> statistics = ClassStatistics(num_classes=2, dim=1)
        >>> statistics.update(torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([0, 0, 1]))
        >>> statistics.variance().tolist()  # 0 for the class with one row
        [[1.0], [0.0]]
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(
        self, num_classes: int, dim: int, *, momentum: float | None = None, rank: int = 0
    ) -> None:
        super().__init__()
        checks.check_whole("num_classes", num_classes, 1)
        checks.check_whole("dim", dim, 1)
        checks.check_whole("rank", rank, 0)
        if momentum is not None and not 0.0 < momentum < 1.0:
            raise ValueError(f"momentum must be > 0 and < 1, got {momentum}")
        self.momentum, self.rank = momentum, rank
        for part in ("", "synced_", "pending_"):
            self.register_buffer(f"{part}count", torch.zeros(num_classes, dtype=torch.float64))
            for moment in ("mean", "m2"):
                zeros = torch.zeros(num_classes, dim, dtype=torch.float64)
                self.register_buffer(f"{part}{moment}", zeros)
            self.register_buffer(f"{part}recent_rows", torch.zeros(num_classes, rank, dim))
            weight = torch.zeros(num_classes, rank, dtype=torch.float64)
            self.register_buffer(f"{part}recent_weight", weight)

    @torch.no_grad()
    def update(self, features: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        """Add the rows of one batch; arguments and errors as ``class_moments``.

        For ``directions``, a row with posteriors counts only for its most probable class.
        """
        (classes, dim), device = self.mean.shape, self.mean.device
        checks.check_tensor("features", features, ("B", dim), checks.FLOATS, device)
        inputs = _checked_inputs(features, target, classes, weight, None)
        states = self._moments("pending_"), self._moments("")
        if not boundary.update_in_place(inputs, *states, self.momentum):
            self._add(_moments(inputs))
        if self.rank:
            latest = latest_rows(features, target, weight, classes, self.rank)
            for part in ("pending_", ""):
                self._keep(part, append_rows(self._recent(part), latest))

    @torch.no_grad()
    def update_moments(self, moments: ClassMoments) -> None:
        """Add the rows that these moments describe, for example those of all ranks.

        Args:
            moments: of C classes and D features.

        Raises:
            ValueError: wrong shape or device, or a ``rank`` above 0, which needs the rows.
        """
        if self.rank:
            raise ValueError(f"rank is {self.rank}, wanted 0: directions need rows, not moments")
        checks.check_tensor(
            "moments.mean", moments.mean, tuple(self.mean.shape), checks.FLOATS, self.mean.device
        )
        self._add(moments)

    def variance(self) -> Tensor:
        """Return each class's variance over the count, (C, D) float32; 0 before the second row."""
        count = self.count.unsqueeze(1)
        return torch.where(count < 2.0, 0.0, self.m2 / count).float()

    def directions(self) -> Tensor:
        """Return the directions in which each class varies: (C, rank, D); 0 before the second row.

        They are the latest rows, centred and scaled such that the mean of their outer products is
        the weighted covariance of these rows, even if there are fewer than ``rank``.
        """
        directions = centred_directions(self._recent(""))
        return torch.where(self.count.reshape(-1, 1, 1) < 2.0, 0.0, directions)

    @torch.no_grad()
    def sync(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Merge the rows of all ranks, as if each rank had seen them all.

        Call it on all ranks, after any number of updates. It gathers C (1 + 2 D) numbers, and
        C r (1 + D) more with a rank, in one collective. Without initialised torch.distributed it
        does nothing.

        Args:
            group: the ranks to merge; default all.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        own = _pack(self._moments("pending_"), self._recent("pending_"))
        gathered = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(gathered, own, group=group)
        for name, value in self.named_buffers():
            if name.startswith("pending_"):
                value.zero_()
        new, recent = self._moments("pending_"), self._recent("synced_")
        for part in gathered:
            moments, rows = _unpack(part, self.mean.shape[1], self.rank)
            new = merge_moments(new, moments)
            recent = append_rows(recent, rows) if self.rank else recent
        merged = self._absorb(self._moments("synced_"), new)
        for name in ("synced_", ""):
            self._store(name, merged)
            self._keep(name, recent)

    def _add(self, new: ClassMoments) -> None:
        if explain("moments", new.mean).backend == "cpu":
            native = native_on_cpu(*self._moments(""), *self._moments("pending_"), *new)
            if native is not None:
                native.merge_moments(self._moments("pending_"), new, None)
                native.merge_moments(self._moments(""), new, self.momentum)
                return
        self._store("pending_", merge_moments(self._moments("pending_"), new))
        self._store("", self._absorb(self._moments(""), new))

    def _absorb(self, old: ClassMoments, new: ClassMoments) -> ClassMoments:
        """Merge new rows; with momentum, old rows weigh at most their share."""
        if self.momentum is None:
            return merge_moments(old, new)
        # An old count N gives n new rows the share n / (N + n): 1 - (1 - momentum) ** n where
        # N = n (1 - momentum) ** n / (1 - (1 - momentum) ** n).
        fade = new.count * math.log1p(-self.momentum)
        cap = new.count * fade.exp() / -torch.where(new.count > 0, fade, -1.0).expm1()
        weight = torch.where(new.count > 0, torch.minimum(old.count, cap), old.count)
        kept = weight / torch.where(old.count > 0, old.count, 1.0)
        merged = merge_moments(old._replace(count=weight, m2=old.m2 * kept.unsqueeze(1)), new)
        count = old.count + new.count  # the number of rows, not their faded weight
        scale = count / torch.where(merged.count > 0, merged.count, 1.0)
        return ClassMoments(count, merged.mean, merged.m2 * scale.unsqueeze(1))

    def _moments(self, part: str) -> ClassMoments:
        return ClassMoments(
            getattr(self, f"{part}count"), getattr(self, f"{part}mean"), getattr(self, f"{part}m2")
        )

    def _store(self, part: str, moments: ClassMoments) -> None:
        for name, value in moments._asdict().items():
            getattr(self, f"{part}{name}").copy_(value)

    def _recent(self, part: str) -> RecentRows:
        return RecentRows(
            getattr(self, f"{part}recent_rows"), getattr(self, f"{part}recent_weight")
        )

    def _keep(self, part: str, recent: RecentRows) -> None:
        for name, value in recent._asdict().items():
            getattr(self, f"{part}recent_{name}").copy_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the buffers without rounding them: sums of many rows do not fit half precision."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        return self


def _pack(moments: ClassMoments, recent: RecentRows) -> Tensor:
    """Pack the state of each class into a row of float64, which holds float32 exactly."""
    rows = recent.rows.double().flatten(1)
    return torch.cat(
        [moments.count.unsqueeze(1), moments.mean, moments.m2, recent.weight, rows], dim=1
    )


def _unpack(packed: Tensor, dim: int, rank: int) -> tuple[ClassMoments, RecentRows]:
    count, mean, m2, weight, rows = packed.split([1, dim, dim, rank, rank * dim], dim=1)
    moments = ClassMoments(count.squeeze(1), mean, m2)
    return moments, RecentRows(rows.float().unflatten(1, (rank, dim)), weight)
