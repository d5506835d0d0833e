"""Manifest, splits, preparation and the image pipeline."""
