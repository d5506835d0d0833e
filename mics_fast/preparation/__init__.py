"""Preparation: sources, inspection, splits, leak checks and the phantom, ending in a manifest."""
