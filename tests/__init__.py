"""Tests of mics_kernels, mics_fast, bench and examples; a package, so that they can share code."""
