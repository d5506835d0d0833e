"""Benchmarks of the operators and of the trainer, against what a user would pick instead.

    python -m bench --quick | --full [--only consistency] [--compare BASE.json] [--threads N]

One module per subject says what is compared on which inputs: ``evidential``, ``consistency`` and
``shift`` yield cases (case.py); ``pipeline``, ``training`` and ``host`` (host time on a GPU that is
not there, by stub/) yield rows of their own. timing.py takes the times, memory.py the peaks of
memory; machine.py records what a run ran on. peaks.py (with probe.c) measures what that machine can
do at most; roofline.py counts the work that cannot be avoided. Every result is checked before it is
timed; a wrong one is not timed.

    python -m bench.publish [--check]       writes the tables and plots of the documentation
    pytest bench --benchmark-autosave       our operators under pytest-benchmark (test_operators.py)

``python -m bench`` lets implementations take turns, because the speed of a machine drifts. Under
pytest-benchmark each runs alone, for its storage, its comparison of runs and its histograms.
"""
