"""Benchmarks of the operators and of the trainer, against the alternatives a user would pick.

    python -m bench --quick | --full [--only consistency] [--compare BASE.json] [--threads N]

One module per subject defines the comparisons and their inputs: ``evidential``, ``consistency`` and
``shift`` yield cases (case.py); ``pipeline``, ``training`` and ``host`` (host time on a pretended
GPU, by stub/) yield rows of their own. timing.py measures times, memory.py peaks of memory;
machine.py describes the machine of a run. peaks.py (with probe.c) measures its peak rates;
roofline.py counts the unavoidable work. Every result is checked before it is timed; a wrong one is
not timed.

    python -m bench.publish [--check]       writes the tables and plots of the documentation
    pytest bench --benchmark-autosave       our operators under pytest-benchmark (test_operators.py)

``python -m bench`` alternates between implementations, because the speed of a machine drifts. Under
pytest-benchmark each runs alone, for its storage, its comparison of runs and its histograms.
"""
