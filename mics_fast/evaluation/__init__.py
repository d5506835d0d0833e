"""Opinions and what is computed from them: metrics, intervals, calibration, tables."""

RESAMPLES = 1000
"""Bootstrap resamples behind an interval, unless asked otherwise."""
