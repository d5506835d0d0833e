"""From images wherever they lie to a manifest: sources, inspection, splits, leaks, phantom."""
