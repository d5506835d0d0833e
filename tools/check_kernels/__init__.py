"""The compiled GPU kernels against the chips they run on and the roofline model."""
