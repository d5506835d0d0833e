"""Benchmarks of the operators and of the trainer, against what a user would pick instead.

    python -m bench --quick | --full [--only consistency] [--compare BASE.json] [--threads N]

measures. One module a subject says what is compared on which inputs: ``evidential``,
``consistency``, ``shift`` (cases, case.py), ``pipeline`` and ``training`` (rows of their own).
timing.py takes the times, memory.py the peaks of memory; machine.py says what it ran on, peaks.py
(with probe.c) what that machine can do at most, roofline.py what a case cannot do without. A result
is compared with the others' before it is timed; a wrong one is not.

    python -m bench.publish [--check]        writes every table and plot of the documents
    pytest bench --benchmark-autosave       the same cases under pytest-benchmark (test_cases.py)

``python -m bench`` compares implementations that take turns, because a machine's speed drifts;
under pytest-benchmark each runs alone, for its storage, its comparison of runs and its histograms.
"""
