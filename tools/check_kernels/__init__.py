"""Checks of the compiled GPU kernels against the limits of the chips and the roofline model."""
