"""Publishing: tables and plots of docs/, written from the stored results.

    python -m bench.publish [--check]

``results`` reads the files of ``python -m bench``, ``compare`` is the regression gate, ``targets``
holds the bounds for each operator. ``summaries`` writes the short tables, ``reports`` those of
docs/performance.md, ``plots`` the figures; ``markdown`` formats their cells.
"""
