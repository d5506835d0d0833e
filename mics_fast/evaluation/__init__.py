"""Opinions and what is computed from them: metrics, intervals, calibration, tables."""

from typing import Literal, get_args

RESAMPLES = 1000
"""Bootstrap resamples behind an interval, unless asked otherwise."""

By = Literal["uncertainty", "probability"]
CRITERIA: tuple[By, ...] = get_args(By)
"""What referral to a person may compare with a threshold."""
