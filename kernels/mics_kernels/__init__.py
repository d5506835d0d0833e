"""Fused operators for semi-supervised learning from paired images."""

from __future__ import annotations

from mics_kernels.consistency import (
    FeatureQueue,
    consistency_loss,
    multimodal_consistency_loss,
)
from mics_kernels.evidential import (
    FusionOutput,
    Opinion,
    conflict,
    evidential_fusion_loss,
    evidential_loss,
    fuse_evidence,
    opinion,
)
from mics_kernels.shift import (
    ClassMoments,
    ClassStatistics,
    class_moments,
    merge_moments,
    shift_features,
    shifted_cross_entropy,
)

__all__ = [
    "ClassMoments",
    "ClassStatistics",
    "FeatureQueue",
    "FusionOutput",
    "Opinion",
    "class_moments",
    "conflict",
    "consistency_loss",
    "evidential_fusion_loss",
    "evidential_loss",
    "fuse_evidence",
    "merge_moments",
    "multimodal_consistency_loss",
    "opinion",
    "shift_features",
    "shifted_cross_entropy",
]

__version__ = "0.1.0"
