"""Evidential (Dirichlet) opinions: fusion by Dempster's rule, losses, and readings of opinions."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from mics_kernels import checks
from mics_kernels.backends import explain
from mics_kernels.evidential import boundary, reference
from mics_kernels.evidential.records import EvidentialInputs, FusionInputs
from mics_kernels.reductions import REDUCTIONS

ACTIVATIONS = ("softplus", "exp", "relu")


class FusionOutput(NamedTuple):
    """Result of ``evidential_fusion_loss``.

    Args:
        loss: 0-d, or (B,) for ``reduction="none"``.
        fused_evidence: (B, C) fused evidence of the present views; not differentiable.
    """

    loss: Tensor
    fused_evidence: Tensor


class Opinion(NamedTuple):
    """A subjective opinion; ``belief.sum(-1) + uncertainty`` is 1.

    Args:
        belief: (..., C) belief mass of each class, in [0, 1).
        uncertainty: (...,) vacuity, in (0, 1]: the mass without evidence for any class.
        probability: (..., C) expected class probabilities, sum 1.
    """

    belief: Tensor
    uncertainty: Tensor
    probability: Tensor


def fuse_evidence(
    evidence: Tensor, *, present: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Combine the evidence of V views into one opinion by Dempster's rule.

    For Dirichlet opinions with a uniform prior the rule is a product per class,
    ``1 + fused / C = prod_v (1 + evidence_v / C)``: associative, order-free, and a view without
    evidence is neutral (derivation: README.md beside this file).

    Args:
        evidence: (B, V, C), non-negative, float32 / bfloat16 / float16 (float64: reference only);
            V >= 1, C >= 2.
        present: (B, V) bool; a view marked False counts as having no evidence and is never read.
        backend: see ``mics_kernels.backends``.

    Returns:
        (B, C) fused evidence, float32 (float64 for float64 input). Differentiable.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, or negative evidence.

    Source: Han et al., Trusted Multi-View Classification, ICLR 2021, Definition 4.

    Examples:
        >>> import torch
        >>> from mics_kernels import fuse_evidence
        >>> evidence = torch.tensor([[[6.0, 0.0, 0.0], [3.0, 3.0, 0.0]]])  # one row, two views
        >>> fuse_evidence(evidence).tolist()
        [[15.0, 3.0, 0.0]]
    """
    _check_views("evidence", evidence, present)
    _check_evidence(evidence, present)
    chosen = explain("evidential", evidence, backend).backend
    if chosen == "reference":
        return reference.fuse_evidence(evidence, present)
    return boundary.fused_evidence(FusionInputs(evidence, present, chosen))


