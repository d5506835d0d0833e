"""Baselines: published code, reimplemented for comparison."""
