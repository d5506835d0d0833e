"""The Triton backend of shift, class moments and shifted cross-entropy, as backends.py loads it."""

from mics_kernels.shift.triton_cross_entropy import (
    bound_programs,
    shifted_cross_entropy,
    shifted_cross_entropy_gradient,
    shifted_losses,
)
from mics_kernels.shift.triton_moments import class_moments, update_statistics
from mics_kernels.shift.triton_shift import shift_features

__all__ = [
    "bound_programs",
    "class_moments",
    "shift_features",
    "shifted_cross_entropy",
    "shifted_cross_entropy_gradient",
    "shifted_losses",
    "update_statistics",
]
