"""Tables and plots of docs/, written from the stored results.

    python -m bench.publish [--check]

``results`` reads what ``python -m bench`` stored, ``compare`` is its regression gate, ``targets``
holds the bounds that each operator has to keep. ``summaries`` writes the short tables, ``reports``
those of docs/performance.md, ``plots`` the figures; ``markdown`` holds the cells they share.
"""