def evidential_loss(
    evidence: Tensor,
    target: Tensor,
    *,
    kl_weight: float | Tensor,
    present: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Compute the evidential loss of one opinion per row, or of several.

    With alpha = evidence + 1 and S its sum, the expected cross-entropy
    ``sum_k y_k (digamma(S) - digamma(alpha_k))`` plus ``kl_weight`` times
    ``KL(Dirichlet(1 + (1 - y) evidence) || Dirichlet(1))``.

    Args:
        evidence: (B, C) or (B, V, C), non-negative, float32 / bfloat16 / float16 (float64:
            reference only); C >= 2. Gets a gradient, in its own dtype.
        target: (B,) int64 class labels or ``ignore_index``, or (B, C) class probabilities y.
        kl_weight: weight of the KL term, >= 0: a float, or a 0-d tensor on the same device, which
            a captured CUDA graph reads anew; no gradient.
        present: (B, V) bool, with (B, V, C) evidence; a view marked False has loss 0.
        weight: (B,) weight of each row; no gradient.
        ignore_index: label of rows that have loss 0 and gradient 0, and do not count.
        reduction: "mean": sum of weight * loss over the number of rows that are not ignored (0 if
            there are none); "sum"; "none": (B,), or (B, V) for (B, V, C) evidence.
        backend: see ``mics_kernels.backends``.

    Returns:
        The loss, float32 (float64 for float64 evidence).

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, negative evidence, a label or probability out of
            range, kl_weight < 0, or a target, weight or kl_weight that requires a gradient.

    Source: Sensoy et al., Evidential Deep Learning, NeurIPS 2018, section 3; Han et al., Trusted
    Multi-View Classification, ICLR 2021, section 3.

    Examples:
        >>> import torch
        >>> from mics_kernels import evidential_loss
        >>> evidence = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> loss = evidential_loss(evidence, torch.tensor([0, 1]), kl_weight=0.1, reduction="none")
        >>> [round(x, 3) for x in loss.tolist()]  # right and sure; without evidence
        [0.191, 1.5]
    """
    if isinstance(evidence, Tensor) and evidence.dim() == 2:
        checks.check_tensor("evidence", evidence, ("B", "C"))
        _check_classes("evidence", evidence)
        if present is not None:
            raise ValueError("present needs evidence of shape (B, V, C), got one opinion per row")
    else:
        _check_views("evidence", evidence, present)
    _check_evidence(evidence, present)
    inputs = EvidentialInputs(
        values=evidence,
        target=target,
        kl_weight=kl_weight,
        activation=None,
        present=present,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=explain("evidential", evidence, backend).backend,
    )
    _check_loss(inputs)
    if inputs.backend == "reference":
        return reference.evidential_loss(inputs)
    return boundary.reduced_loss(inputs).loss


def evidential_fusion_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kl_weight: float | Tensor,
    activation: str = "softplus",
    present: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> FusionOutput:
    """Compute the evidential loss of V views and of their fusion from logits, in one pass.

    The loss of a row is the sum of ``evidential_loss`` over its present views and their fusion
    (``fuse_evidence``), times the weight of the row.

    Args:
        logits: (B, V, C), float32 / bfloat16 / float16 (float64: reference only); V >= 1,
            C >= 2. Gets a gradient, in its own dtype.
        target: (B,) int64 class labels or ``ignore_index``, or (B, C) class probabilities.
        kl_weight: weight of the KL term, >= 0: a float, or a 0-d tensor on the same device, which
            a captured CUDA graph reads anew; no gradient.
        activation: from logits to evidence: "softplus"; "relu" (no gradient below 0); or "exp" of
            logits clamped to [-10, 10], because fused evidence is a product over views (no
            gradient outside).
        present: (B, V) bool; a view marked False is never read. A row without views has loss 0,
            gradient 0 and fused evidence 0.
        weight: (B,) weight of each row; no gradient.
        ignore_index: label of rows that have loss 0 and gradient 0, and do not count. Their
            evidence is fused nevertheless.
        reduction: "mean": sum of weight * loss over the number of rows that are not ignored (0 if
            there are none); "sum"; "none": (B,).
        backend: see ``mics_kernels.backends``.

    Returns:
        ``FusionOutput(loss, fused_evidence)``, float32 (float64 for float64 logits).

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, a label or probability out of range, kl_weight < 0, an
            unknown activation, or a target, weight or kl_weight that requires a gradient.

    Source: Han et al., Trusted Multi-View Classification, ICLR 2021, section 3.

    Examples:
        >>> import torch
        >>> from mics_kernels import evidential_fusion_loss, opinion
        >>> logits = torch.tensor([[[4.0, 0.0, 0.0], [2.0, 0.0, 0.0]]], requires_grad=True)
        >>> output = evidential_fusion_loss(logits, torch.tensor([0]), kl_weight=0.1)
        >>> output.loss.backward()
        >>> opinion(output.fused_evidence).probability.argmax().item()
        0
    """
    _check_views("logits", logits, present)
    checks.check_choice("activation", activation, ACTIVATIONS)
    inputs = EvidentialInputs(
        values=logits,
        target=target,
        kl_weight=kl_weight,
        activation=activation,
        present=present,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=explain("evidential", logits, backend).backend,
    )
    _check_loss(inputs)
    if inputs.backend == "reference":
        return FusionOutput(*reference.evidential_fusion_loss(inputs))
    results = boundary.reduced_loss(inputs)
    return FusionOutput(results.loss, results.fused)


def opinion(evidence: Tensor) -> Opinion:
    """Convert evidence to an opinion: belief, vacuity and expected probability.

    With alpha = evidence + 1 and S its sum: ``belief = evidence / S``, ``uncertainty = C / S``,
    ``probability = alpha / S``.

    Args:
        evidence: (..., C), non-negative, any float dtype; C >= 2.

    Returns:
        ``Opinion(belief (..., C), uncertainty (...,), probability (..., C))``, float32 (float64
        for float64 input). Differentiable.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: no class dimension, or negative evidence.

    Source: Jøsang, Subjective Logic, 2016; Sensoy et al., 2018, section 2.

    Examples:
        >>> import torch
        >>> from mics_kernels import opinion
        >>> belief, uncertainty, probability = opinion(torch.tensor([6.0, 0.0]))
        >>> belief.tolist(), uncertainty.item(), probability.tolist()
        ([0.75, 0.0], 0.25, [0.875, 0.125])
    """
    leading = checks.shape_of(evidence)[:-1]
    checks.check_tensor("evidence", evidence, (*leading, "C"))
    _check_classes("evidence", evidence)
    checks.check_values("evidence", evidence, 0.0)
    return Opinion(*reference.opinion(evidence))


def conflict(evidence: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Compute the mass that Dempster's rule discards because views contradict each other.

    ``1 - sum_k [prod_v (b_vk + u_v) - prod_v u_v] - prod_v u_v``: the mass that remains after the
    combinations in which views agree on a class and the one in which all are vacuous.

    Args:
        evidence: (B, V, C), non-negative, any float dtype; V >= 1, C >= 2.
        present: (B, V) bool; a view marked False is vacuous and contradicts none.

    Returns:
        (B,) in [0, 1], float32 (float64 for float64 input). Differentiable.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, or negative evidence.

    Source: Shafer, A Mathematical Theory of Evidence, 1976, chapter 3.

    Examples:
        >>> import torch
        >>> from mics_kernels import conflict
        >>> agree = [[98.0, 0.0], [98.0, 0.0]]
        >>> differ = [[98.0, 0.0], [0.0, 98.0]]
        >>> [round(x, 2) for x in conflict(torch.tensor([agree, differ])).tolist()]
        [0.0, 0.96]
    """
    _check_views("evidence", evidence, present)
    _check_evidence(evidence, present)
    return reference.conflict(evidence, present)


def _check_views(name: str, values: Tensor, present: Tensor | None) -> None:
    checks.check_tensor(name, values, ("B", "V", "C"))
    rows, views, _ = values.shape
    checks.check_not_empty(name, values, 1, "view")
    _check_classes(name, values)
    if present is not None:
        checks.check_tensor("present", present, (rows, views), checks.FLAGS, values.device)


def _check_classes(name: str, values: Tensor) -> None:
    if values.shape[-1] < 2:
        raise ValueError(f"{name} must hold at least two classes, got {values.shape[-1]}")


def _check_evidence(evidence: Tensor, present: Tensor | None) -> None:
    where = None if present is None else present.unsqueeze(-1)
    checks.check_values("evidence", evidence, 0.0, where=where)


def _check_loss(inputs: EvidentialInputs) -> None:
    rows, classes, device = inputs.values.shape[0], inputs.values.shape[-1], inputs.values.device
    checks.check_whole("ignore_index", inputs.ignore_index, -(2**63), 2**63 - 1)
    checks.check_target("target", inputs.target, rows, classes, device, inputs.ignore_index)
    checks.check_scalar("kl_weight", inputs.kl_weight, 0.0, math.inf, device)
    if inputs.weight is not None:
        checks.check_tensor("weight", inputs.weight, (rows,), checks.FLOATS, device)
        checks.check_constant("weight", inputs.weight)
    checks.check_choice("reduction", inputs.reduction, REDUCTIONS)
