"""Grids of runs: cells, processes, summaries."""
