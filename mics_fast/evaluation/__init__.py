"""Opinions and what is computed from them: metrics, intervals, calibration, tables."""
