"""Trained classifiers, from a run or an exported folder: prediction, evaluation, export."""
