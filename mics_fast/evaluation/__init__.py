"""Evaluation: opinions, and the metrics, intervals, calibration, referral and tables on them."""

from typing import Literal, get_args

RESAMPLES = 1000
"""Default number of bootstrap resamples behind an interval."""

By = Literal["uncertainty", "probability"]
CRITERIA: tuple[By, ...] = get_args(By)
"""Quantities that a referral rule may compare with a threshold."""
