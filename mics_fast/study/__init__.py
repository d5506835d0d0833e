"""Studies: grids of runs, the processes that train them, and summaries of their results."""
